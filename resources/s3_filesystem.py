"""s3fs with one difference: what botocore raises without an answer of the store becomes an OSError with a sentence."""

from __future__ import annotations

import errno
from typing import Any

from botocore.exceptions import BotoCoreError
from s3fs import S3FileSystem

from resources.errors import printable


class S3Store(S3FileSystem):  # type: ignore[misc]
    """The file system of s3:// URLs. Errors: FileNotFoundError, PermissionError, TimeoutError, OSError; no others."""

    # botocore retries by itself; this repeats only what it cannot: answers that break off.
    retries = 2

    async def _call_s3(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            return await super()._call_s3(method, *arguments, **options)
        except BotoCoreError as error:
            raise self._explained(error) from error

    def _explained(self, error: BotoCoreError) -> OSError:
        where = printable(self.endpoint_url or "AWS", 200)
        text = f"The object store at {where} cannot be used ({type(error).__name__})"
        return OSError(errno.EIO, text)
