"""Given a file that takes its decoder over, then the kernel denies what decoding never does, and the batch goes on."""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from resources.decoding.client import Decoder
from resources.decoding.jail import MACHINES, filter_program
from resources.decoding.sources import localize
from resources.errors import Hostile, Internal, MediaError
from resources.settings import Decoding, Limits
from tests.hostile_decoder import ACTS

SAMPLES = Path(__file__).parents[1] / "samples" / "media"
LIMITS = Limits()
READS = "read its parent"  # the one act that looks like decoding: it opens a file

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in MACHINES, reason="the kernel's filter is for Linux"
)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoder]:
    """A decoder that does what the text of a file says."""
    monkeypatch.setattr("resources.decoding.pool.PROGRAM", "tests.hostile_decoder")
    made = Decoder(LIMITS, Decoding(workers=1))
    yield made
    made.close()


@pytest.mark.parametrize("act", ACTS)
def test_an_act_is_denied_recorded_and_harms_nobody(act: str, decoder: Decoder, tmp_path: Path) -> None:
    """Given a hostile file between two good ones, then it alone ends in an error that says so, and nothing happened."""
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("A text about a harbour.")
    bad.write_text(act)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert decoder.probe(localize(str(good), LIMITS.max_bytes)).facts.kind == "text"
    with pytest.raises(MediaError) as raised:
        decoder.probe(localize(str(bad), LIMITS.max_bytes))
    assert type(raised.value) is (Internal if act == READS else Hostile)
    assert raised.value.retryable is (act == READS)
    if act == READS:
        assert "Permission" in raised.value.message
    assert decoder.probe(localize(str(good), LIMITS.max_bytes)).facts.kind == "text"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    children = psutil.Process().children(recursive=True)
    assert len([child for child in children if "tests.hostile_decoder" in child.cmdline()]) == 1


def test_a_socket_could_be_opened_outside(tmp_path: Path) -> None:
    """Given this process, which no filter holds, then the acts are possible: their denial above is the jail's."""
    with socket.socket():
        pass
    (tmp_path / "written").write_text("x")
    (tmp_path / "written").unlink()
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_is_one_the_kernel_takes(machine: str) -> None:
    """Given either machine, then the program is whole instructions, no more than the kernel takes, and ends well."""
    program = filter_program(*MACHINES[machine], pid=1)
    assert len(program) % 8 == 0
    assert len(program) // 8 <= 4096
    assert program[-8:-6] == b"\x06\x00"
