"""The folder sensor: what appears, changes and vanishes below watched folders, judged carefully."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg
import pytest

from media_assets.orchestration.partitions import MEDIA
from resources.ingest.discovery import LEADS_OUT
from resources.ingest.registry import Registry
from resources.library import Library
from resources.settings import Ingestion, Settings
from sensors import folder_watch
from sensors.folder import UNSET, build_folder_sensor
from sensors.folder_leases import stat_if_closed
from sensors.folder_watch import Look, Memory, look, watched
from tests.conftest import SILENT

QUIET_S = 5.0
CLOSED_S = 0.5
HOLD_S = 600.0


@dataclass
class Watcher:
    """Looks at folders at chosen times and registers what is found, as the sensor does."""

    registry: Registry
    folders: list[str]
    now: float
    memory: Memory = field(default_factory=Memory)
    settings: Ingestion = field(
        default_factory=lambda: Ingestion(folder_quiet_s=QUIET_S, folder_closed_s=QUIET_S, folder_hold_s=HOLD_S)
    )

    def look(self, later_s: float = QUIET_S + 1) -> Look:
        """One look, `later_s` seconds after the one before."""
        self.now += later_s
        found = look(self.folders, self.registry, self.memory, self.settings, self.now)
        self.registry.register(found.new, found.gone)
        # By way of its text, as the cursor of a sensor.
        self.memory = Memory.model_validate_json(found.memory("", 0).model_dump_json())
        return found

    def live(self) -> list[str]:
        """Names of live files, sorted."""
        return sorted(row["uri"].rsplit("/", 1)[-1] for row in self.registry.live())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty folder to watch."""
    folder = tmp_path / "media"
    folder.mkdir()
    return folder


@pytest.fixture
def watcher(library: Library, root: Path) -> Watcher:
    """A watcher of `root` whose clock begins after the folder was made."""
    return Watcher(library.registry, [str(root)], now=os.stat(root).st_ctime + 100)


def fill(root: Path, count: int) -> None:
    """Files `000.txt` and so on."""
    for number in range(count):
        (root / f"{number:03}.txt").write_text(str(number))


def test_a_new_file_is_registered_once_two_looks_saw_it_the_same(watcher: Watcher, root: Path) -> None:
    """Given a new file, when it is seen twice unchanged, then it is registered, and never again."""
    (root / "a b.txt").write_text("a")
    assert (watcher.look().new, watcher.live()) == ([], [])
    assert len(watcher.look().new) == 1
    assert watcher.live() == ["a b.txt"]
    last = watcher.look()
    assert (last.new, last.gone, last.unsettled, last.files) == ([], [], {}, 1)


def test_a_file_that_goes_on_growing_after_a_pause_is_waited_for(watcher: Watcher, root: Path) -> None:
    """Given a copy that stalls between looks and then grows, then it is registered at its final size alone."""
    file = root / "film.mp4"
    file.write_bytes(b"1")
    watcher.look()
    file.write_bytes(b"12")
    assert watcher.look().new == []
    file.write_bytes(b"123")
    assert watcher.look().new == []
    (upload,) = watcher.look().new
    assert upload.bytes == 3


def test_a_copy_that_keeps_an_old_mtime_is_not_taken_at_once(watcher: Watcher, root: Path) -> None:
    """Given a file written a moment ago whose mtime is years old, then its inode's time counts."""
    file = root / "copy.mp4"
    file.write_bytes(b"12")
    os.utime(file, (1_000_000_000, 1_000_000_000))
    watcher.look()
    assert watcher.memory.unsettled
    file.write_bytes(b"34")  # its size is the final one from the start
    os.utime(file, (1_000_000_000, 1_000_000_000))
    watcher.memory = Memory(unsettled={"1000000000.0": "".join(watcher.memory.unsettled.values())})
    watcher.now = os.stat(file).st_ctime
    assert watcher.look(later_s=QUIET_S - 1).new == []
    assert len(watcher.look(later_s=2).new) == 1


def test_unfinished_and_hidden_names_are_left_out(watcher: Watcher, root: Path) -> None:
    """Given temporary and hidden names, then they are not registered, and their final names are."""
    names = ["a.mp4.part", "b.crdownload", "c.TMP", "d~", "~$e.docx", ".f.mp4"]
    for name in names:
        (root / name).write_text(name)
    (root / ".hidden").mkdir()
    (root / ".hidden" / "g.mp4").write_text("g")
    watcher.look()
    assert watcher.look().new == []
    os.rename(root / "a.mp4.part", root / "a.mp4")
    watcher.look()
    watcher.look()
    assert watcher.live() == ["a.mp4"]


