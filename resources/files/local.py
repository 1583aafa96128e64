"""Local files that others may be reading: replaced in one step, never half written."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resources.errors import MediaError


class FolderUnusable(MediaError):
    """A folder for state cannot be made or written."""

    code, http_status = "folder_unusable", 507
    remedy = "Make it a folder that this user may write, or choose another one with --home or MEDIA_HOME."


def made(folder: Path, mode: int = 0o777) -> Path:
    """`folder`, made with all above it where it is not there. Raises FolderUnusable."""
    try:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
    except OSError as error:
        at = f" at {error.filename}" if error.filename and str(error.filename) != str(folder) else ""
        raise FolderUnusable(f"The folder {folder} cannot be made: {error.strerror}{at}.") from error
    return folder


_OF_A_HOME = (
    "postgres",
    "postgres.lock",
    "dagster",
    "derived",
    "models",
    "settings.toml",
    "models.toml",
    "policy.toml",
)
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def private(home: Path) -> Path:
    """A home for its user alone: made so, or closed to others where it was open. Raises FolderUnusable.

    A folder of another user, with other things in it, or which a group may write, is somebody's choice and stays.
    """
    made(home, mode=stat.S_IRWXU)
    mode = (found := home.stat()).st_mode
    is_mine = found.st_uid == os.geteuid() and not mode & (stat.S_IWGRP | stat.S_ISVTX)
    if is_mine and mode & _OTHERS:
        names = set(os.listdir(home))
        if not names or names.intersection(_OF_A_HOME):
            home.chmod(stat.S_IMODE(mode) & ~_OTHERS)
    return home


def version_of(info: os.stat_result) -> str:
    """What tells one version of a local file from the next: its size and its time of modification (its etag)."""
    return f"{info.st_size:x}-{info.st_mtime_ns:x}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write: it takes the other's place when the block ends well, and is removed when not.

    The folder is made where there is none. A process killed meanwhile leaves `.<name>.<random>` behind. Of two writers
    the last one wins. Raises OSError, which names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename is None:  # of a full disk the system says no name
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
