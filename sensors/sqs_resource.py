"""SQS as a Dagster resource, configured like those of dagster-aws, which has none for it.

Import it where it is used: dagster-aws takes seconds to import.
"""

import re
from typing import Any, Self

from dagster_aws.utils import ResourceWithBoto3Configuration

from resources.ingest.queues import RECEIVERS, unreachable
from resources.settings import Settings

_AWS_URL = re.compile(r"https://(?:sqs\.([a-z0-9-]+)|([a-z0-9-]+)\.queue)\.amazonaws\.com(?:\.cn)?/")
# A tick is repeated soon anyway and has to end before Dagster ends it: not the patience of a transfer.
_MAX_ATTEMPTS = 3
_READ_TIMEOUT_S = 10.0


class SQSResource(ResourceWithBoto3Configuration):  # type: ignore[misc]
    """Gives a boto3 client of SQS."""

    connect_timeout_s: float = 5.0
    read_timeout_s: float = _READ_TIMEOUT_S

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The resource for `ingestion.queue_url`: region from `s3.region`, else from the queue's URL."""
        named = _AWS_URL.match(settings.ingestion.queue_url or "")
        return cls(
            region_name=settings.s3.region or (named and (named[1] or named[2])) or None,
            endpoint_url=settings.ingestion.queue_endpoint_url,
            max_attempts=min(settings.s3.max_attempts, _MAX_ATTEMPTS),
            connect_timeout_s=settings.s3.connect_timeout_s,
            read_timeout_s=min(settings.s3.read_timeout_s, _READ_TIMEOUT_S),
        )

    def get_client(self) -> Any:
        """A client that several threads may share. Raises QueueUnavailable when it cannot be made."""
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        config = Config(
            retries={"total_max_attempts": self.max_attempts, "mode": "adaptive"},
            connect_timeout=self.connect_timeout_s,
            read_timeout=self.read_timeout_s,
            max_pool_connections=RECEIVERS,
        )
        try:
            return boto3.session.Session(profile_name=self.profile_name).client(
                "sqs",
                region_name=self.region_name,
                endpoint_url=self.endpoint_url,
                use_ssl=self.use_ssl,
                verify=self.verify,
                aws_access_key_id=self.aws_access_key_id,
                aws_secret_access_key=self.aws_secret_access_key,
                aws_session_token=self.aws_session_token,
                config=config,
            )
        except (BotoCoreError, ValueError) as error:
            raise unreachable(self.endpoint_url or "SQS", error) from error
