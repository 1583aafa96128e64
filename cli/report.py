"""What commands print: tables for people on stdout, or one JSON document."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from rich.text import Text

from cli import asked, tables
from cli.text import WHOLE, console
from cli.text import shown as _shown
from resources.library import Library
from resources.records.event_log import EventLog

if TYPE_CHECKING:
    import pyarrow as pa

    from cli.run import Summary
    from resources.records.outcome import Outcome

STATUSES = ("ok", "not_applicable", "retryable", "quarantined", "running")
_MOST_FAILURES = 30
_out = console()
_err = console(stderr=True)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss.s or m:ss.s."""
    minutes, rest = divmod(max(0.0, seconds), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


def show_summary(library: Library, summary: Summary) -> None:
    """The end of `run`: what was made, what failed and why, three searches, and what to do next."""
    if summary.items == 0:
        _out.print("No media files found. Give a folder that holds video, audio, images or text.")
        _problems(summary.problems)
        return
    _outcome_table(summary.outcomes, summary.computed, summary.seconds)
    _problems(summary.problems)
    _failures(summary.failures)
    _in_flight(summary.in_flight)
    if not summary.runs:
        _out.print(_nothing_done(summary))
        return
    _spared(summary.facts.get("ocr_text", {}))
    home = str(library.settings.home)
    _out.print(f"{summary.items} items in {summary.seconds_total:.0f} s. State is in {_shown(home, WHOLE)}.")
    _examples(library)
    _out.print("\nNext", style="bold")
    for command, what in next_commands(home):
        _out.print(Text.assemble(f"  {_shown(command, WHOLE)}   ", (what, "dim")))


def _nothing_done(summary: Summary) -> str:
    failed = len({failure["media_id"] for failure in summary.failures})
    if not failed:
        return f"Nothing to do: all {summary.items} items are up to date ({summary.seconds_total} s)."
    return (
        f"Nothing to do: {summary.items - failed} of {summary.items} items are up to date; set aside after a failure:"
        f" {failed}. When the cause is mended: media-assets dead-letters --replay"
    )


def next_commands(home: str) -> list[tuple[str, str]]:
    """What to do after a run on this home, as a shell takes it, and what for."""
    chosen = f"--home {shlex.quote(home)}"
    return [
        (f'media-assets search "a bird in a tree" {chosen}', "find moments by meaning or word"),
        (f'media-assets sql "from moderation_labels" {chosen}', "query every table"),
        (f"media-assets status {chosen}", "what is done, what failed, and why"),
        (f"media-assets dev {chosen}", "lineage, backfills and checks in the Dagster UI"),
    ]


def _outcome_table(
    outcomes: dict[str, dict[str, int]], computed: dict[str, int] | None = None, seconds: dict[str, float] | None = None
) -> None:
    from media_assets.schemas import PER_MEDIA

    present = [status for status in STATUSES if any(status in counts for counts in outcomes.values())]
    names = ["asset", *present, *(["worked on now", "seconds"] if computed is not None else [])]
    rows: list[list[object]] = []
    for asset in (name for name in PER_MEDIA if name in outcomes):
        row: list[object] = [asset, *(outcomes[asset].get(status) for status in present)]
        if computed is not None:
            row += [computed.get(asset, 0), f"{(seconds or {}).get(asset, 0.0):.1f}"]
        rows.append(row)
    tables.show(_out, names, rows, title="Items by asset and outcome", right=names[1:])


def _spared(facts: dict[str, int]) -> None:
    if stills := facts.get("stills", 0):
        reasons = ", ".join(
            f"{count} {name.removeprefix('stills_spared_').replace('_', ' ')}"
            for name, count in facts.items()
            if name.startswith("stills_spared_") and count
        )
        _out.print(f"OCR read {facts.get('stills_read', 0)} of {stills} stills; spared: {reasons or 'none'}.")


def _problems(problems: Sequence[dict[str, str]]) -> None:
    for problem in problems:
        told = f"{_shown(problem['path'], WHOLE)}: {_shown(problem['reason'], 400)}"
        _out.print(Text.assemble(("not read:", "yellow"), f" {told}"))


def _failures(failures: Sequence[dict[str, Any]]) -> None:
    for failure in failures[:_MOST_FAILURES]:
        name = _shown(str(failure["uri"]).rsplit("/", 1)[-1], WHOLE)
        _out.print(
            Text.assemble(
                (failure["status"], "yellow"),
                f" {failure['asset']} of {name} (",
                (str(failure["error_class"]), "bold"),
                f"): {_shown(failure['error'], 400)}",
            )
        )
    if len(failures) > _MOST_FAILURES:
        _out.print(f"… and {len(failures) - _MOST_FAILURES} more: media-assets status")


def _in_flight(found: Sequence[dict[str, Any]]) -> None:
    if not found:
        return
    count, runs = len({entry["media_id"] for entry in found}), sorted({entry["run_id"] for entry in found})
    told = "1 item is" if count == 1 else f"{count} items are"
    named = f"run{'s' if len(runs) > 1 else ''} {', '.join(runs)}"
    _out.print(f"{told} in flight in another process ({named}); media-assets status says when it is done.")


def _examples(library: Library) -> None:
    from cli.searching import example_queries, open_search

    engine = open_search(library)
    for query in example_queries(library):
        response = engine.search(query, 3)
        _out.print(Text.assemble(("\nsearch", "bold"), f" “{_shown(query)}”"))
        # What fits a usual terminal for usual names: an overview that `search` gives the rest of.
        tables.show(_out, ("when", "unit", "media_id", "file"), map(_place, response.hits), light=True)


def _hits(hits: Sequence[Any]) -> None:
    rows = [(f"{hit.score:.3f}", *_place(hit), f"{hit.why}: {hit.snippet}" if hit.snippet else hit.why) for hit in hits]
    names = ("score", "when", "unit", "media_id", "file", "why")
    tables.show(_out, names, rows, right=("score",), light=True)


def _place(hit: Any) -> tuple[str, str, str, str]:
    when = "" if hit.kind in ("image", "text") else f"{clock(hit.start_s)}–{clock(hit.end_s)}"
    return when, hit.unit, hit.media_id, hit.uri.rsplit("/", 1)[-1]


def show_hits(response: Any, as_json: bool) -> None:
    """Hits of `search` or `similar`."""
    if as_json:
        from dataclasses import asdict

        print(json.dumps(asdict(response), default=_plain))
        return
    for note in response.notes:
        _err.print(_shown(note, 400), style="yellow")
    if not response.hits:
        _err.print("Nothing found.")
        return
    _hits(response.hits)


def show_status(library: Library, as_json: bool) -> bool:
    """Counts by asset, status and error class; False when there are no items at all."""
    counted = library.outcomes.summary()
    live = len(library.registry.live())
    if as_json:
        notes = library.backlog.notes()
        planner = {"at": notes[0], "decisions": notes[1]} if notes else None
        print(json.dumps({"items": live, "outcomes": counted, "planner": planner}, default=_plain))
        return live > 0
    if not live:
        _out.print("No media registered yet. Start with: media-assets run FOLDER")
        return False
    outcomes: dict[str, dict[str, int]] = {}
    for row in counted:
        counts = outcomes.setdefault(row["asset"], {})
        counts[row["status"]] = counts.get(row["status"], 0) + row["items"]
    _out.print(f"{live} live items")
    _outcome_table(outcomes)
    if library.backlog.notes() is not None:
        from cli.planning import show_notes

        show_notes(library)
    failed = [row for row in counted if row["error_class"] and row["error_class"] != "upstream_failed"]
    if failed:
        names = ("asset", "status", "error_class", "items")
        rows = [[row[name] for name in names] for row in failed]
        tables.show(_out, names, rows, title="Failures by class", right=("items",))
        _out.print("Try them again with: media-assets retry [--asset A] [--error-class C]; one item: status MEDIA_ID")
    return True


def show_item(library: Library, media_id: str, as_json: bool) -> None:
    """Everything recorded about one item. Raises UnknownMedia."""
    asked.live_items(library, [media_id])
    (item,) = library.registry.live([media_id])
    records = sorted(library.outcomes.load([media_id]).values(), key=lambda record: record.asset)
    failed = EventLog(library.database).failed_run(media_id)
    if as_json:
        from dataclasses import asdict

        told = {
            "item": item,
            "outcomes": [asdict(record) for record in records],
            "failed_run": asdict(failed) if failed else None,
        }
        print(json.dumps(told, default=_plain))
        return
    _out.print(Text.assemble((media_id, "bold"), f"  {_shown(item['uri'], WHOLE)}"))
    names = ("asset", "status", "attempts", "rows", "seconds", "device", "model", "error")
    tables.show(_out, names, [_recorded(record) for record in records], right=names[2:5])
    if failed is not None:
        told_of = f"({failed.job} {failed.run_id}, ended {failed.ended_at:%Y-%m-%d %H:%M} UTC)"
        _out.print(Text.assemble(("Its last run failed", "yellow"), f" {told_of}: {_shown(failed.error, 600)}"))


def _recorded(record: Outcome) -> tables.Row:
    error = f"{record.error_class}: {record.error}" if record.error_class else record.error
    seconds = f"{record.seconds or 0:.2f}"
    return (
        record.asset,
        record.status,
        record.attempts,
        record.rows or 0,
        seconds,
        record.device,
        record.model,
        error,
    )


def show_table(table: pa.Table, as_json: bool) -> None:
    """Rows of a query."""
    if as_json:
        print(json.dumps(table.to_pylist(), default=_plain))
        return
    # By column: a query may give two of them one name.
    rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
    tables.show(_out, table.column_names, rows)
    if _out.file.isatty():
        _out.print(f"{table.num_rows} rows", style="dim")


def _plain(value: object) -> object:
    """What JSON has no word for: bytes as base64, exact numbers as numbers, the rest as text."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def show_evals(evals: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Figures of every evaluation."""
    if as_json:
        print(json.dumps(list(evals), default=_plain))
        return
    for entry in evals:
        figures = [(name, "–" if value is None else f"{value:.4g}") for name, value in entry["figures"].items()]
        tables.show(_out, ("figure", "value"), figures, title=f"{entry['eval']}: {entry['model']}", right=("value",))
        _out.print(f"{_shown(entry['baseline'], 400)}\n", style="green" if entry["passed"] else "yellow")
