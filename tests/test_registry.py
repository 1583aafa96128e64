"""Media IDs, discovery of files whatever they are called, and the registry."""

from __future__ import annotations

import itertools
import os
import re
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from resources.ingest.discovery import Problem, discover
from resources.ingest.registry import CHANGES, Registry
from resources.ingest.uploads import Removal, Upload, local_path, media_id, uri_of
from resources.library import Library
from resources.records.database import Database, StorageMismatch
from resources.settings import Settings


def uploads(*paths: Path) -> list[Upload]:
    """What discovery finds, problems left out."""
    return [found for found in discover(paths) if isinstance(found, Upload)]


@given(st.text(min_size=1).filter(lambda text: text.isprintable()), st.text(max_size=20))
def test_media_ids_are_safe_whatever_the_name(uri: str, etag: str) -> None:
    """Given any URI and etag, then the ID has only [a-z0-9-], a bounded length and is stable."""
    made = media_id(uri, etag)
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*-[0-9a-f]{12}", made)
    assert len(made) <= 53
    assert made == media_id(uri, etag)


@given(st.binary(min_size=1, max_size=60).filter(lambda name: b"/" not in name and b"\0" not in name))
def test_a_uri_leads_back_to_the_same_bytes(name: bytes) -> None:
    """Given any file name a Linux file system takes, then its URI is valid text and names the same path."""
    path = b"/media/" + name
    uri = uri_of(os.fsdecode(path))
    uri.encode()
    found = local_path(uri)
    assert found is not None
    assert os.fsencode(found) == os.path.abspath(path)


def test_odd_names_are_found_once_each(tmp_path: Path) -> None:
    """Given names with newlines, quotes, wrong encodings and other scripts, then each is found with its own ID."""
    names = [b"plain.mp4", b"a\nnewline.mp4", b"caf\xe9.mp4", "日本語 名前.mp4".encode(), b"quo'te\".mp4", b"-rf.mp4"]
    for name in names:
        (Path(os.fsdecode(bytes(tmp_path) + b"/" + name))).write_bytes(b"x")
    (tmp_path / ".hidden").write_bytes(b"x")
    found = uploads(tmp_path)
    assert {os.fsencode(local_path(upload.uri) or "").rsplit(b"/", 1)[-1] for upload in found} == set(names)
    assert len({upload.media_id for upload in found}) == len(names)


def test_loops_and_missing_folders_do_not_stop_discovery(tmp_path: Path) -> None:
    """Given a symlink loop, a dangling link and a missing folder, then the good file is found and they are told."""
    (tmp_path / "good.txt").write_text("hello")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    found = list(discover([tmp_path, tmp_path / "gone"]))
    assert [Path(upload.uri).name for upload in found if isinstance(upload, Upload)] == ["good.txt"]
    problems = {Path(problem.path).name: problem.reason for problem in found if isinstance(problem, Problem)}
    assert set(problems) == {"dangling", "gone", "pipe"}
    assert problems["gone"] == "No such file or directory"


