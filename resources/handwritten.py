"""Files that people write: read as text or TOML, and what is wrong with one said in a line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from resources.errors import printable

_MOST_CHARS = 600


def read_toml(path: Path) -> dict[str, Any]:
    """The document in a file. Raises OSError and ValueError, of which `reason` makes a line."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def reason(error: OSError | ValueError) -> str:
    """What was wrong with a file, without a full stop: it cannot be read, is no TOML, or says what cannot be meant."""
    if isinstance(error, IsADirectoryError):
        return "it is a folder"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.start})"
    if isinstance(error, tomllib.TOMLDecodeError):
        return printable(f"it is not TOML: {error}", _MOST_CHARS)
    if isinstance(error, ValidationError):
        return printable("; ".join(problems(error)), _MOST_CHARS)
    return printable(str(error), _MOST_CHARS)


def problems(error: ValidationError) -> list[str]:
    """Each problem as `field: what is wrong`, without the value, which may be a password."""
    return [
        f"{'.'.join(map(str, found['loc']))}: {_message(found)}".removeprefix(": ")
        for found in error.errors(include_url=False, include_input=False, include_context=False)
    ]


def _message(found: Any) -> str:
    return str(found["msg"]).removeprefix("Value error, ")
