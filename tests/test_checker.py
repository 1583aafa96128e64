"""The checker process answers as the library would here; its death, hang or error ends as told and loses no item."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import psutil
import pyarrow as pa
import pytest

from media_assets import schemas
from media_assets.checks import checker as module
from media_assets.checks.check_report import CheckReport
from media_assets.checks.checker import Checker, CheckerDied, checker
from media_assets.orchestration.grouping import groups
from media_assets.orchestration.groups import build_group
from media_assets.orchestration.partitions import add_partitions, explicit_batch_tags
from media_assets.orchestration.quality import EXPECTATIONS
from resources.ingest.discovery import discover
from resources.ingest.uploads import Upload
from resources.library import Library
from resources.settings import Settings
from tests.test_expectations import LIMIT_S, MEDIA, rows_of, schema_of

Rows = list[dict[str, object]]
DECODE = groups(Settings(home=Path("nowhere")))[0]
KNOWN = schemas.table(schemas.MEDIA, MEDIA)


def ask(made: Checker, asset: str, rows: Rows | None = None, limit_s: float = LIMIT_S) -> CheckReport:
    table = schemas.table(schema_of(asset), rows_of(asset) if rows is None else rows)
    return made.validate(asset, table, KNOWN, limit_s)


def die_over_a_table(monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
    """Let the next processes be killed by SIGKILL once they were sent a table; lists their IDs as that happens."""
    send = module._Process._send
    killed: list[int] = []

    def deadly(process: module._Process, asset: str, table: pa.Table, media: pa.Table) -> None:
        send(process, asset, table, media)
        if len(killed) < times:
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(module._Process, "_send", deadly)
    return killed


@pytest.fixture
def own() -> Iterator[Checker]:
    made = Checker()
    yield made
    made.close()


def test_a_process_killed_over_a_table_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a process killed with the table in its hands, then the answer comes from another one, which stays."""
    killed = die_over_a_table(monkeypatch, times=1)
    assert ask(checker(), "shots").passed
    assert len(killed) == 1
    assert not psutil.pid_exists(killed[0])
    second = checker().pid()
    assert ask(checker(), "transcript").passed
    assert checker().pid() == second


def test_tables_of_many_threads_get_their_own_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given sound and damaged tables, one larger than a pipe, at once and no way to import the library here, then each
    gets its own report."""
    monkeypatch.setitem(sys.modules, "great_expectations", None)
    shots = [row | {"confidence": 1.5} for row in rows_of("shots")]
    vectors = [row | {"ordinal": n, "vector": [1.0] + [0.0] * 511} for n, row in enumerate(rows_of("embeddings") * 200)]
    damaged = [row | {"unit": "smell"} if n % 3 == 0 else row for n, row in enumerate(vectors)]
    wanted: list[tuple[str, Rows, dict[str, int]]] = [
        ("shots", rows_of("shots"), {}),
        ("shots", shots, {"confidence between 0 and 1": 3}),
        ("transcript", [], {}),
        ("embeddings", vectors, {}),
        ("embeddings", damaged, {"unit allowed": 200}),
    ]
    with ThreadPoolExecutor(len(wanted)) as threads:
        reports = list(threads.map(lambda each: ask(checker(), each[0], each[1]), wanted))
    for (asset, rows, broken), report in zip(wanted, reports, strict=True):
        assert (report.asset, report.rows) == (asset, len(rows))
        assert {entry.name: entry.unexpected for entry in report.failures} == broken


def test_an_error_comes_back_with_its_traceback_and_the_process_lives_on() -> None:
    media = schemas.table(schemas.MEDIA, MEDIA)
    assert checker().validate("media", media, media, LIMIT_S).passed
    alive = checker().pid()
    with pytest.raises(RuntimeError, match=r"could not be checked: KeyError: 'hologram'\nTraceback"):
        checker().validate("hologram", media, media, LIMIT_S)
    assert checker().validate("media", media, media, LIMIT_S).passed
    assert checker().pid() == alive


def test_a_second_death_is_told_with_what_the_process_said(own: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given processes that fail before they answer, then the error has the exit code and their standard error."""
    monkeypatch.setenv("MEDIA_FAULT", "checker.start:raise")
    with pytest.raises(CheckerDied, match=r"died on the rows of shots \(exit code 1\)\. It said:\nTraceback") as died:
        ask(own, "shots")
    assert "RuntimeError: injected at checker.start" in str(died.value)
    assert own.pid() is None


def test_a_process_that_hangs_is_killed(own: Checker) -> None:
    """Given a process that is stopped, when a table takes longer than the limit, then it is killed, not asked again."""
    own.warm()
    stuck = own.pid()
    assert stuck is not None
    os.kill(stuck, signal.SIGSTOP)
    large = rows_of("embeddings") * 400  # more than the pipe takes
    with pytest.raises(TimeoutError, match=r"no answer on embeddings within 0\.1 s"):
        ask(own, "embeddings", [row | {"vector": [0.0] * 512} for row in large], 0.1)
    assert not psutil.pid_exists(stuck)
    assert own.pid() is None


def test_a_forked_process_has_a_checker_of_its_own(own: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_checker", own)
    own.warm()
    alive = own.pid()
    if (child := os.fork()) == 0:
        os._exit(0 if checker() is not own and checker().pid() is None else 1)
    assert os.waitpid(child, 0)[1] == 0
    checker().warm()  # would start another one for one that died
    assert checker().pid() == alive is not None


def test_it_dies_with_its_parent() -> None:
    """Given a process with a checker, when it is killed, then the checker is gone too."""
    code = (
        "from media_assets.checks.checker import checker; checker().warm(); print(checker().pid(), flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        orphan = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        assert psutil.wait_procs([orphan], timeout=30)[1] == []


def test_a_check_that_cannot_be_made_loses_no_item(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given a run whose checker dies and dies again, then it fails with that sentence after its items are stored and
    materialized; the next run checks them, without the library in its own process."""
    monkeypatch.setitem(sys.modules, "great_expectations", None)
    document = tmp_path / "note.txt"
    document.write_text("Boats leave the harbour at dawn.")
    ids = library.registry.add([found for found in discover([str(document)]) if isinstance(found, Upload)])
    job = dg.Definitions(
        assets=[build_group(DECODE, library.settings, library.models)],
        jobs=[dg.define_asset_job("job", dg.AssetSelection.assets("media"))],
        resources={"media": dg.ResourceDefinition(lambda _: library)},
    ).resolve_job_def("job")

    def run() -> dg.ExecuteInProcessResult:
        return job.execute_in_process(
            instance=instance,
            run_config={"ops": {DECODE.name: {"config": {"keys": ids}}}},
            tags=explicit_batch_tags(ids, library.settings),
            raise_on_error=False,
        )

    with dg.DagsterInstance.ephemeral() as instance:
        add_partitions(instance, library.settings, ids)
        with monkeypatch.context() as patched:
            killed = die_over_a_table(patched, times=2)
            patched.setattr(module, "_checker", own := Checker())
            failed = run()
            own.close()
        assert len(killed) == 2
        (failure,) = failed.get_step_failure_events()
        assert "CheckerDied: The checker process died on the rows of media (signal 9)" in str(failure)
        ((_, record),) = library.outcomes.load(ids).items()
        assert record.status.done
        page = instance.get_records_for_run(failed.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
        assert [record.partition_key for record in page.records] == ids
        checks = {check.check_name: check for check in run().get_asset_check_evaluations()}
        assert checks[EXPECTATIONS].passed
        assert checks[EXPECTATIONS].metadata["rows"].value == 1
