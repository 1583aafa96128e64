"""What a batch engine settled, as a list."""

from __future__ import annotations

from collections.abc import Sequence

from media_assets.engine.batch import BatchEngine
from media_assets.engine.contract import MediaItem
from media_assets.engine.events import Event, OutcomeCommitted, Result


def settled(engine: BatchEngine, items: Sequence[MediaItem], run_id: str) -> list[Result]:
    """Every result of a batch, in order."""
    results: list[Result] = []

    def listen(event: Event) -> None:
        if isinstance(event, OutcomeCommitted):
            results.append(event.result)

    engine.run(items, run_id, listen)
    return results
