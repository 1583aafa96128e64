"""`media-assets plan`: what the planner decided last, and what it would run."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING

from cli import tables
from cli.text import console
from resources.library import Library

if TYPE_CHECKING:
    from jobs.planner import Batch

_out = console()


def show_plan(library: Library, as_json: bool) -> None:
    """The planner's last decisions and the newest batches."""
    notes = library.backlog.notes()
    batches = library.backlog.recent_batches(20)
    if as_json:
        decided = {"at": notes[0], "decisions": notes[1]} if notes else None
        print(json.dumps({"last_tick": decided, "batches": [asdict(batch) for batch in batches]}, default=str))
        return
    show_notes(library)
    if not batches:
        return
    names = ("batch", "group", "state", "items", "reason", "run")
    rows = [(batch.id, batch.group, batch.state, batch.items, batch.reason, batch.run_id) for batch in batches]
    tables.show(_out, names, rows, title="Newest batches", right=("batch", "items"))


def show_notes(library: Library) -> None:
    """What the planner said on its last tick."""
    notes = library.backlog.notes()
    if notes is None:
        _out.print("The planner has not run yet; it runs within: media-assets dev", style="dim")
        return
    _out.print(f"The planner, {notes[0]:%Y-%m-%d %H:%M:%S %Z}:", style="bold")
    for line in notes[1]:
        _out.print(f"  {line}")


def show_dry_run(library: Library, limit: int, as_json: bool) -> None:
    """Batches by group and lane, with the work and the price past outcomes let expect."""
    from jobs.planner import Planner

    tick = Planner(library).dry_run(limit)
    if as_json:
        batches = [
            {"group": b.group, "lane": b.lane, "items": len(b.keys), "seconds": b.seconds, "reason": b.reason}
            for b in tick.batches
        ]
        hours = sum(batch.seconds for batch in tick.batches) / 3600
        price = hours * library.settings.planner.price_per_hour
        print(json.dumps({"looked_at": tick.looked_at, "batches": batches, "hours": hours, "price": price}))
        return
    if not tick.batches:
        _out.print(f"Nothing to run: looked at {tick.looked_at} unsettled uploads.")
        return
    _show_batches(library, tick.batches)
    _out.print(
        "Uploads go through decode, analyse and label one after the other: what follows a group is planned when it is"
        " through. Work is in seconds of one run on this kind of machine.",
        style="dim",
    )


def _show_batches(library: Library, batches: list[Batch]) -> None:
    by_lane: dict[tuple[str, str], list[Batch]] = defaultdict(list)
    for batch in batches:
        by_lane[batch.group, batch.lane].append(batch)
    price = library.settings.planner.price_per_hour
    rows: list[tables.Row] = []
    for (group, lane), members in by_lane.items():
        seconds = sum(batch.seconds for batch in members)
        cost = f"{seconds / 3600 * price:.2f}" if price else "–"
        items = sum(len(batch.keys) for batch in members)
        rows.append((group, lane, len(members), items, f"{seconds:.0f} s", cost))
    names = ("group", "lane", "runs", "items", "work", "price")
    tables.show(_out, names, rows, title="Would run", right=names[2:])
