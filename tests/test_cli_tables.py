"""What commands print: values as they are, whole names, tables where they fit, records where not, lines in a pipe."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pytest

from cli import tables
from cli.report import show_hits, show_table
from cli.run import Work
from cli.text import console
from media_assets import schemas
from media_assets.engine.contract import MediaItem
from resources.errors import Failure
from resources.ingest.uploads import Upload
from resources.library import Library
from resources.records.outcome import Claim, Cost
from search.engine import Hit, SearchResponse
from tests.commands import Commands
from tests.shelf import finish, put, register

NAMES = ("media_id", "text")
TRICKY = ":x: [bold]loud[/bold] [/] :smile:"
LONG = "/media/" + "a long folder/" * 12 + "the film.mp4"


class Terminal(io.StringIO):
    """A stdout that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def on_terminal(rows: list[tables.Row], width: int, names: tuple[str, ...] = NAMES) -> list[str]:
    """Lines that a terminal of this width shows, without colours."""
    out = console()
    out.file, out.width, out.no_color = Terminal(), width, True
    out._color_system = None
    tables.show(out, names, rows)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue().splitlines()


def piped(rows: list[tables.Row], names: tuple[str, ...] = NAMES) -> str:
    out = console()
    out.file = io.StringIO()
    tables.show(out, names, rows, title="", right=("text",))
    return out.file.getvalue()


@pytest.fixture
def call(library: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(library.settings.home, monkeypatch, capsys)


def test_a_table_that_fits_is_one() -> None:
    """Given rows that fit 80 columns, then a terminal shows a table with the values as they are."""
    lines = on_terminal([("a-1", TRICKY)], 80)
    assert lines[0].startswith("┏")
    assert f"│ a-1      │ {TRICKY} │" in lines
    assert {len(line) for line in lines} == {len(lines[0])}


def test_a_table_that_does_not_fit_is_records() -> None:
    """Given a row wider than the terminal, then each row is a block of `name: value`, each value whole."""
    assert on_terminal([("a-1", LONG), ("b-2", None)], 80) == [
        "media_id: a-1",
        f"text: {LONG}",
        "",
        "media_id: b-2",
        "text:",
    ]


def test_the_width_decides() -> None:
    """Given a row, then the narrowest terminal that shows it as a table is exactly as wide as the table."""
    rows: list[tables.Row] = [("a-1", "some words that say something")]
    needed = len(on_terminal(rows, 200)[0])
    assert on_terminal(rows, needed)[0].startswith("┏")
    assert on_terminal(rows, needed - 1)[0] == "media_id: a-1"


def test_wide_characters_count_twice() -> None:
    """Given a text of characters two columns wide, then a table that would not fit is not drawn."""
    assert on_terminal([("a", "名" * 40)], 80)[0] == "media_id: a"


def test_a_pipe_gets_lines_with_tabs() -> None:
    """Given a stdout that is no terminal, then rows are lines, whole, with what would break them escaped."""
    odd = "a\tb\nc\\d \x1b[31m \u202e é"
    assert piped([("a-1", odd), ("b-2", None), ("c-3", LONG * 20), (TRICKY, 1.5)]) == (
        f"media_id\ttext\na-1\ta\\tb\\nc\\\\d \\x1b[31m \\u202e é\nb-2\t\nc-3\t{LONG * 20}\n{TRICKY}\t1.5\n"
    )


def test_colours_that_are_forced_change_no_line_of_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given FORCE_COLOR, as in many a CI, then what goes to a pipe is lines all the same."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert piped([("a-1", "x")]) == "media_id\ttext\na-1\tx\n"


def test_sql_prints_values_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Given values that look like markup or emoji, two columns of one name, and nulls, then all are as they are."""
    table = pa.Table.from_arrays([pa.array([TRICKY, None]), pa.array([1, 2])], names=["[red]n", "[red]n"])
    show_table(table, as_json=False)
    assert capsys.readouterr().out == f"[red]n\t[red]n\n{TRICKY}\t1\n\t2\n"


def hit(uri: str, media_id: str = "film-mp4-1") -> Hit:
    return Hit(media_id, uri, "video", "frame", 1.0, 2.5, 0.04, 0.7, TRICKY, "words in transcript: cat")


def test_a_hit_shows_its_media_id_and_its_whole_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Given a hit in a file of a long name that looks like markup, then ID, name and text are whole."""
    name = "[b] :x: " + "x" * 200 + ".mp4"
    show_hits(SearchResponse("cat", (hit(f"/media/{name}"),), 0.1, 1, ("one shard was left out",)), as_json=False)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "score\twhen\tunit\tmedia_id\tfile\twhy",
        f"0.040\t0:01.0–0:02.5\tframe\tfilm-mp4-1\t{name}\twords in transcript: cat: {TRICKY}",
    ]
    assert printed.err == "one shard was left out\n"


def test_nothing_found_is_no_row(capsys: pytest.CaptureFixture[str]) -> None:
    """Given no hits, then stdout stays empty for whoever counts lines."""
    show_hits(SearchResponse("cat", (), 0.1, 1), as_json=False)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "Nothing found.\n")


