"""Asset checks of a batch: how its items ended, and what Great Expectations says of their rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import dagster as dg
import pyarrow as pa

from media_assets.checks.checker import checker
from media_assets.engine.events import Event, OutcomeCommitted
from resources.errors import printable
from resources.library import Library
from resources.records.outcome import Status

ITEMS = "items"
EXPECTATIONS = "expectations"
_WORST = 20
_BULK = {"image", "flac", "rgb"}  # bytes no expectation looks at


def items_check(library: Library, asset: str, media_ids: Sequence[str] | None) -> dg.AssetCheckEvaluation:
    """Passed when every item (of the library, for None) ended `ok` or `not_applicable`."""
    ids = _ids(library, media_ids)
    records = library.outcomes.load(ids, [asset])
    failed = [record for record in records.values() if not record.status.done]
    rows = [
        dg.TableRecord(
            {
                "media_id": record.media_id,
                "status": str(record.status),
                "attempts": record.attempts,
                "error_class": record.error_class or "",
                "error": printable(record.error or "", 200),
            }
        )
        for record in failed[:_WORST]
    ]
    return dg.AssetCheckEvaluation(
        asset_key=dg.AssetKey(asset),
        check_name=ITEMS,
        passed=not failed,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{len(failed)} of {len(records)} items have no {asset}." if failed else None,
        metadata={
            "items": len(records),
            "failed": len(failed),
            "not applicable": sum(record.status is Status.NOT_APPLICABLE for record in records.values()),
            **({"failed items": dg.MetadataValue.table(rows)} if rows else {}),
        },
    )


def _ids(library: Library, media_ids: Sequence[str] | None) -> list[str]:
    return [row["media_id"] for row in library.registry.live()] if media_ids is None else list(media_ids)


def batch_table(library: Library, asset: str, media_ids: Sequence[str] | None) -> pa.Table:
    """Rows of all finished items among `media_ids` (all live ones for None), without bulk columns."""
    from media_assets.schemas import PER_MEDIA

    ids = _ids(library, media_ids)
    records = library.outcomes.load(ids, [asset])
    schema = PER_MEDIA[asset]
    columns = [name for name in schema.names if name not in _BULK]
    tables = [
        library.store.read(asset, key, columns=columns)
        for (key, _), record in sorted(records.items())
        if record.status is Status.OK
    ]
    empty = schema.empty_table().select(columns)
    return pa.concat_tables([empty, *tables])


def expectations_check(library: Library, asset: str, media_ids: Sequence[str] | None) -> dg.AssetCheckEvaluation:
    """Great Expectations over the rows of the batch: counts, and the worst rows of what failed."""
    table = batch_table(library, asset, media_ids)
    media = table if asset == "media" else batch_table(library, "media", media_ids)
    report = checker().validate(asset, table, media, library.settings.engine.infer_timeout_s)
    worst = [
        dg.TableRecord(
            {
                "expectation": entry.name,
                "column": entry.column,
                "media_id": row.media_id,
                "row": row.row,
                "value": printable(row.value, 100),
            }
        )
        for entry in report.failures
        for row in entry.worst
    ]
    metadata: dict[str, Any] = {
        "rows": report.rows,
        "items": report.items,
        "expectations": len(report.expectations),
        **report.figures,
    }
    if report.failures:
        metadata["broken rows"] = {
            f"{entry.name} {entry.column}".strip(): entry.unexpected for entry in report.failures
        }
    if worst:
        metadata["worst rows"] = dg.MetadataValue.table(worst[:_WORST])
    return dg.AssetCheckEvaluation(
        asset_key=dg.AssetKey(asset),
        check_name=EXPECTATIONS,
        passed=report.passed,
        severity=dg.AssetCheckSeverity.WARN,
        description=report.summary,
        metadata=metadata,
    )


def as_output(event: Any) -> Any:
    """An evaluation as the result of a check that the step was asked for; any other event as it is.

    Dagster takes a mere evaluation for a check that was left out, and says so in every run.
    """
    if not isinstance(event, dg.AssetCheckEvaluation):
        return event
    return dg.AssetCheckResult(
        passed=event.passed,
        asset_key=event.asset_key,
        check_name=event.check_name,
        metadata=event.metadata,
        severity=event.severity,
        description=event.description,
    )


class Checks:
    """Checks of a step over its batch, `media_ids` (all live items for None): pairs of asset and check.

    Great Expectations is asked about an asset as soon as the last item's is settled, beside the work on the others.
    """

    def __init__(self, library: Library, chosen: Sequence[tuple[str, str]], media_ids: Sequence[str] | None) -> None:
        self._library = library
        self._chosen = chosen
        self._media_ids = media_ids
        self._settled = Counter[str]()
        self._begun: dict[str, Future[dg.AssetCheckEvaluation]] = {}
        self._thread = ThreadPoolExecutor(1, "checks")

    def listen(self, event: Event) -> None:
        """Take note of each item's asset that is settled; a listener of the engine."""
        if isinstance(event, OutcomeCommitted):
            self.settled(event.result.asset)

    def settled(self, asset: str) -> None:
        """Take note that one more item's asset is settled."""
        self._settled[asset] += 1
        if (asset, EXPECTATIONS) in self._chosen and self._settled[asset] == len(self._media_ids or ()):
            self._begun[asset] = self._thread.submit(expectations_check, self._library, asset, self._media_ids)

    def results(self) -> Iterator[dg.AssetCheckEvaluation]:
        """What the checks say, in the order asked; raises what one raised."""
        for asset, check in self._chosen:
            if check == ITEMS:
                yield items_check(self._library, asset, self._media_ids)
            elif asset in self._begun:
                yield self._begun[asset].result()
            else:
                yield expectations_check(self._library, asset, self._media_ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