def test_links_that_lead_out_of_a_folder_are_told_and_not_followed(tmp_path: Path) -> None:
    """Given links out of a folder, to a file, a folder and by a detour, then they are problems unless the setting says
    otherwise; links within it and what is named itself are followed."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "real").mkdir(parents=True)
    outside.mkdir()
    (tmp_path / "inside-not").mkdir()
    for path in (inside / "real" / "a.txt", outside / "secret.txt", tmp_path / "inside-not" / "near.txt"):
        path.write_text("words")
    (inside / "file").symlink_to(outside / "secret.txt")
    (inside / "folder").symlink_to(outside)
    (inside / "near").symlink_to(tmp_path / "inside-not")
    (inside / "real" / "up").symlink_to("../../outside/secret.txt")
    (inside / "kept.txt").symlink_to(inside / "real" / "a.txt")

    def found(path: Path, follow_links: bool = False) -> tuple[set[str], set[str]]:
        entries = list(discover([path], follow_links=follow_links))
        uris = {str(Path(entry.uri).relative_to(tmp_path)) for entry in entries if isinstance(entry, Upload)}
        return uris, {str(Path(e.path).relative_to(tmp_path)) for e in entries if isinstance(e, Problem)}

    within = {"inside/kept.txt", "inside/real/a.txt"}
    out = {"inside/file", "inside/folder", "inside/near", "inside/real/up"}
    assert found(inside) == (within, out)
    (problem,) = [e for e in discover([inside / "real"]) if isinstance(e, Problem)]
    assert "ingestion.follow_links" in problem.reason
    followed = {"inside/file", "inside/folder/secret.txt", "inside/near/near.txt", "inside/real/up"}
    assert found(inside, follow_links=True) == (within | followed, set())
    assert found(inside / "file") == ({"inside/file"}, set())
    assert found(inside / "folder") == ({"inside/folder/secret.txt"}, set())


def test_remote_folders_are_listed_through_fsspec() -> None:
    """Given files on another file system, then they are found under their URLs; a bucket that is gone is a problem."""
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/listing/a clip.mp4", b"12345")
    (found,) = list(discover(["memory://listing"]))
    assert isinstance(found, Upload)
    assert (found.uri, found.bytes, found.source) == ("memory://listing/a clip.mp4", 5, "memory")
    (problem,) = list(discover(["nosuchscheme://bucket"]))
    assert isinstance(problem, Problem)


def test_a_changed_file_supersedes_its_old_version(database: Database, tmp_path: Path) -> None:
    """Given a registered file, when it changes, then it has a new ID and the old one is no longer live."""
    registry = Registry(database)
    file = tmp_path / "a.txt"
    file.write_text("one")
    (first,) = registry.add(uploads(tmp_path))
    assert registry.add(uploads(tmp_path)) == [first]
    file.write_text("another")
    (second,) = registry.add(uploads(tmp_path))
    assert second != first
    assert [row["media_id"] for row in registry.live()] == [second]


@pytest.mark.parametrize("count", [0, 1, 12_000])
def test_adding_many_at_once(database: Database, count: int) -> None:
    """Given more uploads than one statement takes, then all are registered once."""
    registry = Registry(database)
    found = [Upload(f"s3://bucket/{n}.mp4", "e", n, None, "s3") for n in range(count)]
    assert len(registry.add(found)) == count
    registry.add(found[: count // 2])
    assert len(registry.live()) == count


def test_versions_settle_the_same_in_any_order(database: Database) -> None:
    """Given creations and removals of one key told in every order and twice, then the last one told of decides."""
    start = datetime(2026, 1, 1, tzinfo=UTC)

    def upload(etag: str, second: int, sequencer: str = "") -> Upload:
        return Upload("s3://bucket/a.mp4", etag, 1, None, "s3", None, start + timedelta(seconds=second), sequencer)

    def removal(second: int) -> Removal:
        return Removal("s3://bucket/a.mp4", start + timedelta(seconds=second))

    one, two, tie = upload("one", 1, "0A"), upload("two", 3, "0B"), upload("tie", 3, "0C")
    histories: list[tuple[list[Upload | Removal], dict[str, str]]] = [
        ([one, two], {"one": "superseded", "two": "live"}),
        ([one, two, removal(2)], {"one": "superseded", "two": "live"}),
        ([one, two, removal(4)], {"one": "superseded", "two": "removed"}),
        ([one, removal(2)], {"one": "removed"}),
        ([two, tie], {"two": "superseded", "tie": "live"}),
    ]
    registry = Registry(database)
    for history, expected in histories:
        for told in itertools.permutations([*history, history[0]]):
            with database.engine.begin() as connection:
                connection.execute(sa.text("truncate uploads, removals"))
            for entry in told:
                if isinstance(entry, Upload):
                    registry.register([entry])
                else:
                    registry.register(gone=[entry])
            with database.engine.connect() as connection:
                rows = connection.execute(sa.text("select etag, state from uploads")).all()
            assert {row[0]: row[1] for row in rows} == expected, told


def test_a_purged_upload_stays_purged(database: Database, tmp_path: Path) -> None:
    """Given an upload whose bytes were purged, when it is discovered again, then it does not come back."""
    (tmp_path / "a.txt").write_text("a")
    registry = Registry(database)
    (first,) = registry.add(uploads(tmp_path))
    with database.engine.begin() as connection:
        connection.execute(sa.text("update uploads set state = 'purged'"))
    assert registry.register(uploads(tmp_path)).new == ()
    assert registry.known([first]) == {first: "purged"}
    assert registry.live() == []


def test_a_database_refuses_the_files_of_another_library(library: Library, tmp_path: Path) -> None:
    """Given a database in use, when a library with other files opens it, then it is refused with a remedy."""
    assert library.registry.live() == []
    other = Library(Settings(home=tmp_path / "other", database_url=library.settings.database_url))
    with pytest.raises(StorageMismatch, match="belong together"):
        _ = other.registry
    other.close()


def test_a_change_is_told_to_who_listens(database: Database, tmp_path: Path) -> None:
    """Given a listener, when something is registered or goes, then it hears it once; a repetition is no news."""
    (tmp_path / "a.txt").write_text("a")
    found = [entry for entry in discover([str(tmp_path)]) if isinstance(entry, Upload)]
    registry = Registry(database)
    with database.listening(CHANGES) as told:
        assert not told(0)
        registry.register(found)
        assert told(30)  # the server tells its listeners soon after the commit, not within it
        assert not told(0)
        registry.register(found)
        assert not told(0.05)
        threading.Timer(0.1, lambda: registry.register(gone=[Removal(found[0].uri, datetime.now(UTC))])).start()
        assert told(30)
    with database.listening(CHANGES) as told:
        assert not told(0)
