"""What commands print: tables for people on stdout, or one JSON document."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from resources.errors import printable
from resources.event_log import EventLog
from resources.library import Library

if TYPE_CHECKING:
    import pyarrow as pa

    from cli.run import Summary

STATUSES = ("ok", "not_applicable", "retryable", "quarantined", "running")
_MOST_FAILURES = 30
_WHOLE_PATH = 4096
_out = Console()


def _shown(value: object, limit: int = 120) -> str:
    return escape(printable(str(value), limit))


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
    if not summary.runs:
        _out.print(_nothing_done(summary))
        return
    _spared(summary.facts.get("ocr_text", {}))
    home = str(library.settings.home)
    _out.print(f"{summary.items} items in {summary.seconds_total:.0f} s. State is in {_shown(home, _WHOLE_PATH)}.")
    _examples(library)
    _out.print("\n[bold]Next[/bold]")
    for command, what in next_commands(home):
        _out.print(f"  {_shown(command, _WHOLE_PATH)}   [dim]{what}[/dim]", soft_wrap=True)


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
    table = Table(title="Items by asset and outcome", title_justify="left")
    table.add_column("asset")
    for status in present:
        table.add_column(status, justify="right")
    if computed is not None:
        table.add_column("worked on now", justify="right")
        table.add_column("seconds", justify="right")
    for asset in (name for name in PER_MEDIA if name in outcomes):
        cells = [str(outcomes[asset].get(status, "")) for status in present]
        if computed is not None:
            cells += [str(computed.get(asset, 0)), f"{(seconds or {}).get(asset, 0.0):.1f}"]
        table.add_row(asset, *cells)
    _out.print(table)


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
        _out.print(f"[yellow]not read:[/yellow] {_shown(problem['path'])}: {_shown(problem['reason'])}")


def _failures(failures: Sequence[dict[str, Any]]) -> None:
    for failure in failures[:_MOST_FAILURES]:
        name = str(failure["uri"]).rsplit("/", 1)[-1]
        _out.print(
            f"[yellow]{failure['status']}[/yellow] {failure['asset']} of {_shown(name)}"
            f" ([bold]{failure['error_class']}[/bold]): {_shown(failure['error'], 400)}",
            highlight=False,
        )
    if len(failures) > _MOST_FAILURES:
        _out.print(f"… and {len(failures) - _MOST_FAILURES} more: media-assets status")


def _examples(library: Library) -> None:
    from cli.searching import example_queries, open_search

    engine = open_search(library)
    for query in example_queries(library):
        response = engine.search(query, 3)
        _out.print(f"\n[bold]search[/bold] “{_shown(query)}”")
        _hits(response.hits)


def _hits(hits: Sequence[Any]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("score", "when", "unit", "media", "why"):
        table.add_column(name, justify="right" if name == "score" else "left")
    for hit in hits:
        when = "" if hit.kind in ("image", "text") else f"{clock(hit.start_s)}–{clock(hit.end_s)}"
        what = f"{hit.why}: {hit.snippet}" if hit.snippet else hit.why
        name = hit.uri.rsplit("/", 1)[-1]
        table.add_row(f"{hit.score:.3f}", when, hit.unit, _shown(name, 60), _shown(what, 100))
    _out.print(table)


def show_hits(response: Any, as_json: bool) -> None:
    """Hits of `search` or `similar`."""
    if as_json:
        from dataclasses import asdict

        print(json.dumps(asdict(response), default=_plain))
        return
    for note in response.notes:
        _out.print(_shown(note), style="yellow")
    if not response.hits:
        _out.print("Nothing found.")
        return
    _hits(response.hits)


def show_status(library: Library, as_json: bool) -> bool:
    """Counts by asset, status and error class; False when there are no items at all."""
    rows = library.outcomes.summary()
    live = len(library.registry.live())
    if as_json:
        notes = library.backlog.notes()
        planner = {"at": notes[0], "decisions": notes[1]} if notes else None
        print(json.dumps({"items": live, "outcomes": rows, "planner": planner}, default=_plain))
        return live > 0
    if not live:
        _out.print("No media registered yet. Start with: media-assets run FOLDER")
        return False
    outcomes: dict[str, dict[str, int]] = {}
    for row in rows:
        counts = outcomes.setdefault(row["asset"], {})
        counts[row["status"]] = counts.get(row["status"], 0) + row["items"]
    _out.print(f"{live} live items")
    _outcome_table(outcomes)
    if library.backlog.notes() is not None:
        from cli.planning import show_notes

        show_notes(library)
    failed = [row for row in rows if row["error_class"] and row["error_class"] != "upstream_failed"]
    if failed:
        table = Table(title="Failures by class", title_justify="left")
        for name in ("asset", "status", "error_class", "items"):
            table.add_column(name, justify="right" if name == "items" else "left")
        for row in failed:
            table.add_row(row["asset"], row["status"], row["error_class"], str(row["items"]))
        _out.print(table)
        _out.print("Try them again with: media-assets retry [--asset A] [--error-class C]; one item: status MEDIA_ID")
    return True


def show_item(library: Library, media_id: str, as_json: bool) -> bool:
    """Everything recorded about one item; False when it is not known."""
    rows = library.registry.live([media_id])
    records = sorted(library.outcomes.load([media_id]).values(), key=lambda record: record.asset)
    failed = EventLog(library.database).failed_run(media_id) if rows else None
    if as_json:
        from dataclasses import asdict

        told = {
            "item": rows[0] if rows else None,
            "outcomes": [asdict(record) for record in records],
            "failed_run": asdict(failed) if failed else None,
        }
        print(json.dumps(told, default=_plain))
        return bool(rows)
    if not rows:
        _out.print(f"No live item {_shown(media_id)}.")
        return False
    _out.print(f"[bold]{_shown(media_id)}[/bold]  {_shown(rows[0]['uri'], 400)}")
    table = Table()
    for name in ("asset", "status", "attempts", "rows", "seconds", "device", "model", "error"):
        table.add_column(name, overflow="fold")
    for record in records:
        error = f"{record.error_class}: {record.error}" if record.error_class else record.error or ""
        table.add_row(
            record.asset,
            str(record.status),
            str(record.attempts),
            str(record.rows or 0),
            f"{record.seconds or 0:.2f}",
            record.device or "",
            record.model or "",
            _shown(error, 400),
        )
    _out.print(table)
    if failed is not None:
        _out.print(
            f"[yellow]Its last run failed[/yellow] ({failed.job} {failed.run_id}, ended"
            f" {failed.ended_at:%Y-%m-%d %H:%M} UTC): {_shown(failed.error, 600)}",
            highlight=False,
        )
    return True


def show_table(table: pa.Table, as_json: bool) -> None:
    """Rows of a query."""
    if as_json:
        print(json.dumps(table.to_pylist(), default=_plain))
        return
    drawn = Table()
    for name in table.column_names:
        drawn.add_column(escape(name), overflow="fold")
    for row in table.to_pylist():
        drawn.add_row(*(_shown(value, 300) for value in row.values()))
    _out.print(drawn)
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
        table = Table(title=f"{entry['eval']}: {_shown(entry['model'])}", title_justify="left")
        table.add_column("figure")
        table.add_column("value", justify="right")
        for name, value in entry["figures"].items():
            table.add_row(_shown(name), "–" if value is None else f"{value:.4g}")
        _out.print(table)
        _out.print(f"{_shown(entry['baseline'], 400)}\n", style="green" if entry["passed"] else "yellow")