def failed(library: Library, name: str, error: str) -> str:
    """An upload whose `media` did not decode."""
    media_id = register(library, name)
    with library.outcomes.lease("run") as lease:
        claim = library.outcomes.claim(media_id, "media", "v1", "run", lease.liveness)
        assert isinstance(claim, Claim)
        library.outcomes.fail(claim, Failure("undecodable", error, retryable=False), Cost())
    return media_id


def test_names_and_errors_of_strangers_are_printed_as_they_are(
    library: Library, call: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a file name and an error that look like markup, then status, the list of dead letters, the question of
    purge and the end of a run show them as they are."""
    name = f"{TRICKY.replace('/', '-')}.mp4"
    media_id = failed(library, name, TRICKY)
    assert f"{media_id}  /shelf/{name}\n" in call("status", media_id).out
    assert f"undecodable: {TRICKY}\n" in call("status", media_id).out
    assert f"undecodable media of {media_id} (/shelf/{name}): {TRICKY}\n" in call("dead-letters").out
    assert f"{media_id} (live): /shelf/{name}\n" in call("purge", media_id).err
    monkeypatch.setattr(Work, "_process", lambda *_: None)
    assert f"\nquarantined media of {name} (undecodable): {TRICKY}\n" in call("run", "--select", "media").out


def test_what_the_planner_did_is_printed_as_it_is(library: Library, call: Commands) -> None:
    """Given a note and a batch of the planner, then `plan` prints them whole, with the whole run ID."""
    register(library, "a.mp4")
    library.backlog.note([TRICKY])
    batch, _ = library.backlog.create("decode", "image", [], 1.0, TRICKY)
    run_id = "6b47278d-0000-4000-8000-000000000000"
    library.backlog.ended(batch, "finished", 0.0, run_id)
    printed = call("plan").out
    assert f"\n  {TRICKY}\n" in printed
    assert f"{batch}\tdecode\tfinished\t0\t{TRICKY}\t{run_id}\n" in printed


def test_a_path_that_cannot_be_read_is_printed_whole(library: Library, call: Commands) -> None:
    """Given a path of 600 characters that is not there, then the summary names it whole."""
    path = "/nowhere/" + "[x]" * 200
    assert f"not read: {path}: No such file or directory\n" in call("run", path).out


def test_items_in_flight_elsewhere_are_no_failures(library: Library) -> None:
    """Given an item that another living run works on and one whose run died, then the first is said to be in flight,
    and neither is a failure."""
    here, left = (register(library, name) for name in ("here.mp4", "left.mp4"))
    with library.outcomes.lease("gone") as lease:
        library.outcomes.claim(left, "media", "v1", "gone", lease.liveness)
    work = Work(library, console(stderr=True), ["media"])
    items = [MediaItem(row["media_id"], row["uri"], row["etag"]) for row in library.registry.live()]
    with library.outcomes.lease("elsewhere") as lease:
        library.outcomes.claim(here, "media", "v1", "elsewhere", lease.liveness)
        work._account(items)
        assert work.summary.json()["failures"] == []
        assert work.summary.json()["in_flight"] == [{"media_id": here, "asset": "media", "run_id": "elsewhere"}]
        assert work.summary.outcomes == {"media": {"running": 2}}


def test_items_in_flight_elsewhere_are_said_in_a_line(
    library: Library, call: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given items that another living run works on, when a run is over, then it says so, and --strict is content."""
    ids = [register(library, name) for name in ("a.mp4", "b.mp4")]
    monkeypatch.setattr(Work, "_process", lambda *_: None)
    monkeypatch.setattr(Work, "_rebuild", lambda *_: None)
    with library.outcomes.lease("elsewhere") as lease:
        for media_id in ids:
            for asset in ("media", "frames"):
                library.outcomes.claim(media_id, asset, "v1", "elsewhere", lease.liveness)
        done = call("run", "--strict")
        assert done.code == 0
        assert "2 items are in flight in another process (run elsewhere)" in done.out
        assert "None" not in done.out
        document = json.loads(call("run", "--json").out)
    assert len(document["in_flight"]) == 4
    assert document["failures"] == []


def test_a_caption_comes_out_of_sql_as_it_went_in(library: Library, call: Commands) -> None:
    """Given a transcript that looks like markup and emoji, then `sql` prints it as it is."""
    media_id = put(library, "a.mp3", "harbour")
    base = {"media_id": media_id, "version": "v1", "start_s": 0.0, "end_s": 1.0, "segment": 0, "text": TRICKY}
    said = base | {"language": "en", "confidence": 0.9, "words": [], "timing": "none", "model": "asr@1"}
    library.outcomes.reset([media_id], ["transcript"], finished=True)
    finish(library, media_id, "transcript", schemas.table(schemas.TRANSCRIPT, [said]))
    done = call("sql", "select media_id, text from transcript")
    assert done.out == f"media_id\ttext\n{media_id}\t{TRICKY}\n"


def test_ids_are_listed_where_the_remedy_says(library: Library, call: Commands) -> None:
    """Given an unknown ID in `similar`, then the command that its remedy proposes runs and lists the IDs there are."""
    media_id = put(library, "a.mp3", "harbour")
    assert library.registry.live([media_id])[0]["uri"] == Upload("/shelf/a.mp3", "1", 1, None).uri
    remedy = call("similar", "nobody").err
    query = remedy.split('media-assets sql "', 1)[1].split('"', 1)[0]
    assert call("sql", query).out == f"media_id\turi\n{media_id}\t/shelf/a.mp3\n"