def test_a_changed_file_supersedes_and_a_removed_one_may_come_back(watcher: Watcher, root: Path) -> None:
    """Given registered files, when one changes and one goes and comes back, then versions and states follow."""
    (root / "a.txt").write_text("a")
    (root / "b.txt").write_text("b")
    watcher.look()
    watcher.look()
    first = {row["uri"]: row["media_id"] for row in watcher.registry.live()}
    (root / "a.txt").write_text("another")
    kept = root.parent / "b.txt"
    os.rename(root / "b.txt", kept)
    assert [Path(removal.uri).name for removal in watcher.look().gone] == ["b.txt"]
    watcher.look()
    (changed,) = watcher.registry.live()
    assert changed["media_id"] != first[changed["uri"]]
    os.rename(kept, root / "b.txt")
    watcher.look()
    watcher.look()
    assert {row["media_id"] for row in watcher.registry.live()} == {changed["media_id"], first[str(root / "b.txt")]}


def test_odd_names_are_known_again(watcher: Watcher, root: Path) -> None:
    """Given names of wrong encodings, wildcards of SQL and a folder of such a name, then they settle once."""
    odd = Path(os.fsdecode(bytes(root) + b"/caf\xe9"))
    odd.mkdir()
    for name in (b"100%_a.mp4", b"caf\xe9.mp4", b"caf\xe9/b.mp4", b"line\nbreak.mp4", "日本.mp4".encode()):
        Path(os.fsdecode(bytes(root) + b"/" + name)).write_bytes(b"x")
    watcher.folders = watched([str(root), str(root / "within"), f"{root}/"])
    assert watcher.folders == [str(root)]
    watcher.look()
    assert len(watcher.look().new) == 5
    again = watcher.look()
    assert (again.new, again.gone, again.unsettled) == ([], [], {})
    shutil.rmtree(odd)
    assert len(watcher.look().gone) == 1


