"""`media-assets`: the commands. Imports little; each command imports what it needs when it runs."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cli.errors import Commands, explained, flush, stop
from cli.exit_codes import Exit
from cli.home import HomeOption, open_library, opened
from cli.text import console as plain_console

app = typer.Typer(
    name="media-assets",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Turn media files into derived, checked, searchable assets.\n\n"
    "Start with [bold]media-assets run FOLDER[/bold], then [bold]search[/bold], [bold]sql[/bold], [bold]status[/bold],"
    " and [bold]dev[/bold] for the Dagster UI.",
    epilog="Exit codes: 0 done · 2 usage · 3 items failed (run --strict) · 4 nothing found · 5 database · 6 model ·"
    " 7 settings · 8 bad query · 9 storage · 130 interrupted.",
)


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; progress on stderr.")]


def _console() -> Console:
    return plain_console(stderr=True)


def warn_root(console: Console) -> None:
    """Who has all rights hands all files to what decodes the media."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        told = "Running as root: a hostile file that takes its decoder over could read every file of this machine."
        console.print(f"{told} Better use a user of its own.", style="yellow")


@app.command()
def run(
    paths: Annotated[
        list[str] | None,
        typer.Argument(help="Files, folders or URLs (s3://…); none: all that is registered.", show_default=False),
    ] = None,
    home: HomeOption = None,
    select: Annotated[
        str | None, typer.Option("--select", help="Only these assets, comma-separated; inputs must exist.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 3 when an item ended in an error.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Register media and materialize everything pending for them.

    Finished items are not computed again; a run that was interrupted goes on where it was. Bad files end
    as one outcome each, and never stop the others.

    Example: [bold]media-assets run ./samples[/bold]
    """
    from cli.asked import selected
    from cli.report import show_summary
    from cli.run import Work

    library = open_library(home)
    console = _console()
    warn_root(console)
    try:
        work = Work(library, console, selected(select))
        summary = work.run(paths or [])
        if as_json:
            print(json.dumps(summary.json(), default=str))
        else:
            show_summary(library, summary)
    finally:
        library.close()
    if paths and not summary.items:
        raise typer.Exit(Exit.NOTHING_FOUND)
    if strict and (summary.failures or summary.problems):
        raise typer.Exit(Exit.ITEMS_FAILED)


@app.command()
def dev(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders to watch, besides those of the setting ingestion.folders.",
            exists=True,
            file_okay=False,
            show_default=False,
        ),
    ] = None,
    home: HomeOption = None,
    port: Annotated[int, typer.Option(help="Port of the Dagster UI on loopback.")] = 3000,
) -> None:
    """Run the Dagster UI, daemon and embedded Postgres on this machine until interrupted.

    Files in the watched folders are registered as they come, change and go.

    Example: [bold]media-assets dev ./samples --port 3000[/bold], then open http://127.0.0.1:3000
    """
    from cli.dev import serve

    console = _console()
    warn_root(console)
    raise typer.Exit(serve(open_library(home), port, console, paths or []))


@app.command()
def migrate(
    home: HomeOption = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say what there is to upgrade; exit 5 if there is something.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring the tables of this project and of Dagster up to date, after an upgrade of either.

    An embedded database's own tables upgrade by themselves; those of MEDIA_DATABASE_URL only by this command.
    """
    from cli import migrating

    with opened(home) as library:
        parts = migrating.migrate(library, check, _console())
    if as_json:
        print(json.dumps(migrating.as_json(parts)))
    else:
        print("\n".join(migrating.told(part, check) for part in parts))
    if check and any(part.pending for part in parts):
        raise typer.Exit(Exit.DATABASE)


@app.command()
def status(
    media_id: Annotated[str | None, typer.Argument(help="One media item in full.", show_default=False)] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say how many items each asset has, what failed and why; or everything about one item."""
    from cli.report import show_item, show_status

    with opened(home) as library:
        if media_id is not None:
            show_item(library, media_id, as_json)
        elif not show_status(library, as_json):
            raise typer.Exit(Exit.NOTHING_FOUND)


@app.command()
def plan(
    home: HomeOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Judge the backlog now and show what would run; changes nothing.")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Unsettled items a dry run looks at.")] = 100_000,
    as_json: JsonOption = False,
) -> None:
    """Say what the planner decided last and what is in flight; or what it would run, for how long.

    Example: [bold]media-assets plan --dry-run[/bold]
    """
    from cli.planning import show_dry_run, show_plan

    with opened(home) as library:
        if dry_run:
            show_dry_run(library, limit, as_json)
        else:
            show_plan(library, as_json)


@app.command()
def retry(
    media_ids: Annotated[list[str] | None, typer.Argument(help="Only these items.", show_default=False)] = None,
    home: HomeOption = None,
    asset: Annotated[list[str] | None, typer.Option("--asset", help="Only this asset; repeatable.")] = None,
    error_class: Annotated[
        list[str] | None, typer.Option("--error-class", help="Only this error class; repeatable.")
    ] = None,
    finished: Annotated[
        bool, typer.Option("--finished", help="Finished items too: make them again. Needs an item or --asset.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Give failed items a fresh start; the next [bold]run[/bold] works on them."""
    if finished and not (media_ids or asset):
        raise typer.BadParameter("say which: name an item or an --asset", param_hint="--finished")
    from cli import asked

    with opened(home) as library:
        asked.live_items(library, media_ids or ())
        asked.outcomes(library, asset or (), error_class or (), "--error-class")
        count = library.outcomes.reset(media_ids or None, asset or None, error_class or None, finished)
    if as_json:
        print(json.dumps({"reset": count}))
    else:
        print(f"{count} outcomes will be made again. Next: media-assets run")


@app.command("dead-letters")
def dead_letters(
    media_ids: Annotated[list[str] | None, typer.Argument(help="Only these items.", show_default=False)] = None,
    home: HomeOption = None,
    asset: Annotated[list[str] | None, typer.Option("--asset", help="Only this asset; repeatable.")] = None,
    error_class: Annotated[list[str] | None, typer.Option("--class", help="Only this error class; repeatable.")] = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only those whose code, model or input has changed since.")
    ] = False,
    replay: Annotated[bool, typer.Option("--replay", help="Give them a fresh start instead of listing them.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="Examples per group at most.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """List what was set aside, by error class and asset, and messages nobody understood; or replay it.

    Example: [bold]media-assets dead-letters --class timeout --replay[/bold], after mending the cause
    """
    from cli.dead_letters import show_dead_letters
    from media_assets.library.dead_letters import Chosen

    with opened(home) as library:
        chosen = Chosen(media_ids or (), asset or (), error_class or (), changed)
        show_dead_letters(library, chosen, replay, limit, as_json)


@app.command()
def purge(
    media_ids: Annotated[list[str], typer.Argument(help="The items, in whatever state.", show_default=False)],
    home: HomeOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    with_duplicates: Annotated[
        bool, typer.Option("--with-duplicates", help="Other uploads of the same bytes too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Erase every derived byte of items, prove it, and never take these versions in again.

    The original files are not touched. Exits 3 when something is left; run it again then.
    """
    from cli.purging import purge as erase

    with opened(home) as library:
        code = erase(library, media_ids, yes=yes, with_duplicates=with_duplicates, as_json=as_json, console=_console())
    if code:
        raise typer.Exit(code)


@app.command()
def search(
    text: Annotated[str, typer.Argument(help="What to look for, in words.", show_default=False)],
    home: HomeOption = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="Hits at most.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Find moments by meaning and by word, across pictures, speech and on-screen text.

    Example: [bold]media-assets search "an astronaut" --limit 5[/bold]
    """
    from cli.report import show_hits
    from cli.searching import open_search

    with opened(home) as library:
        response = open_search(library).search(text, limit)
        show_hits(response, as_json)
    if not response.hits:
        raise typer.Exit(Exit.NOTHING_FOUND)


@app.command()
def similar(
    media_id: Annotated[
        str, typer.Argument(help="The item to compare with: its media ID, as `search` shows it.", show_default=False)
    ],
    home: HomeOption = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="Hits at most.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Find media that look like one item.

    Example: [bold]media-assets similar MEDIA_ID[/bold], with an ID that [bold]search[/bold] shows
    """
    from cli import asked
    from cli.report import show_hits
    from cli.searching import open_search

    with opened(home) as library:
        asked.live_items(library, [media_id])
        response = open_search(library).similar(media_id, limit)
        show_hits(response, as_json)
    if not response.hits:
        raise typer.Exit(Exit.NOTHING_FOUND)


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="One select statement.", show_default=False)],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Query the views: one per asset, and `outcomes`. Read-only.

    Example: [bold]media-assets sql "select kind, count(*) from media group by 1"[/bold]
    """
    from cli.report import show_table
    from cli.searching import open_views
    from resources.files.views import query as select

    with opened(home) as library:
        show_table(select(open_views(library), query), as_json)


@app.command()
def evaluate(
    golden: Annotated[
        str | None, typer.Argument(help="Folder of the golden set.", show_default="$MEDIA_GOLDEN, then ./samples")
    ] = None,
    home: HomeOption = None,
    store_baseline: Annotated[
        bool, typer.Option("--store-baseline", help="Make these figures the baseline of the checks.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the models against a golden set whose media have been processed.

    Example: [bold]media-assets run ./samples && media-assets evaluate ./samples[/bold]
    """
    from cli.evaluating import evaluate_all
    from cli.report import show_evals

    with opened(home) as library:
        show_evals(evaluate_all(library, golden, store_baseline, _console()), as_json)


@app.command()
def tune(
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Tasks of models.toml, such as ocr.", show_default="all")
    ] = None,
    home: HomeOption = None,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="About how long each asset may take.")] = 120.0,
    as_json: JsonOption = False,
) -> None:
    """Find the micro-batch that is fastest on this machine, on the library's own media, and use it from now on.

    Example: [bold]media-assets tune asr ocr[/bold]
    """
    from cli.tuning import tune as measure

    with opened(home) as library:
        found = measure(library, tasks or [], seconds, _console())
    if as_json:
        print(json.dumps(found))
    else:
        for one in found:
            print(f"{one['asset']}: {one['batch_size']} per call (default {one['default']}), on {one['device']}")


def main() -> None:
    """Entry point: errors that have a remedy are said in one sentence, with the exit code of their family."""
    with suppress(AttributeError):  # not a stream of Python's own
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            app()
        finally:
            flush()
    except Exception as error:  # the outermost place; a defect shows its traceback
        told = explained(error)
        if told is None:
            raise
        stop(*told)


if __name__ == "__main__":
    main()
