"""The GPUs of this machine: which there are, and which of them a process works on."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import sqlalchemy as sa

from resources.compute.needs import Needs
from resources.errors import MediaError, ModelUnavailable, printable

VISIBLE = "CUDA_VISIBLE_DEVICES"
_LOCKS = 0x6D67  # advisory locks on devices: "mg"
_ANSWER_S = 20.0
_AGAIN_S = 2.0
_MEBIBYTE = 2**20


class DeviceUnavailable(MediaError):
    """A run needs a GPU, and there is none that can be used."""

    code, retryable, http_status = "device_unavailable", True, 503
    remedy = "Run it on a machine with a GPU, or set gpu_required = false for its group in [compute] of settings.toml."


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU: its number on this machine, the identity it has everywhere, and its memory in bytes."""

    index: int
    uuid: str
    memory_bytes: int


@cache
def present() -> tuple[Device, ...]:
    """The NVIDIA GPUs this process may use; none where there is no driver. Raises DeviceUnavailable.

    Asks `nvidia-smi`, so that neither torch nor CUDA is touched before a device is chosen. A driver that does not
    answer (a version mismatch after an upgrade, a card that fell off the bus) is an error, not an absence.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceUnavailable(f"nvidia-smi does not answer: {printable(str(error))}.") from error
    if answer.returncode != 0:
        said = printable((answer.stdout + answer.stderr).strip())
        raise DeviceUnavailable(
            f"The GPU driver does not work: {said}", "Mend or reinstall the driver, until nvidia-smi lists the GPUs."
        )
    return visible(_parsed(answer.stdout), os.environ)


def visible(devices: Sequence[Device], environment: Mapping[str, str]) -> tuple[Device, ...]:
    """Those of `devices` that CUDA_VISIBLE_DEVICES leaves, by number or identity, in its order; all without it."""
    if VISIBLE not in environment:
        return tuple(devices)
    named = {str(device.index): device for device in devices} | {device.uuid: device for device in devices}
    chosen: list[Device] = []
    for name in environment[VISIBLE].split(","):
        if name.strip() not in named:
            break  # as CUDA does: what follows an unknown name is not seen
        chosen.append(named[name.strip()])
    return tuple(chosen)


def _parsed(listing: str) -> list[Device]:
    found = []
    for line in filter(str.strip, listing.splitlines()):
        index, uuid, mebibytes = (part.strip() for part in line.split(","))
        # Cards that share the machine's memory do not tell how much they have.
        found.append(Device(int(index), uuid, int(mebibytes) * _MEBIBYTE if mebibytes.isdigit() else 0))
    return found


def kind(profile: str) -> str:
    """`cuda` where models of this profile find a GPU, else `cpu`. Raises DeviceUnavailable."""
    return "cuda" if profile != "offline" and present() else "cpu"


def candidates(needs: Needs, profile: str) -> tuple[Device, ...]:
    """The devices a step with these needs may choose from; none means the CPU. Raises DeviceUnavailable.

    The models of profile `offline` run on the CPU. A GPU with less memory than stated does not count; a driver that
    does not work is an error whether or not a GPU is required.
    """
    if not needs.gpus or profile == "offline":
        return ()
    found = present()
    wanted = count(needs)
    # Cards have a little less than their name says.
    enough = [device for device in found if device.memory_bytes >= 0.9 * needs.gpu_memory_bytes]
    if len(enough) >= wanted:
        return tuple(enough)
    if needs.gpu_required:
        size = f" with {needs.gpu_memory_bytes / 2**30:g} GiB" if needs.gpu_memory_bytes else ""
        there = f"{len(enough)} of {len(found)} on this machine will do" if found else "this machine has none"
        raise DeviceUnavailable(f"{wanted} GPU(s){size} needed, {there}.")
    return ()


def count(needs: Needs) -> int:
    """Devices a step occupies on one machine; of a fraction, one."""
    return max(1, int(needs.gpus))


_mine: tuple[Device, ...] = ()


@contextmanager
def assigned(
    engine: sa.Engine, needs: Needs, devices: Sequence[Device], waits: Callable[[str], None]
) -> Iterator[tuple[Device, ...]]:
    """Have as many of `devices` as needed for oneself, across all processes on the database, and show CUDA only those.

    A device is held by an advisory lock of a database session, so that it is free the moment its process dies. CUDA
    reads CUDA_VISIBLE_DEVICES once, when it starts: a process therefore stays with the devices it got first. While
    all are taken, `waits` is told, once, and this blocks.
    """
    global _mine
    wanted = [*_mine] or sorted(devices, key=lambda device: device.index)
    most = min(count(needs), len(wanted))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        told = False
        while len(got := _lock(connection, wanted, most)) < most:
            if not told:
                waits(f"waits for {most} of the GPUs {', '.join(str(device.index) for device in wanted)}")
                told = True
            time.sleep(_AGAIN_S)
        try:
            if not _mine:
                os.environ[VISIBLE] = ",".join(device.uuid for device in got)
                _mine = got
            yield got
        finally:
            _unlock(connection, got)


def _lock(connection: sa.Connection, devices: Sequence[Device], count: int) -> tuple[Device, ...]:
    """The first `count` devices nobody else has, or none: holding a part while waiting could block two for ever."""
    got: list[Device] = []
    for device in devices:
        if (
            len(got) < count
            and connection.execute(
                sa.text("select pg_try_advisory_lock(:space, :key)"), {"space": _LOCKS, "key": _key(device)}
            ).scalar()
        ):
            got.append(device)
    if len(got) < count:
        _unlock(connection, got)
        return ()
    return tuple(got)


def _unlock(connection: sa.Connection, devices: Sequence[Device]) -> None:
    for device in devices:
        values = {"space": _LOCKS, "key": _key(device)}
        connection.execute(sa.text("select pg_advisory_unlock(:space, :key)"), values)


def _key(device: Device) -> int:
    digest = hashlib.blake2b(device.uuid.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big", signed=True)


def for_torch(wanted: str) -> str:
    """The device of a torch model whose entry says `auto`, `cpu` or `cuda`: `auto` is cuda where torch finds a GPU.

    Raises ModelUnavailable for `cuda` where it finds none. Imports torch and starts CUDA, unless it is the CPU.
    """
    if wanted not in ("auto", "cpu", "cuda"):
        raise ModelUnavailable(f"There is no device {printable(wanted)!r}.", 'Say "auto", "cpu" or "cuda".')
    if wanted == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise ModelUnavailable("The model wants a GPU, and torch finds none.", 'Set its device to "auto" or "cpu".')
    return "cpu"


def usable_by_torch() -> None:
    """Raise DeviceUnavailable where torch cannot use the GPU that is there. Imports torch and starts CUDA."""
    import torch

    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        raise DeviceUnavailable(
            f"The driver lists a GPU, but torch {torch.__version__}, built for {built}, cannot use it.",
            "Install a driver for that CUDA version or a torch for this driver.",
        )
