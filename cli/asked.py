"""What a command is asked about has to be there: items of the library, assets, classes of errors."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import typer

from cli.text import WHOLE, shown
from media_assets.schemas import PER_MEDIA
from resources import errors
from resources.ingest.registry import UnknownMedia
from resources.library import Library


def live_items(library: Library, media_ids: Sequence[str]) -> None:
    """Raises UnknownMedia for IDs of no live item."""
    live = {row["media_id"] for row in library.registry.live(list(media_ids))} if media_ids else set()
    if unknown := [media_id for media_id in dict.fromkeys(media_ids) if media_id not in live]:
        raise UnknownMedia(f"No live item {shown(', '.join(unknown), WHOLE)}.")


def outcomes(library: Library, assets: Sequence[str], error_classes: Sequence[str], option: str) -> None:
    """Raises typer.BadParameter for assets that have no outcomes, and for classes, given by `option`, of no error.

    What the code knows no more and outcomes still have may be asked for.
    """
    _known(library, "asset", assets, PER_MEDIA, "--asset")
    _known(library, "error_class", error_classes, errors.of_items(), option)


def _known(library: Library, field: str, asked: Sequence[str], known: Collection[str], option: str) -> None:
    if set(asked) <= set(known):
        return
    recorded = {row[field] for row in library.outcomes.summary()}
    if unknown := [name for name in dict.fromkeys(asked) if name not in known and name not in recorded]:
        what = field.replace("_", " ")
        raise typer.BadParameter(f"no {what} {', '.join(unknown)}; there are: {', '.join(known)}", param_hint=option)


def selected(select: str | None) -> list[str]:
    """The assets of `run --select`, comma-separated; none for all. Raises typer.BadParameter."""
    from cli.run import SPANNING

    if select is None:
        return []
    names = [name.strip() for name in select.split(",") if name.strip()]
    known = [*PER_MEDIA, *SPANNING]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        told = f"no asset {', '.join(unknown)}" if names else "names no asset"
        raise typer.BadParameter(f"{told}; there are: {', '.join(known)}", param_hint="--select")
    return names
