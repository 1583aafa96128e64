"""`folder_sensor`: files that appear, change and vanish below watched folders become uploads and removals."""

import hashlib
import time

import dagster as dg
from pydantic import ValidationError

from media_assets.orchestration.partitions import add_partitions
from resources.errors import printable
from resources.library import Library
from resources.settings import Settings
from sensors.folder_watch import Look, Memory, look, watched
from sensors.intervals import every, stay_s

NAME = "folder_sensor"
INTERVAL_S = 5
_LOOK_EVERY_S = 0.2  # within a tick
_REST = 4  # times a look's own duration: large folders are looked at less often
_LONGEST_REST_S = 300
_TOLD = 20
UNSET = "No folder is watched: set ingestion.folders, or start `media-assets dev FOLDER`."


def build_folder_sensor(settings: Settings) -> dg.SensorDefinition:
    """The sensor that watches `ingestion.folders`; it registers uploads and adds partitions, and requests no runs."""
    folders = watched(settings.ingestion.folders)

    @dg.sensor(
        name=NAME,
        minimum_interval_seconds=every(INTERVAL_S),
        default_status=dg.DefaultSensorStatus.RUNNING if folders else dg.DefaultSensorStatus.STOPPED,
        description="Registers new, changed and removed files below the watched folders.",
        required_resource_keys={"media"},
    )
    def folder_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        if not folders:
            return dg.SkipReason(UNSET)
        library: Library = context.resources.media
        memory = _memory(context)
        if time.time() < memory.rest_until <= time.time() + _LONGEST_REST_S:
            return dg.SkipReason(f"Looking takes long; the next look is in {memory.rest_until - time.time():.0f} s.")
        new = removed = 0
        end = time.monotonic() + stay_s(context.instance)
        while True:
            start = time.monotonic()
            found = look(folders, library.registry, memory, settings.ingestion, time.time())
            # Partitions first: one without an upload is harmless, an upload without its partition would stay so.
            add_partitions(context.instance, settings, [upload.media_id for upload in found.new])
            registered = library.registry.register(found.new, found.gone)
            new, removed = new + len(registered.new), removed + len(registered.removed)
            told = _warn(context, found, memory.told)
            took = time.monotonic() - start
            rest = min(_LONGEST_REST_S, _REST * took)
            memory = found.memory(told, time.time() + rest if took > 1 else 0.0)
            pause = max(_LOOK_EVERY_S, rest)
            if time.monotonic() + pause > end:
                break
            time.sleep(pause)
        skipped = dg.SkipReason(_summary(found, new, removed))
        return dg.SensorResult(skip_reason=skipped, cursor=memory.model_dump_json())

    return folder_sensor


def _memory(context: dg.SensorEvaluationContext) -> Memory:
    try:
        return Memory.model_validate_json(context.cursor) if context.cursor else Memory()
    except ValidationError:
        context.log.warning("The cursor is not of this version; files being written are watched anew.")
        return Memory()


def _summary(found: Look, new: int, removed: int) -> str:
    parts = [f"{found.files} files", f"{new} new", f"{removed} superseded or removed"]
    if found.unsettled:
        parts.append(f"{len(found.unsettled)} perhaps still being written")
    if found.deferred:
        parts.append(f"{found.deferred} left for the next looks")
    if held := sum(hold.missing for hold in found.holds.values()):
        parts.append(f"{held} missing, not yet believed")
    if found.problems:
        parts.append(f"{len(found.problems)} not readable")
    return ", ".join(parts) + "."


def _warn(context: dg.SensorEvaluationContext, found: Look, told: str) -> str:
    """Log what is wrong, once; returns what was told."""
    lines = found.warnings + [f"not read: {printable(p.path)}: {printable(p.reason)}" for p in found.problems]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] if lines else ""
    if digest != told:
        for line in lines[:_TOLD]:
            context.log.warning(line)
        if len(lines) > _TOLD:
            context.log.warning(f"and {len(lines) - _TOLD} more")
    return digest
