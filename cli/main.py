"""`media-assets`: the commands. Imports little; each command imports what it needs when it runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from cli.exit_codes import Exit

if TYPE_CHECKING:
    from resources.library import Library

INTERRUPTS = ("KeyboardInterrupt", "DagsterExecutionInterruptedError")


class Commands(TyperGroup):
    """The commands; an interrupt ends any of them with a sentence instead of the library's own `Aborted!`."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BaseException as error:
            if type(error).__name__ not in INTERRUPTS:
                raise
            return _stop("Interrupted. What is finished is kept; run the same command to go on.", Exit.INTERRUPTED)


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
    " 7 settings · 8 bad query · 130 interrupted.",
)

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="Folder that holds all state.", show_default="$MEDIA_HOME, then ./var", envvar=[]),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout; progress on stderr.")]


def _open(home: Path | None) -> Library:
    from resources.library import Library

    return Library.open(home)


def _console() -> Console:
    return Console(stderr=True)


def warn_root(console: Console) -> None:
    """Who has all rights hands all files to what decodes the media."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        told = "Running as root: a hostile file that takes its decoder over could read every file of this machine."
        console.print(f"{told} Better use a user of its own.", style="yellow", soft_wrap=True, highlight=False)


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
    from cli.report import show_summary
    from cli.run import Work

    library = _open(home)
    console = _console()
    warn_root(console)
    try:
        work = Work(library, console, _assets(select))
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


def _assets(select: str | None) -> list[str]:
    if not select:
        return []
    from cli.run import SPANNING
    from media_assets.schemas import PER_MEDIA

    names = [name.strip() for name in select.split(",") if name.strip()]
    known = [*PER_MEDIA, *SPANNING]
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"no asset {', '.join(unknown)}; there are: {', '.join(known)}", param_hint="--select")
    return names


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
    raise typer.Exit(serve(_open(home), port, console, paths or []))


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

    library = _open(home)
    try:
        parts = migrating.migrate(library, check, _console())
    finally:
        library.close()
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

    library = _open(home)
    try:
        found = show_item(library, media_id, as_json) if media_id else show_status(library, as_json)
    finally:
        library.close()
    if not found:
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

    library = _open(home)
    try:
        if dry_run:
            show_dry_run(library, limit, as_json)
        else:
            show_plan(library, as_json)
    finally:
        library.close()


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
    library = _open(home)
    try:
        count = library.outcomes.reset(media_ids or None, asset or None, error_class or None, finished)
    finally:
        library.close()
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
    from media_assets.dead_letters import Chosen

    library = _open(home)
    try:
        chosen = Chosen(media_ids or (), asset or (), error_class or (), changed)
        found = show_dead_letters(library, chosen, replay, limit, as_json)
    finally:
        library.close()
    if not found:
        raise typer.Exit(Exit.NOTHING_FOUND)


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

    library = _open(home)
    try:
        code = erase(library, media_ids, yes=yes, with_duplicates=with_duplicates, as_json=as_json, console=_console())
    finally:
        library.close()
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

    library = _open(home)
    try:
        response = open_search(library).search(text, limit)
        show_hits(response, as_json)
    finally:
        library.close()
    if not response.hits:
        raise typer.Exit(Exit.NOTHING_FOUND)


@app.command()
def similar(
    media_id: Annotated[str, typer.Argument(help="The item to compare with.", show_default=False)],
    home: HomeOption = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="Hits at most.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Find media that look like one item."""
    from cli.report import show_hits
    from cli.searching import open_search

    library = _open(home)
    try:
        response = open_search(library).similar(media_id, limit)
        show_hits(response, as_json)
    finally:
        library.close()
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
    from resources.views import query as select

    library = _open(home)
    try:
        show_table(select(open_views(library), query), as_json)
    finally:
        library.close()


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

    library = _open(home)
    try:
        show_evals(evaluate_all(library, golden, store_baseline, _console()), as_json)
    finally:
        library.close()


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

    library = _open(home)
    try:
        found = measure(library, tasks or [], seconds, _console())
    finally:
        library.close()
    if as_json:
        print(json.dumps(found))
    else:
        for one in found:
            print(f"{one['asset']}: {one['batch_size']} per call (default {one['default']}), on {one['device']}")


def main() -> None:
    """Entry point: errors that have a remedy are said in one sentence, with the exit code of their family."""
    try:
        app()
    except Exception as error:  # noqa: BLE001 - the outermost place; unknown errors show their traceback
        _explain(error)


def _explain(error: Exception) -> None:
    from pydantic import ValidationError

    from resources.errors import MediaError

    if isinstance(error, ValidationError):
        problems = "; ".join(
            ": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, "))))
            for e in error.errors()
        )
        _stop(f"The settings are wrong: {problems}. Mend settings.toml or the MEDIA_* variables.", Exit.SETTINGS)
    if isinstance(error, MediaError):
        _stop(str(error), _FAMILIES.get(error.code, Exit.INTERNAL))
    raise error


_FAMILIES: dict[str, Exit] = {
    "database_unavailable": Exit.DATABASE,
    "storage_mismatch": Exit.DATABASE,
    "schema_outdated": Exit.DATABASE,
    "schema_newer": Exit.DATABASE,
    "model_unavailable": Exit.MODEL,
    "device_unavailable": Exit.MODEL,
    "bad_query": Exit.QUERY,
    "bad_search": Exit.QUERY,
    "bad_policy": Exit.SETTINGS,
    "bad_needs": Exit.SETTINGS,
    "executor_unavailable": Exit.SETTINGS,
    "tuning_unreadable": Exit.SETTINGS,
    "nothing_to_tune": Exit.NOTHING_FOUND,
}


def _stop(message: str, code: Exit) -> Any:
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
