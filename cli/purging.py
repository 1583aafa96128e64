"""`media-assets purge`: erase every derived byte of items, and prove it.

The order makes a crash harmless: tombstones first, so that nothing works on the items or serves them any more; then
everything is erased; then it is looked for. Running it again does all steps again.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from cli.exit_codes import Exit
from cli.text import WHOLE, shown
from cli.text import console as plain_console
from evals.forget import forget, golden_files
from media_assets.library.purge import purge_shared
from resources.faults import fault
from resources.ingest.registry import UnknownMedia
from resources.library import Library
from resources.records.erasure import Eraser, Subject, Twin, erase_log_lines, erase_server_log
from resources.records.event_log import EventLog
from resources.records.outcomes import EVALUATION
from resources.records.traces import scan

_MOST_SHOWN = 30
_out = plain_console()


@dataclass(slots=True)
class Report:
    """What one purge found, erased, read to prove it, and left; `--json` prints exactly this."""

    purged: list[dict[str, Any]] = field(default_factory=list)
    duplicates: list[dict[str, str]] = field(default_factory=list)
    erased: dict[str, int] = field(default_factory=dict)
    scanned: dict[str, int] = field(default_factory=dict)
    references: dict[str, int] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    complete: bool = False


def purge(
    library: Library, media_ids: Sequence[str], *, yes: bool, with_duplicates: bool, as_json: bool, console: Console
) -> Exit:
    """Purge uploads in any state, after asking unless `yes`; says what was done and whether anything is left.

    Raises UnknownMedia, and purges nothing then.
    """
    eraser = Eraser(library.database)
    subjects = eraser.subjects(media_ids)
    if unknown := set(media_ids) - {subject.media_id for subject in subjects}:
        raise UnknownMedia(f"No media item {shown(', '.join(sorted(unknown)), WHOLE)}; nothing was purged.")
    twins = eraser.twins([subject.media_id for subject in subjects])
    if with_duplicates:
        while twins:
            subjects = eraser.subjects([*(one.media_id for one in subjects), *(twin.media_id for twin in twins)])
            twins = eraser.twins([subject.media_id for subject in subjects])
    # A purge that died knew more than its command line says, such as copies whose records are gone by now.
    if resumed := set(eraser.unfinished()) - {subject.media_id for subject in subjects}:
        console.print(f"Going on with {len(resumed)} purges that were not brought to their end.")
        subjects = eraser.subjects([*(one.media_id for one in subjects), *sorted(resumed)])
    _warn(twins, console)
    if not yes and not _confirmed(subjects, console):
        return Exit.USAGE
    report = erase(library, subjects, twins, console)
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        _show(report)
    return Exit.OK if report.complete else Exit.ITEMS_FAILED


def _confirmed(subjects: Sequence[Subject], console: Console) -> bool:
    for subject in subjects[:_MOST_SHOWN]:
        line = f"{shown(subject.media_id)} ({subject.state}): {shown(subject.uri, WHOLE)}"
        console.print(line)
    if len(subjects) > _MOST_SHOWN:
        console.print(f"… and {len(subjects) - _MOST_SHOWN} more")
    if not sys.stdin.isatty():
        console.print("Nothing was purged: confirm with --yes.")
        return False
    console.print(f"Erase everything derived from {len(subjects)} item(s)? This cannot be undone. [y/N] ", end="")
    return input().strip().lower() in ("y", "yes")


def _warn(twins: Sequence[Twin], console: Console) -> None:
    if not twins:
        return
    names = ", ".join(shown(twin.media_id) for twin in twins[:_MOST_SHOWN])
    more = f" and {len(twins) - _MOST_SHOWN} more" if len(twins) > _MOST_SHOWN else ""
    told = f"{len(twins)} other uploads hold the same bytes: {names}{more}; purge them too with --with-duplicates."
    console.print(told, style="yellow")


def erase(library: Library, subjects: Sequence[Subject], twins: Sequence[Twin], console: Console) -> Report:
    """Tombstones, erasure, verification; the audit trail gets a line at both ends."""
    eraser, events = Eraser(library.database), EventLog(library.database)
    ids = [subject.media_id for subject in subjects]
    report = Report(
        purged=[{"media_id": one.media_id, "uri": one.uri, "state_before": one.state} for one in subjects],
        duplicates=[asdict(twin) for twin in twins],
    )
    _say(console, "setting tombstones")
    eraser.begin(ids)
    fault("purge.after_tombstone")
    files = golden_files(library, [(one.media_id, one.uri, one.sha256) for one in subjects])
    while True:
        # A run that began before the tombstones may still write; one that begins now finds no live item.
        before = library.outcomes.alive([*events.unfinished_runs(), EVALUATION])
        _erase(library, subjects, files, report, console)
        _say(console, "looking for what is left in every file and table")
        found = scan(library.store, library.settings.home, library.database, ids)
        report.running = library.outcomes.alive(before)
        if len(report.running) == len(before):
            break  # else some ended meanwhile, and what they wrote at last is erased as well
    report.scanned = {"files": found.files, "bytes": found.bytes, "tables": found.tables, "rows": found.rows}
    report.references, report.left = found.references, found.left
    report.complete = not (report.left or report.running or report.problems)
    eraser.finish(ids, "erased" if report.complete else "incomplete", {**report.erased, **report.scanned})
    return report


def _erase(
    library: Library, subjects: Sequence[Subject], files: set[str] | None, report: Report, console: Console
) -> None:
    """Everything that holds derived bytes; adds to the counts."""
    eraser, events, home = Eraser(library.database), EventLog(library.database), library.settings.home
    ids, erased = [subject.media_id for subject in subjects], Counter(report.erased)
    _say(console, "erasing files, records and events")
    evaluations = forget(home, files, [subject.uri for subject in subjects])
    pictures = events.erase_pictures([("evals", name) for name in evaluations])
    erased.update({"evaluations": len(evaluations), "pictures": pictures})
    count, size = library.store.erase(ids)
    erased.update({"files": count, "bytes": size})
    fault("purge.after_files")
    erased.update(eraser.records(ids))
    fault("purge.after_records")
    erased.update(events.erase(ids))
    fault("purge.after_events")
    lines = erase_log_lines(home / "dagster", ids) + erase_server_log(home / "postgres" / "log", ids)
    erased.update({"log_lines": lines})
    _say(console, "rebuilding catalog, index and near-duplicates without them")
    shared, report.problems = purge_shared(library, ids)
    erased.update(shared)
    report.erased = dict(erased)
    fault("purge.before_verify")


def _show(report: Report) -> None:
    erased = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in report.erased.items() if count)
    scanned = ", ".join(f"{count:,} {name}" for name, count in report.scanned.items())
    _out.print(f"Erased: {erased or 'nothing was there'}.")
    _out.print(f"Searched: {scanned}.")
    if report.references:
        names = ", ".join(f"{name} ({count})" for name, count in report.references.items())
        _out.print(f"Named still, by ID alone: {names}.")
    for line in (*report.problems, *(f"Left: {what}" for what in report.left[:_MOST_SHOWN])):
        _out.print(shown(line, WHOLE), style="red")
    if report.running:
        runs = ", ".join(report.running)
        _out.print(f"Runs that may still write are in progress: {runs}.", style="red")
    if report.complete:
        _out.print(f"Nothing derived from {len(report.purged)} item(s) is left. The original files were not touched.")
    else:
        _out.print("Not complete. Once that is mended or over, run the same command again.", style="red")


def _say(console: Console, text: str) -> None:
    console.print(text, style="dim")
