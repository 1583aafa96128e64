"""What a step computes on: the CPU, or GPUs that are its own while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from resources.compute import devices
from resources.compute.needs import Needs, micro_batch_scale
from resources.library import Library


@dataclass(frozen=True, slots=True)
class Processor:
    """`cpu` or `cuda`, and by how much micro-batches grow on it."""

    name: str = "cpu"
    scale: int = 1


@contextmanager
def processor(needs: Needs, library: Library, log: Callable[[str], None]) -> Iterator[Processor]:
    """The processor of a step with these needs. Raises DeviceUnavailable where a GPU is required and there is none.

    On one machine, runs share its GPUs out among themselves; on a cluster its scheduler has done that.
    """
    found = devices.candidates(needs, library.settings.profile)
    if not found:
        yield Processor()
    elif library.settings.compute.executor == "local":
        with devices.assigned(library.database.engine, needs, found, log) as mine:
            log(f"works on GPU {', '.join(str(device.index) for device in mine)}")
            yield _on(mine, needs)
    else:
        yield _on(found, needs)


def _on(found: tuple[devices.Device, ...], needs: Needs) -> Processor:
    devices.usable_by_torch()
    return Processor("cuda", micro_batch_scale(needs, min(device.memory_bytes for device in found)))
