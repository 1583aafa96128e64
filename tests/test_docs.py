"""The documentation against the code: what the code offers stands in the docs, and what the docs say is still there."""

from __future__ import annotations

import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from cli.exit_codes import Exit
from cli.main import app
from cli.run import SPANNING
from evals.evaluate import EVALS
from media_assets import schemas
from resources import errors
from resources.files.derived import DerivedStore
from resources.files.views import OUTCOMES, connect, outcomes_table, query
from resources.models.registry import CATALOGUE, ROUTES
from resources.models.screens import SCREENS
from resources.records import outcomes
from resources.settings import Settings

PROJECT = Path(__file__).parents[1]
README = PROJECT / "README.md"
DOCS = PROJECT / "docs"
PAGES = [README, PROJECT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
OF_RUNS = errors.DatabaseUnavailable  # no item ends in it
ERRORS = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.MediaError) and kind not in (errors.MediaError, OF_RUNS)
}


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, default) of every setting."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.default


def table_row(page: Path, first_cell: str) -> list[str]:
    """Cells of the one table row of `page` that begins with `first_cell`."""
    rows = [line for line in page.read_text().splitlines() if line.startswith(f"| `{first_cell}` |")]
    assert len(rows) == 1, f"{first_cell}: {len(rows)} rows in {page.name}"
    return [cell.strip() for cell in rows[0].strip("|").split(" | ")]


def section(page: Path, title: str) -> str:
    """Text below the heading `title`, up to the next heading of any level."""
    parts = re.split(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    found = [text for heading, text in zip(parts[1::2], parts[2::2], strict=True) if heading == title]
    assert len(found) == 1, f"{title}: {len(found)} sections in {page.name}"
    return found[0]


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("name", "default"), list(fields(Settings)))
def test_every_setting_stands_in_the_reference(name: str, default: object) -> None:
    """Given a setting, then its row has its variable and its default."""
    row = table_row(DOCS / "settings.md", name)
    assert row[1] == f"`MEDIA_{name.upper().replace('.', '__')}`"
    if default is PydanticUndefined:  # follows the machine, which words must say
        assert row[2].startswith("one per core")
    else:
        assert row[2] == ("none" if default in (None, ()) else f"`{default}`")


def test_no_setting_is_documented_that_does_not_exist() -> None:
    """Given the rows of the reference that name a variable of a setting, then each is a setting."""
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| `MEDIA_", (DOCS / "settings.md").read_text(), flags=re.MULTILINE)
    assert set(rows) == {name for name, _ in fields(Settings)}


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_every_error_class_stands_in_the_runbook(code: str) -> None:
    """Given an error class, then the runbook says truly whether a retry helps, and what to do."""
    row = table_row(DOCS / "operations.md", code)
    expected = {True: "yes", False: "no"}[ERRORS[code].retryable]
    assert row[2] == ("as the input" if code == "upstream_failed" else expected)
    assert row[3]


@pytest.mark.parametrize("asset", [*schemas.PER_MEDIA, *SPANNING, *(f"evals/{name}" for name in EVALS)])
def test_every_asset_stands_in_the_readme_and_the_concepts(asset: str) -> None:
    """Given an asset, then both pages name it."""
    assert asset in README.read_text()
    assert asset in (DOCS / "concepts.md").read_text()


@pytest.mark.parametrize("asset", list(schemas.PER_MEDIA))
def test_every_column_stands_in_the_concepts(asset: str) -> None:
    """Given a per-media table and its side tables, then the section of the asset explains every column."""
    text = section(DOCS / "concepts.md", asset)
    tables = [schemas.PER_MEDIA[asset], *schemas.SIDES.get(asset, {}).values()]
    for name in {name for table in tables for name in table.names} - {"media_id", "version"}:
        assert f"| `{name}` |" in text, name
    for side in schemas.SIDES.get(asset, {}):
        assert f"Side table `{side}`" in text


def test_every_column_of_outcomes_and_duplicates_stands_in_the_concepts() -> None:
    """Given the two views that are no per-media tables, then their columns are explained."""
    for name in OUTCOMES.names:
        assert f"`{name}`" in section(DOCS / "concepts.md", "The outcome record"), name
    for name in schemas.NEAR_DUPLICATES.names:
        assert f"| `{name}` |" in section(DOCS / "concepts.md", "near_duplicates"), name


def test_the_transitions_are_those_of_the_code() -> None:
    """Given the transition table in resources/records/outcomes.py, then the concepts show the same one."""
    found = re.search(r"(?:^    \S.*\n)+", outcomes.__doc__ or "", flags=re.MULTILINE)
    assert found
    table = textwrap.dedent(found[0]).strip()
    assert table.count("\n") >= 5
    assert table in (DOCS / "concepts.md").read_text()


def test_every_model_stands_in_the_model_page() -> None:
    """Given the catalogue of models, then each has a row with its licence in the section of its profile."""
    page = DOCS / "models.md"
    titles = {"offline": "Profile `offline` (default)", "gpu": "Profile `gpu`"}
    for profile, tasks in tomllib.loads(CATALOGUE.read_text()).items():
        rows = [line for line in section(page, titles[profile]).splitlines() if line.startswith("| `")]
        for task, models in tasks.items():
            for model in models if task not in (ROUTES, SCREENS) else ():
                mine = [row for row in rows if row.startswith(f"| `{task}`") and f"`{model['name']}`" in row]
                assert len(mine) == 1, (profile, task, model["name"])
                assert mine[0].rstrip(" |").endswith(model["licence"])


def test_every_option_and_exit_code_stands_in_the_command_line_page() -> None:
    """Given the commands, then each section names its options, and the table every exit code."""
    page = (DOCS / "command-line.md").read_text()
    sections = {text.split()[1].rstrip("`"): text for text in re.split(r"^## `", page, flags=re.MULTILINE)[1:]}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for option in (opt for parameter in command.params for opt in parameter.opts if opt.startswith("--")):
            assert f"`{option}" in sections[name], f"{name} {option}"
    for code in Exit:
        assert f"| {int(code)} | `{code.name}` |" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_relative_links_resolve(page: Path) -> None:
    """Given a page, then the files and headings it links to exist."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


def test_every_decision_stands_in_their_list() -> None:
    """Given the decision records, then the list links each, and each says what was asked, chosen and rejected."""
    folder = DOCS / "decisions"
    listed = (folder / "README.md").read_text()
    for page in sorted(folder.glob("[0-9]*.md")):
        assert f"({page.name})" in listed
        for part in ("**Question.**", "**Choice.**", "**Rejected.**", "**Look again**"):
            assert part in page.read_text(), f"{page.name}: {part}"


def code_blocks(page: Path) -> list[str]:
    """Contents of the fenced blocks of a page."""
    return re.findall(r"^ *```\w*\n(.*?)^ *```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def shown_queries() -> list[str]:
    """The argument of every `media-assets sql` line in code blocks of the pages."""
    lines = [
        line.strip().split("  #")[0] for page in PAGES for block in code_blocks(page) for line in block.splitlines()
    ]
    return [shlex.split(line)[2] for line in lines if line.startswith("media-assets sql ")]


def test_the_sql_of_the_docs_runs(tmp_path: Path) -> None:
    """Given the queries shown to users, then each runs against the views of an empty library."""
    queries = shown_queries()
    assert len(queries) >= 10
    views = connect(
        DerivedStore(tmp_path), outcomes_table([]), schemas.PER_MEDIA, schemas.NEAR_DUPLICATES, registered=[]
    )
    for text in queries:
        assert query(views, text).column_names, text