def test_loops_and_unreadable_folders_are_told_and_remove_nothing(
    watcher: Watcher, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a loop of links and a folder that stops being readable, then its files stay and the reason is told."""
    (root / "loop").symlink_to(root)
    locked = root / "locked"
    locked.mkdir()
    (locked / "a.txt").write_text("a")
    watcher.look()
    watcher.look()
    assert watcher.live() == ["a.txt"]
    listdir = os.listdir

    def refuse(path: str) -> list[str]:
        if str(path) == str(locked):
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)  # tests may run as root, whom no mode keeps out
    found = watcher.look()
    assert [(problem.path, problem.reason) for problem in found.problems] == [(str(locked), "Permission denied")]
    assert (found.gone, watcher.live()) == ([], ["a.txt"])


def test_a_link_out_of_the_folder_is_told_and_not_registered(watcher: Watcher, root: Path, tmp_path: Path) -> None:
    """Given a link to a file elsewhere, then it is told and not registered, and what was registered stays."""
    (tmp_path / "elsewhere.txt").write_text("not for this library")
    (root / "own.txt").write_text("own")
    (root / "link.txt").symlink_to(tmp_path / "elsewhere.txt")
    for _ in range(3):
        found = watcher.look()
    assert watcher.live() == ["own.txt"]
    assert [(problem.path, problem.reason) for problem in found.problems] == [(str(root / "link.txt"), LEADS_OUT)]


def test_a_missing_watched_folder_removes_nothing_however_long(watcher: Watcher, root: Path) -> None:
    """Given registered files, when their whole folder is missing for days, then all stay live and it is told."""
    fill(root, 3)
    watcher.look()
    watcher.look()
    os.rename(root, root.parent / "elsewhere")
    for _ in range(4):
        found = watcher.look(later_s=86_400)
        assert found.gone == []
        assert [problem.path for problem in found.problems] == [str(root)]
    assert len(watcher.live()) == 3


def empty_all(root: Path) -> None:
    for path in root.iterdir():
        path.unlink()


def leave_one(root: Path) -> None:
    for path in sorted(root.iterdir())[1:]:
        path.unlink()


def keep_mark(root: Path) -> None:
    empty_all(root)
    (root / ".keep").touch()


@pytest.mark.parametrize(
    ("count", "lose", "left"),
    [(3, empty_all, 0), (folder_watch.MANY + 2, leave_one, 1), (folder_watch.MANY + 2, keep_mark, 0)],
    ids=["a few, folder empty", "many at once", "all, folder marked as there"],
)
def test_many_files_gone_at_once_are_held_and_then_believed(
    watcher: Watcher, root: Path, count: int, lose: Callable[[Path], None], left: int
) -> None:
    """Given files that vanish together, then they are held with a warning, and removed only when they stay away."""
    fill(root, count)
    watcher.look()
    watcher.look()
    lose(root)
    for later in (QUIET_S, QUIET_S, HOLD_S - 2 * QUIET_S - 1):
        found = watcher.look(later_s=later)
        assert found.gone == []
        assert "missing all at once" in found.warnings[0]
    assert len(watcher.live()) == count
    assert len(watcher.look(later_s=QUIET_S + 2).gone) == count - left
    assert len(watcher.live()) == left


def test_files_that_come_back_within_the_hold_were_never_gone(watcher: Watcher, root: Path) -> None:
    """Given held removals, when the files are there again, then nothing happened and the next hold starts anew."""
    fill(root, 3)
    watcher.look()
    watcher.look()
    aside = root.parent / "aside"
    for _ in range(2):
        os.rename(root, aside)
        root.mkdir()
        assert watcher.look(later_s=HOLD_S - 1).gone == []
        root.rmdir()
        os.rename(aside, root)
        assert watcher.look().gone == []
    assert (len(watcher.live()), watcher.memory.holds) == (3, {})


def test_an_empty_mount_point_never_removes_many(watcher: Watcher, root: Path) -> None:
    """Given more than a few files, when their folder is wholly empty for days, then nothing is removed."""
    fill(root, folder_watch.MANY + 1)
    watcher.look()
    watcher.look()
    empty_all(root)
    for _ in range(4):
        found = watcher.look(later_s=86_400)
        assert found.gone == []
        assert "is its disk mounted?" in found.warnings[0]
    assert len(watcher.live()) == folder_watch.MANY + 1


def test_files_registered_by_hand_are_not_removed_though_they_are_not_watched(watcher: Watcher, root: Path) -> None:
    """Given a live file of a hidden name below a watched folder, then it stays as long as it is there."""
    hidden = root / ".clip.mp4"
    hidden.write_text("a")
    (root / "b.txt").write_text("b")
    from resources.ingest.discovery import discover
    from resources.ingest.uploads import Upload

    watcher.registry.register([found for found in discover([hidden]) if isinstance(found, Upload)])
    watcher.look()
    watcher.look()
    assert watcher.live() == [".clip.mp4", "b.txt"]
    hidden.unlink()
    assert len(watcher.look().gone) == 1


def test_a_purged_file_that_still_lies_there_is_left_alone(watcher: Watcher, root: Path, library: Library) -> None:
    """Given a purged upload whose file is still there, then no look deals with it again."""
    import sqlalchemy as sa

    (root / "a.txt").write_text("a")
    watcher.look()
    watcher.look()
    with library.database.engine.begin() as connection:
        connection.execute(sa.text("update uploads set state = 'purged'"))
    for _ in range(3):
        found = watcher.look()
        assert (found.new, found.unsettled, found.gone) == ([], {}, [])


def test_a_look_is_bounded_in_files_and_time(watcher: Watcher, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given more new files than one look takes, then all come in turn; given too little time, nothing is removed."""
    monkeypatch.setattr(folder_watch, "CANDIDATES", 4)
    fill(root, 10)
    assert (watcher.look().deferred, watcher.live()) == (6, [])
    assert [len(watcher.look().new) for _ in range(3)] == [4, 4, 2]
    assert len(watcher.live()) == 10
    watcher.settings = Ingestion(tick_budget_s=1e-9)
    (root / "003.txt").unlink()
    late = watcher.look()
    assert (late.gone, len(late.warnings)) == ([], 1)
    assert "tick_budget_s" in late.warnings[0]


@pytest.fixture
def quick(watcher: Watcher, root: Path) -> Watcher:
    """A watcher that takes new files at once when nobody has them open."""
    probe = root.parent / "probe"
    probe.write_text("a")
    if stat_if_closed(str(probe)) is None:
        pytest.skip("no leases here")
    watcher.settings = watcher.settings.model_copy(update={"folder_closed_s": CLOSED_S})
    return watcher


def test_a_new_file_that_nobody_has_open_is_taken_in_its_first_look(quick: Watcher, root: Path) -> None:
    """Given files written and renamed to, then the first look after `folder_closed_s` registers them, once."""
    (root / "a.txt").write_text("a")
    (root / "b.txt.part").write_text("b")
    os.utime(root / "b.txt.part", (1_000_000_000, 1_000_000_000))
    os.rename(root / "b.txt.part", root / "b.txt")
    quick.now = os.stat(root / "b.txt").st_ctime
    assert quick.look(later_s=CLOSED_S / 2).new == []
    assert len(quick.look(later_s=CLOSED_S).new) == 2
    assert quick.live() == ["a.txt", "b.txt"]
    assert (quick.look().new, quick.memory.unsettled) == ([], {})


def test_a_file_that_is_open_for_writing_waits_until_it_is_closed(quick: Watcher, root: Path) -> None:
    """Given a copy that stands still but is not done, then it is registered when it is closed, at its final size."""
    with open(root / "film.mp4", "wb", buffering=0) as writer:
        writer.write(b"1")
        for _ in range(3):
            assert quick.look(later_s=1).new == []
        writer.write(b"2")
        assert quick.look(later_s=QUIET_S + 1).new == []
    (upload,) = quick.look(later_s=1).new
    assert upload.bytes == 2


def test_a_file_written_in_bursts_has_one_early_version(quick: Watcher, root: Path) -> None:
    """Given a program that opens, appends and closes again and again, then only its first version is taken at once."""
    file = root / "film.mp4"
    taken = []
    for _ in range(4):
        with open(file, "ab") as writer:
            writer.write(b".")
        taken += [upload.bytes for upload in quick.look(later_s=1).new]
    assert taken == [1]
    assert [upload.bytes for upload in quick.look().new] == [4]
    (row,) = quick.registry.live()
    assert row["bytes"] == 4


def test_an_empty_file_waits_and_is_a_new_one_when_it_is_filled(quick: Watcher, root: Path) -> None:
    """Given a name without content, then it is not taken at once, and its first content is."""
    file = root / "film.mp4"
    file.touch()
    assert quick.look(later_s=1).new == []
    assert quick.memory.unsettled
    file.write_bytes(b"1")
    assert [upload.bytes for upload in quick.look(later_s=1).new] == [1]
    file.write_bytes(b"")
    assert quick.look(later_s=1).new == []
    assert [upload.bytes for upload in quick.look().new] == [0]


@pytest.mark.parametrize("unsure", ["not known", "times in whole seconds", "a time in the future", "switched off"])
def test_a_file_that_nobody_can_vouch_for_waits(
    quick: Watcher, root: Path, monkeypatch: pytest.MonkeyPatch, unsure: str
) -> None:
    """Given no answer of the kernel, or times that tell nothing, then two looks must see the file the same."""
    file = root / "film.mp4"
    file.write_bytes(b"1")
    if unsure == "not known":
        monkeypatch.setattr(folder_watch, "stat_if_closed", lambda path: None)
    elif unsure == "times in whole seconds":
        monkeypatch.setattr(folder_watch, "_SECOND_NS", 1)  # no file's time is set so on this file system
    elif unsure == "a time in the future":
        os.utime(file, (quick.now + 1e6, quick.now + 1e6))
    else:
        quick.settings = quick.settings.model_copy(update={"folder_closed_s": QUIET_S})
    assert quick.look().new == []
    assert len(quick.look().new) == 1


@pytest.mark.parametrize("change", ["grown", "rewritten", "replaced", "removed"])
def test_a_file_that_changes_between_the_listing_and_the_lease_is_taken_as_it_is_then(
    quick: Watcher, root: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Given a file that another writes to once it is listed, then no look takes the version that is no more."""
    file = root / "film.mp4"
    file.write_bytes(b"1")
    old = os.stat(file)

    def late(path: str) -> os.stat_result | None:
        monkeypatch.undo()
        while change != "removed" and os.stat(file).st_ctime_ns == old.st_ctime_ns:  # they advance in steps
            if change == "replaced":
                file.unlink()
            file.write_bytes(b"12" if change == "grown" else b"2")
            if change == "rewritten":
                os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
        if change == "removed":
            file.unlink()
        return stat_if_closed(path)

    monkeypatch.setattr(folder_watch, "stat_if_closed", late)
    assert quick.look(later_s=1).new == []
    etags = [] if change == "removed" else [f"{file.stat().st_size:x}-{file.stat().st_mtime_ns:x}"]
    assert [upload.etag for upload in quick.look(later_s=1).new] == etags
    assert [row["etag"] for row in quick.registry.live()] == etags


def test_many_new_files_are_taken_in_turn_those_that_waited_first(
    quick: Watcher, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given more new files than one look takes, then all come in turn, by name behind those that waited."""
    monkeypatch.setattr(folder_watch, "CANDIDATES", 4)
    with open(root / "waiting.txt", "wb", buffering=0) as writer:
        writer.write(b"1")
        quick.look(later_s=1)
    fill(root, 10)
    found = [quick.look(later_s=1) for _ in range(3)]
    assert [[Path(upload.uri).name for upload in look.new] for look in found] == [
        ["waiting.txt", "000.txt", "001.txt", "002.txt"],
        ["003.txt", "004.txt", "005.txt", "006.txt"],
        ["007.txt", "008.txt", "009.txt"],
    ]
    assert [look.deferred for look in found] == [7, 3, 0]


def test_the_sensor_takes_a_closed_file_in_one_look_and_leaves_an_open_one(
    quick: Watcher, library: Library, root: Path, tmp_path: Path
) -> None:
    """Given a file done and one being written, when the sensor ticks, then it registers the first alone."""
    ingestion = Ingestion(folders=(str(root),), folder_quiet_s=3600, folder_closed_s=0.1)
    sensor = build_folder_sensor(library.settings.model_copy(update={"ingestion": ingestion}))
    (root / "done.txt").write_text("a")
    with (
        open(root / "open.txt", "wb", buffering=0) as writer,
        dg.DagsterInstance.local_temp(str(tmp_path), overrides=SILENT) as instance,
    ):
        writer.write(b"1")
        for _ in range(100):  # as long as it takes for both to be old enough
            with dg.build_sensor_context(instance=instance, resources={"media": library}) as context:
                result = sensor.evaluate_tick(context)
            if "1 perhaps still being written" in (result.skip_message or ""):
                break
        assert quick.live() == ["done.txt"]
        assert len(instance.get_dynamic_partitions(MEDIA)) == 1


def test_the_sensor_registers_adds_partitions_and_requests_no_runs(
    library: Library, root: Path, tmp_path: Path
) -> None:
    """Given a watched folder, when the sensor ticks twice, then uploads are live, partitions exist, no run is asked."""
    (root / "a.txt").write_text("a")
    (root / "broken").symlink_to(root / "nothing")
    settings = library.settings.model_copy(update={"ingestion": Ingestion(folders=(str(root),), folder_quiet_s=0)})
    sensor = build_folder_sensor(settings)
    assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides=SILENT) as instance:
        cursor = None
        for counted in ("1 new", "0 new"):
            with dg.build_sensor_context(instance=instance, cursor=cursor, resources={"media": library}) as context:
                result = sensor.evaluate_tick(context)
            assert not result.run_requests
            assert counted in (result.skip_message or "")
            assert "1 not readable" in (result.skip_message or "")
            cursor = result.cursor
        (row,) = library.registry.live()
        assert instance.get_dynamic_partitions(MEDIA) == [row["media_id"]]


def test_one_tick_sees_a_file_twice(library: Library, root: Path, tmp_path: Path) -> None:
    """Given a thread for each sensor, when a new file stays the same, then the tick that saw it first registers it."""
    settings = library.settings.model_copy(update={"ingestion": Ingestion(folders=(str(root),), folder_quiet_s=0.5)})
    sensor = build_folder_sensor(settings)
    (root / "a.txt").write_text("a")
    threads = {"sensors": {"use_threads": True}}
    with (
        dg.DagsterInstance.local_temp(str(tmp_path), overrides=threads | SILENT) as instance,
        dg.build_sensor_context(instance=instance, resources={"media": library}) as context,
    ):
        result = sensor.evaluate_tick(context)
    assert "1 new" in (result.skip_message or "")
    assert Memory.model_validate_json(result.cursor or "").unsettled == {}


def test_without_a_folder_the_sensor_is_stopped_and_says_why(library: Library) -> None:
    """Given no folder, then the sensor is stopped; started by hand, it skips and names the setting."""
    sensor = build_folder_sensor(library.settings)
    assert sensor.default_status is dg.DefaultSensorStatus.STOPPED
    with dg.build_sensor_context(resources={"media": library}) as context:
        result = sensor.evaluate_tick(context)
    assert result.skip_message == UNSET


def test_watched_folders_must_be_absolute(tmp_path: Path) -> None:
    """Given a relative folder in the settings, then it is refused: the code location runs elsewhere."""
    with pytest.raises(ValueError, match="not an absolute path"):
        Settings(home=tmp_path, ingestion=Ingestion(folders=("media",)))
