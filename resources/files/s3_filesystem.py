"""s3fs with one difference: a store that does not answer, or not to us, is an OSError with a sentence and a remedy."""

from __future__ import annotations

from typing import Any

from botocore.exceptions import BotoCoreError
from s3fs import S3FileSystem

from resources.errors import StorageFailed, printable
from resources.files.object_store import StoreUnavailable


class StoreDenied(StorageFailed, PermissionError):
    """An object store that refuses what is asked."""

    remedy = "Check the permissions of the credentials in use, then retry."


class S3Store(S3FileSystem):  # type: ignore[misc]
    """The file system of s3:// URLs. All its errors are OSErrors; a missing object is FileNotFoundError."""

    # botocore retries by itself; this repeats only what it cannot: answers that break off.
    retries = 2

    async def _call_s3(self, method: str, *arguments: Any, **options: Any) -> Any:
        where = printable(self.endpoint_url or "AWS", 200)
        try:
            return await super()._call_s3(method, *arguments, **options)
        except BotoCoreError as error:
            raise StoreUnavailable(f"The object store at {where} cannot be used ({type(error).__name__}).") from error
        except PermissionError as error:
            bucket = printable(str(options.get("Bucket", "")), 80)
            raise StoreDenied(f"The object store at {where} denies {method} in bucket {bucket}.") from error
