"""Text of strangers on a terminal: printed as it is, but for what would steer the terminal."""

from __future__ import annotations

from rich.console import Console

from resources.errors import printable

WHOLE = 4096
"""Characters that no path or file name reaches: they are for copying."""


def console(stderr: bool = False) -> Console:
    """The one kind of console of all commands.

    What it prints is no markup and holds no codes of emoji, and no line is broken, so that paths can be copied. Styles
    come by `style=` and `rich.text.Text` alone.
    """
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


def shown(value: object, limit: int = 120) -> str:
    """`value` for a terminal: on one line, printable and bounded."""
    return printable(str(value), limit)
