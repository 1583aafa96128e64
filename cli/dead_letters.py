"""`media-assets dead-letters`: what was set aside, and a fresh start for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from cli import asked, tables
from cli.text import WHOLE, console, shown
from media_assets.library.dead_letters import (
    Chosen,
    DeadLetter,
    Group,
    Rejected,
    dead_letters,
    grouped,
    rejected,
    replay,
)
from resources.errors import printable
from resources.library import Library

_out = console()


def show_dead_letters(library: Library, chosen: Chosen, again: bool, examples: int, as_json: bool) -> None:
    """List or replay. Raises UnknownMedia, and typer.BadParameter for an asset or a class that does not exist."""
    asked.live_items(library, list(chosen.media_ids))
    asked.outcomes(library, list(chosen.assets), list(chosen.error_classes), "--class")
    letters = dead_letters(library, _stages(library), chosen)
    if again:
        count = replay(library, letters)
        print(json.dumps({"replayed": count}) if as_json else _replayed(count))
        return
    groups = grouped(letters, examples)
    # Messages have no item, asset or class: a narrower question does not mean them.
    narrowed = chosen.media_ids or chosen.assets or chosen.error_classes or chosen.changed
    messages = [] if narrowed else rejected(library, examples)
    if as_json:
        document = {"dead_letters": list(map(_group, groups)), "rejected_messages": list(map(_message, messages))}
        print(json.dumps(document))
    else:
        _show(groups, messages)


def _stages(library: Library) -> list[Any]:
    from media_assets.orchestration.grouping import groups

    return [stage for group in groups(library.settings) for stage in group.load(library.settings, library.models)]


def _replayed(count: int) -> str:
    if not count:
        return "No dead letters match; nothing is replayed."
    return f"{count} outcomes get a fresh start. Next: media-assets run, or leave it to the planner."


def _group(group: Group) -> dict[str, Any]:
    return {
        "error_class": group.error_class,
        "asset": group.asset,
        "items": group.items,
        "since": group.since.isoformat(),
        "latest": group.latest.isoformat(),
        "waiting": dict(sorted(group.waiting.items())),
        "examples": [_example(letter) for letter in group.examples],
    }


def _example(letter: DeadLetter) -> dict[str, str]:
    error = printable(letter.error)
    return {"media_id": letter.media_id, "uri": letter.uri, "error": error, "at": letter.at.isoformat()}


def _message(found: Rejected) -> dict[str, Any]:
    return {
        "source": found.source,
        "reason": printable(found.reason),
        "messages": found.messages,
        "since": found.since.isoformat(),
        "latest": found.latest.isoformat(),
        "examples": [{"message_id": key, "body": body} for key, body in found.examples],
    }


def _show(groups: Sequence[Group], messages: Sequence[Rejected]) -> None:
    if not groups and not messages:
        _out.print("No dead letters.")
        return
    if groups:
        names = ("error class", "asset", "items", "since", "latest", "also waiting")
        tables.show(_out, names, map(_row, groups), title="Dead letters", right=("items",))
    for group in groups:
        for letter in group.examples:
            where = f" {shown(group.asset)} of {letter.media_id} ({shown(letter.uri, WHOLE)})"
            _out.print(Text.assemble((group.error_class, "bold"), f"{where}: {shown(letter.error, 400)}"))
    for found in messages:
        told = f"of {shown(found.source)} were not understood since {found.since:%Y-%m-%d %H:%M}"
        _out.print(Text.assemble((f"{found.messages} messages", "bold"), f" {told}: {shown(found.reason, 300)}"))
        for key, body in found.examples:
            _out.print(f"  {shown(key)}: {shown(body, 200)}")
    if groups:
        _out.print("After mending the cause: media-assets dead-letters [--class C] [--asset A] [MEDIA_ID…] --replay")


def _row(group: Group) -> tables.Row:
    times = (f"{moment:%Y-%m-%d %H:%M}" for moment in (group.since, group.latest))
    waiting = ", ".join(f"{count} {asset}" for asset, count in sorted(group.waiting.items()))
    return (group.error_class, group.asset, group.items, *times, waiting)
