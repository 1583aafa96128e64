"""Errors at the edge: those that have a remedy are said in a sentence, with the exit code of their family."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from typer.core import TyperGroup

from cli.exit_codes import Exit

_INTERRUPTS = ("KeyboardInterrupt", "DagsterExecutionInterruptedError")
_FAMILIES: dict[str, Exit] = {
    "database_unavailable": Exit.DATABASE,
    "storage_mismatch": Exit.DATABASE,
    "schema_outdated": Exit.DATABASE,
    "schema_newer": Exit.DATABASE,
    "model_unavailable": Exit.MODEL,
    "model_mismatch": Exit.MODEL,
    "device_unavailable": Exit.MODEL,
    "serving_unavailable": Exit.MODEL,
    "bad_query": Exit.QUERY,
    "bad_search": Exit.QUERY,
    "bad_settings": Exit.SETTINGS,
    "bad_policy": Exit.SETTINGS,
    "bad_needs": Exit.SETTINGS,
    "buckets_changed": Exit.SETTINGS,
    "executor_unavailable": Exit.SETTINGS,
    "golden_invalid": Exit.SETTINGS,
    "tuning_unreadable": Exit.SETTINGS,
    "folder_unusable": Exit.STORAGE,
    "storage_failed": Exit.STORAGE,
    "catalog_unreadable": Exit.STORAGE,
    "shard_unreadable": Exit.STORAGE,
    "nothing_to_tune": Exit.NOTHING_FOUND,
    "golden_not_processed": Exit.NOTHING_FOUND,
    "unknown_media": Exit.NOTHING_FOUND,
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNUSABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG)


class Commands(TyperGroup):
    """The commands; an interrupt ends any of them with a sentence instead of the library's own `Aborted!`."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BaseException as error:
            if type(error).__name__ not in _INTERRUPTS:
                raise
            stop("Interrupted. What is finished is kept; run the same command to go on.", Exit.INTERRUPTED)


def explained(error: BaseException) -> tuple[str, Exit] | None:
    """The sentence and the exit code of an error that a person can mend; None for a defect, which needs its traceback.

    An error that was wrapped on its way, by Dagster or by whoever met it, counts as what it was. A full disk does so
    before all else, since what fails for want of space calls itself many things.
    """
    causes = list(_causes(error))
    found = (told for judge in (_full_disk, _named, _of_database, _of_file) for each in causes if (told := judge(each)))
    return next(found, None)


def stop(message: str, code: Exit) -> NoReturn:
    """Say why on stderr and end the process."""
    print(message, file=sys.stderr)
    flush()
    sys.exit(code)


def flush() -> None:
    """Write out what was printed; what cannot be written is dropped, or Python would complain of it once more at exit.

    Raises OSError, such as for a full disk.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # whoever read it has seen enough
            sys.exit(Exit.INTERNAL)
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _full_disk(error: BaseException) -> tuple[str, Exit] | None:
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return None
    where = f"for {_printable(error.filename)}" if error.filename else "in the home, the storage or what stdout goes to"
    what = "The disk is full" if error.errno == errno.ENOSPC else "The quota of the disk is used up"
    told = f"{what}: there is no space {where}."
    return f"{told} Free some, then run the same command again: what is finished is kept.", Exit.STORAGE


def _named(error: BaseException) -> tuple[str, Exit] | None:
    from resources.errors import MediaError

    return (str(error), _FAMILIES.get(error.code, Exit.INTERNAL)) if isinstance(error, MediaError) else None


def _of_database(error: BaseException) -> tuple[str, Exit] | None:
    if type(error).__module__.partition(".")[0] not in ("sqlalchemy", "psycopg2"):
        return None
    from resources.records.database import explained as of_database

    told = of_database(error)
    return (str(told), Exit.DATABASE) if told else None


def _of_file(error: BaseException) -> tuple[str, Exit] | None:
    if not isinstance(error, OSError) or error.errno not in _UNUSABLE or not error.filename:
        return None
    told = f"{_printable(error.filename)} cannot be used: {error.strerror}."
    return f"{told} Check its permissions, or choose another place with --home or MEDIA_STORAGE_URL.", Exit.STORAGE


def _printable(path: object) -> str:
    from resources.errors import printable

    return printable(os.fsdecode(path) if isinstance(path, bytes) else str(path), 4096)
