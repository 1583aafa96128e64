"""The comparison with other libraries counts what was lost and done twice, and tells answers that differ."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.peers import daft_frame, ours, ray_data
from benchmarks.peers.__main__ import Killer, Outcome, _rows, accounted, cosine, word_error
from benchmarks.peers.options import Options
from benchmarks.peers.work import TASKS


def _call(pid: int, start_s: float, names: list[str]) -> dict[str, Any]:
    return {"pid": pid, "start_s": start_s, "end_s": start_s + 1.0, "names": names}


def _outcome(calls: list[dict[str, Any]], rows: list[str], code: int = 0) -> Outcome:
    return Outcome(code, 9.0, 8.0, 7.0, calls, {name: {"text": ""} for name in rows}, "")


def test_a_retried_batch_counts_as_done_twice_and_a_missing_row_as_lost() -> None:
    calls = [_call(1, 10.0, ["a", "b"]), _call(2, 10.5, ["c"]), _call(2, 13.0, ["b", "bad"])]
    outcome = _outcome(calls, ["a", "b", "bad"])
    assert outcome.work_s == 4.0
    found = accounted(["a", "b", "c"], outcome)
    assert found == {"succeeded": True, "answered": 2, "lost": 1, "done_twice": 1, "whole_s": 9.0}
    assert accounted(["a"], _outcome([], [], code=1)) == {**found, "succeeded": False, "answered": 0, "done_twice": 0}


def test_rows_without_an_answer_are_no_answers(tmp_path: Path) -> None:
    vectors = pa.array([[0.6, 0.8], None], TASKS["images"].answer.field("joint").type)
    table = pa.table({"path": ["/x/a.jpg", "file:///x/b.jpg"], "joint": vectors})
    pq.write_table(table, tmp_path / "part-0.parquet")
    assert list(_rows(tmp_path)) == ["a.jpg"]


def test_answers_that_differ_are_told() -> None:
    one, other = {"a": {"joint": [1.0, 0.0]}}, {"a": {"joint": [0.6, 0.8]}}
    assert (cosine(one, one), cosine(one, other), cosine(one, {})) == (1.0, pytest.approx(0.6), -1.0)
    said = {"a": {"text": "four words were said"}, "quiet": {"text": ""}}
    assert word_error(said, said) == 0.0
    assert word_error(said, said | {"a": {"text": "four words were heard"}}) == 0.25
    assert word_error(said, said | {"quiet": {"text": "thank you"}}) == 1.0
    assert word_error(said, {"a": said["a"]}) == 1.0


def test_the_worker_that_answered_last_is_killed_once_a_third_is_answered(tmp_path: Path) -> None:
    first, last = (subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2))
    try:
        (tmp_path / "1.jsonl").write_text(json.dumps(_call(first.pid, 1.0, ["a"])) + "\n" + '{"pid": half a line')
        kill = Killer(6)
        assert not kill(psutil.Process(), tmp_path, tmp_path)
        (tmp_path / "2.jsonl").write_text(json.dumps(_call(last.pid, 2.0, ["b"])) + "\n")
        assert kill(psutil.Process(), tmp_path, tmp_path)
        assert last.wait(10) == -signal.SIGKILL
        assert first.poll() is None
    finally:
        first.kill()
        last.kill()


@pytest.mark.parametrize("variant", [ours, ray_data, daft_frame])
def test_every_variant_takes_the_same_options(variant: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["images", "in", "out", "events", "home", "--workers", "2", "--threads", "1", "--cores", "2", "--tolerant"]
    monkeypatch.setattr(sys, "argv", [variant.__name__, *given])
    assert variant.options(variant.__doc__) == Options("images", "in", "out", "events", "home", 2, 1, 2, True)
    monkeypatch.setattr(sys, "argv", [variant.__name__, "video", *given[1:]])
    with pytest.raises(SystemExit):
        variant.options(variant.__doc__)
