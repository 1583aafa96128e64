"""Tuned micro-batches: what `media-assets tune` measured on this machine, kept in `<home>/tuning.json`."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resources.compute.devices import kind
from resources.compute.process import usable_cpus
from resources.errors import MediaError
from resources.files.local import replacing
from resources.models.registry import ModelSpec
from resources.settings import Settings

FILE = "tuning.json"


class TuningUnreadable(MediaError):
    """`tuning.json` is not what `media-assets tune` writes."""

    code = "tuning_unreadable"
    remedy = "Remove the file, or run media-assets tune again."


@dataclass(frozen=True, slots=True)
class Tuned:
    """The fastest micro-batch of some models on one device: units per call, and units per second then."""

    batch_size: int
    units_per_s: float


def device_name(settings: Settings) -> str:
    """The device models run on, as exactly as its speed and memory go: the GPU's name, or processor and cores."""
    if kind(settings.profile) == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    return f"{platform.processor() or platform.machine()}, {usable_cpus()} cores"


def tuned(settings: Settings, specs: Sequence[ModelSpec]) -> Tuned | None:
    """What was measured for these models together on this device, if anything. Raises TuningUnreadable."""
    path = settings.home / FILE
    if not path.exists():
        return None
    entry = _read(path).get(_key(settings, specs))
    return None if entry is None else Tuned(**entry)


def record(settings: Settings, specs: Sequence[ModelSpec], found: Tuned) -> Path:
    """Keep `found`, in place of an earlier measurement; the file is replaced in one step. Raises TuningUnreadable."""
    path = settings.home / FILE
    entries = {**(_read(path) if path.exists() else {}), _key(settings, specs): asdict(found)}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(entries, indent=1, sort_keys=True))
    return path


def _key(settings: Settings, specs: Sequence[ModelSpec]) -> str:
    return f"{' + '.join(spec.identity for spec in specs)} on {device_name(settings)}"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(path.read_text())
        for entry in entries.values():
            size = Tuned(**entry).batch_size
            if not isinstance(size, int) or size < 1:
                raise ValueError("no number of units")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TuningUnreadable(f"{path} cannot be read ({type(error).__name__}).") from error
    return dict(entries)
