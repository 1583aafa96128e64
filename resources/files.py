"""Local files that others may be reading: replaced in one step, never half written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def version_of(info: os.stat_result) -> str:
    """What tells one version of a local file from the next: its size and its time of modification (its etag)."""
    return f"{info.st_size:x}-{info.st_mtime_ns:x}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write: it takes the other's place when the block ends well, and is removed when not.

    The folder is made where there is none. A process killed meanwhile leaves `.<name>.<random>` behind. Of two writers
    the last one wins. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
