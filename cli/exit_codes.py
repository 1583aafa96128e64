"""Exit codes of `media-assets`, by family of error."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """What the process answers its caller."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    ITEMS_FAILED = 3
    NOTHING_FOUND = 4
    DATABASE = 5
    MODEL = 6
    SETTINGS = 7
    QUERY = 8
    STORAGE = 9
    INTERRUPTED = 130
