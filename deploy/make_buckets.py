"""Creates the named S3 buckets at MEDIA_S3__ENDPOINT_URL; those that exist are left as they are."""

from __future__ import annotations

import os
import sys

import boto3


def make_buckets(endpoint_url: str, region: str, names: list[str]) -> None:
    """Create what is missing."""
    client = boto3.client("s3", endpoint_url=endpoint_url, region_name=region)
    existing = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for name in names:
        if name not in existing:
            client.create_bucket(Bucket=name)


if __name__ == "__main__":
    make_buckets(os.environ["MEDIA_S3__ENDPOINT_URL"], os.environ["MEDIA_S3__REGION"], sys.argv[1:])
