"""Errors at the edge: one sentence that names what is wrong and says what to do, the exit code of its family, no
traceback; and what is a defect keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from dagster import DagsterExecutionStepExecutionError
from dagster_postgres.utils import DagsterPostgresException

from cli.errors import explained
from cli.exit_codes import Exit
from evals.baseline import Baseline, _store
from evals.golden import GoldenSetError
from resources.errors import DatabaseUnavailable, ModelUnavailable
from resources.files.local import replacing
from resources.library import Library
from resources.models.registry import ModelRegistry
from resources.records import database_url, embedded_postgres
from resources.records.database import Database
from resources.settings import BadSettings, Settings
from tests.commands import Commands

PROJECT = Path(__file__).parents[1]
URL = "MEDIA_DATABASE_URL"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without settings, and no variables of this machine."""
    for name in [name for name in os.environ if name.startswith("MEDIA_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def call(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(home, monkeypatch, capsys)


def spoilt(path: Path, content: bytes | None) -> None:
    """A file with this content, or a folder of that name."""
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)


BROKEN = {
    "a folder": (None, "it is a folder"),
    "no TOML": (b"[limits\n", "it is not TOML: Expected ']'"),
    "no UTF-8": (b"# caf\xe9\n", "it is not UTF-8 text (byte 5)"),
}


@pytest.mark.parametrize(("content", "said"), BROKEN.values(), ids=BROKEN)
def test_a_settings_file_that_cannot_be_read_is_one_sentence(
    home: Path, call: Commands, content: bytes | None, said: str
) -> None:
    """Given a settings.toml that is none, when a command is called, then it exits 7 and names the file."""
    spoilt(home / "settings.toml", content)
    done = call("status")
    assert done.code == Exit.SETTINGS
    assert done.err.startswith(f"{home / 'settings.toml'} cannot be used: {said}")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(("content", "said"), BROKEN.values(), ids=BROKEN)
def test_a_catalogue_of_models_that_cannot_be_read_is_named(home: Path, content: bytes | None, said: str) -> None:
    """Given a models.toml of the home that is none, then the error names it, not the settings."""
    spoilt(home / "models.toml", content)
    with pytest.raises(ModelUnavailable) as raised:
        ModelRegistry(Settings(home=home))
    assert str(raised.value).startswith(f"{home / 'models.toml'} cannot be used: {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("offline = 3", "each entry is a table of its own, headed [[offline.TASK]]"),
        ("[offline]\nasr = 3", "headed [[offline.asr]]"),
        ("[offline]\nroutes = [3]", "headed [[offline.routes]]"),
        ('[[offline.asr]]\nname = "w"\nadapter = 3\nsource = ""\nlicence = ""', "model w of task asr: adapter: Input"),
        ('[[offline.asr]]\nname = "w"\nadapter = ""\nsource = ""\nlicence = ""\nsize = 1', "size: Extra inputs"),
        ('[[offline.asr]]\ntask = "ocr"', "task: the name of its table says it"),
        ("[[offline.routes]]\ntask = 1", "A route of models.toml (1) is wrong: task: Input should be a valid string"),
        ('[[offline.screens]]\ntask = "nsfw"', "A screen of models.toml (nsfw) is wrong: screened_by: Field required"),
    ],
)
def test_a_wrong_entry_of_the_catalogue_of_models_is_named(
    home: Path, call: Commands, text: str, said: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a models.toml with wrong types or unknown keys, when a command needs models, then it exits 6."""
    (home / "models.toml").write_text(text)
    monkeypatch.setenv(URL, database_url)
    done = call("plan", "--dry-run")
    assert done.code == Exit.MODEL
    assert said in done.err
    assert "settings" not in done.err
    assert done.err.count("\n") == 1


def test_a_wrong_setting_is_named_with_where_it_was_set(
    home: Path, call: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a wrong setting in the file and one in a variable, then each is told with its place."""
    (home / "settings.toml").write_text("[limits]\nmax_bytes = 0\n")
    monkeypatch.setenv("MEDIA_ENGINE__MAX_UNITS", "many")
    done = call("status")
    assert done.code == Exit.SETTINGS
    assert f"limits.max_bytes: Input should be greater than 0 (in {home / 'settings.toml'})" in done.err
    assert "engine.max_units: Input should be a valid integer" in done.err
    assert "(variable MEDIA_ENGINE__MAX_UNITS)" in done.err


@pytest.mark.parametrize("variable", ["MEDIA_INGESTION__FOLDERS", "MEDIA_LIMITS"])
def test_a_variable_that_has_to_be_json_is_named(
    home: Path, call: Commands, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a list or a section in a variable, and not as JSON, then it exits 7 and names the variable."""
    monkeypatch.setenv(variable, "/media")
    done = call("status")
    assert (done.code, done.err.count("\n")) == (Exit.SETTINGS, 1)
    assert done.err.startswith(f"The value of {variable} is not the JSON")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "must be a URL such as postgresql://"),
        ("mysql://u:secret@h/db", "must begin with postgresql://, not mysql://"),
        ("postgresql+asyncpg://u:secret@h/db", "not postgresql+asyncpg://"),
        ("postgresql://u:secret@h:port/db", "port that is no number"),
        ("postgresql://u:secret@h:99999/db", "port that is no number"),
        ("postgresql://u:also@secret@h/db", "more than one @"),
        ("postgresql://u:secret@h/db?colour=red", "option after its ?"),
    ],
)
def test_a_database_url_that_is_none_is_one_sentence_without_its_password(
    home: Path, call: Commands, url: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a MEDIA_DATABASE_URL that no connection could be tried with, then it exits 7 and says what is wrong."""
    monkeypatch.setenv(URL, url)
    done = call("status")
    assert (done.code, done.err.count("\n")) == (Exit.SETTINGS, 1)
    assert said in done.err
    assert URL in done.err
    assert "secret" not in done.err


@pytest.mark.parametrize(
    "url",
    [
        "postgres://u:p%40ss@h/db",
        "postgresql+psycopg2://postgres@/postgres?host=%2Ftmp%2Fx",
        "postgresql://h:5432/db?sslmode=require&connect_timeout=3",
    ],
)
def test_urls_of_postgres_are_taken(url: str) -> None:
    """Given URLs of servers on a host, by a socket and with options, then nothing is wrong with them."""
    database_url.check(url)


def test_a_database_that_does_not_answer_is_one_sentence_without_its_password(
    home: Path, call: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a URL behind which nobody listens, then it exits 5."""
    monkeypatch.setenv(URL, "postgresql://u:secret@127.0.0.1:1/db")
    done = call("status")
    assert (done.code, done.err.count("\n")) == (Exit.DATABASE, 1)
    assert "Connection refused" in done.err
    assert "secret" not in done.err


def test_a_storage_of_no_known_kind_is_named(
    home: Path, call: Commands, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a MEDIA_STORAGE_URL that no library speaks, then it exits 7 and names it."""
    monkeypatch.setenv(URL, database_url)
    monkeypatch.setenv("MEDIA_STORAGE_URL", "punchcards://drawer")
    done = call("status")
    assert (done.code, done.err.count("\n")) == (Exit.SETTINGS, 1)
    assert "storage_url: punchcards:// cannot be used" in done.err


@pytest.mark.parametrize("variable", ["MEDIA_S3__ENDPOINT_URL", "MEDIA_INGESTION__QUEUE_ENDPOINT_URL"])
def test_an_endpoint_that_is_no_url_is_named(
    home: Path, call: Commands, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given an endpoint without a scheme, then it exits 7 and names the variable before anything is asked of it."""
    monkeypatch.setenv(variable, "localhost:9000")
    done = call("status")
    assert (done.code, done.err.count("\n")) == (Exit.SETTINGS, 1)
    assert "must begin with http:// or https:// and name a host" in done.err
    assert variable in done.err


@pytest.mark.parametrize("below", [".", "below"], ids=["a file", "below a file"])
def test_a_home_that_cannot_be_made_is_one_sentence(
    tmp_path: Path, home: Path, below: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given a home that is a file, or below one, then it exits 9, names it and says how to choose another."""
    (tmp_path / "taken").write_text("a file")
    place = tmp_path / "taken" / below
    done = Commands(place, monkeypatch, capsys)("status")
    assert (done.code, done.err.count("\n")) == (Exit.STORAGE, 1)
    assert f"The folder {place} cannot be made" in done.err
    assert "--home" in done.err


def test_a_home_that_cannot_be_made_beside_another_database_is_one_sentence(
    tmp_path: Path, home: Path, database_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given a database elsewhere and a home below a file, when a run needs the home, then it exits 9 and names it."""
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "note.txt").write_text("hello")
    monkeypatch.setenv(URL, database_url)
    run = Commands(tmp_path / "taken" / "home", monkeypatch, capsys)
    done = run("run", str(tmp_path / "note.txt"), "--select", "media")
    assert done.code == Exit.STORAGE
    assert done.err.splitlines()[-1].startswith(f"The folder {tmp_path / 'taken' / 'home'} cannot be made")


def lost(database: Database) -> BaseException:
    """The driver's error when the server ends a connection that is in use."""
    with database.engine.connect() as connection:
        pid = connection.execute(sa.text("select pg_backend_pid()")).scalar()
        with database.transitions.connect() as other:
            other.execute(sa.text("select pg_terminate_backend(:pid, 5000)"), {"pid": pid})
        with pytest.raises(sa.exc.DBAPIError) as raised:
            connection.execute(sa.text("select 1"))
    return raised.value


def wrapped(error: BaseException, wrapper: BaseException) -> BaseException:
    wrapper.__cause__ = error
    return wrapper


WRAPPERS: dict[str, Callable[[BaseException], BaseException]] = {
    "as it is": lambda error: error,
    "of the driver": lambda error: getattr(error, "orig", error),
    "by Dagster's storage": lambda error: wrapped(error, DagsterPostgresException("too many retries")),
    "by Dagster's step": lambda error: wrapped(
        error,
        DagsterExecutionStepExecutionError(
            "Error occurred",
            user_exception=error,
            original_exc_info=(type(error), error, None),
            step_key="decode",
            op_name="decode",
            op_def_name="decode",
        ),
    ),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_database_lost_in_mid_command_is_one_sentence(
    database: Database, wrap: Callable[[BaseException], BaseException]
) -> None:
    """Given a server that ends a connection in use, whoever wrapped that, then it is exit 5 and a sentence."""
    told = explained(wrap(lost(database)))
    assert told is not None
    message, code = told
    assert code is Exit.DATABASE
    assert message.startswith("The database does not answer: ")
    assert "\n" not in message


def test_a_user_without_rights_and_a_wrong_statement_are_told_apart(database: Database) -> None:
    """Given a user who may not make tables, then that is said; given a wrong statement, then it is a defect."""
    with database.engine.connect() as connection:
        connection.execute(sa.text("set local role pg_monitor"))
        with pytest.raises(sa.exc.DBAPIError) as refused:
            connection.execute(sa.text("create table public.x (n int)"))
    told = explained(refused.value)
    assert told is not None
    assert told[0].startswith("The database refuses: permission denied for schema public.")
    with pytest.raises(sa.exc.DBAPIError) as wrong, database.engine.begin() as connection:
        connection.execute(sa.text("select nothing"))
    assert explained(wrong.value) is None


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/h/a"), Exit.STORAGE, "no space for /h/a. Free some"),
        (OSError(errno.ENOSPC, "No space left on device"), Exit.STORAGE, "no space in the home"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/h/a"), Exit.STORAGE, "The quota of the disk is used up"),
        (OSError(errno.EROFS, "Read-only file system", "/h/a"), Exit.STORAGE, "/h/a cannot be used: Read-only"),
        (PermissionError(errno.EACCES, "Permission denied", b"/h/a"), Exit.STORAGE, "/h/a cannot be used: Permission"),
        (
            wrapped(OSError(errno.ENOSPC, "No space left"), DatabaseUnavailable("The server cannot be run.")),
            Exit.STORAGE,
            "The disk is full",
        ),
    ],
)
def test_a_disk_that_takes_nothing_is_one_sentence(error: OSError, code: Exit, said: str) -> None:
    """Given a full, used up or closed disk, be it the cause of something else, then it is said with its exit code."""
    told = explained(error)
    assert told is not None
    assert told[1] is code
    assert said in told[0]


@pytest.mark.parametrize(
    "error", [KeyError("x"), FileNotFoundError(2, "No such file", "/x"), PermissionError(1, "Not permitted")]
)
def test_a_defect_keeps_its_traceback(error: Exception) -> None:
    """Given errors that no person can mend, then nothing is said in their place."""
    assert explained(error) is None


def test_a_defect_shows_its_traceback(
    home: Path, call: Commands, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a command with a defect, then the error itself leaves it."""
    monkeypatch.setenv(URL, database_url)
    monkeypatch.setattr("cli.report.show_status", lambda *_: {}["x"])
    with pytest.raises(KeyError):
        call("status")


def test_a_file_without_room_is_named(tmp_path: Path) -> None:
    """Given a full disk, whose error holds no name, then the file that was written is named."""
    with pytest.raises(OSError, match=r"tuning\.json") as raised, replacing(tmp_path / "tuning.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(tmp_path / "tuning.json")


def test_a_server_without_room_says_what_to_do() -> None:
    """Given a server that says that its disk is full, then the remedy is to free some."""
    told = embedded_postgres._unavailable('FATAL: could not write lock file "x": No space left on device.')
    assert str(told).endswith("No space left on device. Free space on that disk.")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_answer_that_cannot_be_written_is_one_sentence() -> None:
    """Given a stdout on a full disk, then that is said once, and the exit code tells."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=PROJECT
        )
    assert done.returncode == Exit.STORAGE
    assert done.stderr.startswith("The disk is full")
    assert done.stderr.count("\n") == 1


def test_a_broken_baseline_is_named_in_one_line(tmp_path: Path) -> None:
    """Given a baseline that somebody broke, when it is read or stored anew, then the error names it in one line."""
    (tmp_path / "set.json").write_text('{"golden": "set"}')
    with pytest.raises(GoldenSetError) as raised:
        Baseline.read(tmp_path / "set.json")
    assert str(raised.value) == (
        f"The baseline {tmp_path / 'set.json'} cannot be used: digest: Field required. Mend or remove it."
    )
    with pytest.raises(GoldenSetError):
        _store("set", "digest", [], tmp_path)


def test_settings_of_a_home_that_is_a_file_are_the_defaults(tmp_path: Path) -> None:
    """Given a home that cannot be one, then that is not blamed on the settings."""
    (tmp_path / "file").write_text("x")
    assert Settings.load(tmp_path / "file").limits == Settings(home=tmp_path).limits


def test_what_is_wrong_with_settings_is_an_error_of_the_project(tmp_path: Path) -> None:
    """Given wrong settings, when a library is opened by whoever, then the error has a code and a remedy."""
    (tmp_path / "settings.toml").write_text("[limits]\nmax_pixel = 1\n")
    with pytest.raises(BadSettings, match=r"limits\.max_pixel") as raised:
        Library.open(tmp_path)
    assert raised.value.code == "bad_settings"
