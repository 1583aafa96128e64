"""`media-assets dead-letters`: what was set aside, and a fresh start for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from cli.text import shown
from media_assets.dead_letters import Chosen, DeadLetter, Group, Rejected, dead_letters, grouped, rejected, replay
from resources.errors import printable
from resources.library import Library

_out = Console()


def show_dead_letters(library: Library, chosen: Chosen, again: bool, examples: int, as_json: bool) -> bool:
    """List or replay; False when one of the media IDs asked for is not registered."""
    known = library.registry.known(list(chosen.media_ids))
    if unknown := [media_id for media_id in chosen.media_ids if media_id not in known]:
        Console(stderr=True).print(f"No media item {shown(', '.join(unknown), 400)}.")
        return False
    letters = dead_letters(library, _stages(library), chosen)
    if again:
        count = replay(library, letters)
        print(json.dumps({"replayed": count}) if as_json else _replayed(count))
        return True
    groups = grouped(letters, examples)
    # Messages have no item, asset or class: a narrower question does not mean them.
    narrowed = chosen.media_ids or chosen.assets or chosen.error_classes or chosen.changed
    messages = [] if narrowed else rejected(library, examples)
    if as_json:
        document = {"dead_letters": list(map(_group, groups)), "rejected_messages": list(map(_message, messages))}
        print(json.dumps(document))
    else:
        _show(groups, messages)
    return True


def _stages(library: Library) -> list[Any]:
    from media_assets.grouping import groups

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
        table = Table(title="Dead letters", title_justify="left")
        for name in ("error class", "asset", "items", "since", "latest", "also waiting"):
            table.add_column(name, justify="right" if name == "items" else "left", overflow="fold")
        for group in groups:
            waiting = ", ".join(f"{count} {asset}" for asset, count in sorted(group.waiting.items()))
            times = (f"{moment:%Y-%m-%d %H:%M}" for moment in (group.since, group.latest))
            table.add_row(shown(group.error_class), shown(group.asset), str(group.items), *times, shown(waiting, 400))
        _out.print(table)
    for group in groups:
        for letter in group.examples:
            where = f"[bold]{shown(group.error_class)}[/bold] {shown(group.asset)} of {shown(letter.media_id)}"
            _out.print(f"{where} ({shown(letter.uri, 200)}): {shown(letter.error, 400)}", highlight=False)
    for found in messages:
        _out.print(
            f"[bold]{found.messages} messages[/bold] of {shown(found.source)} were not understood since"
            f" {found.since:%Y-%m-%d %H:%M}: {shown(found.reason, 300)}",
            highlight=False,
        )
        for key, body in found.examples:
            _out.print(f"  {shown(key)}: {shown(body, 200)}", highlight=False)
    if groups:
        _out.print("After mending the cause: media-assets dead-letters [--class C] [--asset A] [MEDIA_ID…] --replay")
