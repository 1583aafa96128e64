"""The library that a command works on: where it is, opened and closed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from resources.library import Library

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="Folder that holds all state.", show_default="$MEDIA_HOME, then ./var"),
]


def open_library(home: Path | None) -> Library:
    """The library of this home; nothing of it is opened yet but its settings. Raises BadSettings."""
    from resources.library import Library

    return Library.open(home)


@contextmanager
def opened(home: Path | None) -> Iterator[Library]:
    """The library of this home, closed at the end."""
    library = open_library(home)
    try:
        yield library
    finally:
        library.close()
