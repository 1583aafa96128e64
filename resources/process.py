"""What is true of this process as a whole."""

from __future__ import annotations

_hung = 0


def note_hung(calls: int) -> None:
    """Calls that did not answer still run in this process: it should end after its run, not serve another."""
    global _hung
    _hung += calls


def is_tainted() -> bool:
    """Whether a call hangs in this process."""
    return _hung > 0
