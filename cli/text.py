"""Text of strangers on a terminal."""

from __future__ import annotations

from rich.markup import escape

from resources.errors import printable


def shown(value: object, limit: int = 120) -> str:
    """`value` for a terminal: printable, bounded, and never markup."""
    return escape(printable(str(value), limit))
