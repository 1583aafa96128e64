"""From a file that lands in a watched folder to a search that finds it, on an idle local system, step by step.

    python benchmarks/latency.py [FILE …] [--interval 5] [--models HOME]

Starts `media-assets dev` on an empty folder, waits until its sensors tick, copies each FILE into the folder, one
after another, and follows it: seen by the folder sensor, planned, run, found by a search for what looks like it. The
first one finds no model loaded (cold), the others a warm worker. Ends with one JSON line; seconds count from the moment
a file was complete.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from cli.searching import open_search
from media_assets.orchestration.groups import LOADED_TAG
from resources.errors import MediaError
from resources.library import Library
from resources.settings import Settings

PROJECT = Path(__file__).parents[1]
DEADLINE_S = 900.0


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait(what: str, ready: Any) -> Any:
    """The first true answer of `ready`."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        if answer := ready():
            return answer
        time.sleep(0.1)
    raise SystemExit(f"{what}: not within {DEADLINE_S:.0f} s")


def serves(port: int) -> bool:
    """Whether the UI answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/server_info", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def found(library: Library, media_id: str) -> bool:
    """Whether a search knows the item."""
    try:
        open_search(library).similar(media_id)
    except MediaError:
        return False
    return True


def timeline(library: Library, media_id: str, start: float) -> dict[str, float]:
    """Seconds from `start` to what the records tell of, and the seconds the stages took."""
    told: dict[str, float] = {}
    with library.database.engine.connect() as connection:

        def tell(name: str, query: str, **values: object) -> None:
            value = connection.execute(sa.text(query), {"id": media_id, "start": start, **values}).scalar()
            if value is not None:
                told[name] = round(float(value), 2)

        tell("registered", "select extract(epoch from discovered_at) - :start from uploads where media_id = :id")
        run_ids = "select distinct run_id from outcomes where media_id = :id"
        runs = connection.execute(
            sa.text(
                "select pipeline_name, run_id, start_time, end_time from runs"
                f" where run_id in ({run_ids}) or (pipeline_name = 'rebuild' and start_time > :start)"
                " order by start_time"
            ),
            {"id": media_id, "start": start},
        ).all()
        for job, run_id, began, ended in runs:
            name = job.removeprefix("process_")
            created = "select extract(epoch from created_at) - :start from batches where run_id = :run"
            tell(f"{name} planned", created, run=run_id)
            told[f"{name} run began"] = round(began - start, 2)
            if ended is not None:
                told[f"{name} run ended"] = round(ended - start, 2)
        tell("stages, seconds of work", "select sum(seconds) from outcomes where media_id = :id")
        loaded = f"select sum(value::int) from run_tags where key = '{LOADED_TAG}' and run_id in ({run_ids})"
        tell("models loaded", loaded)
    return told


def main() -> None:
    """Follow one file; print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    photos = sorted((PROJECT / "samples" / "media" / "photos").iterdir())[:3]
    parser.add_argument("files", nargs="*", default=[str(photo) for photo in photos])
    parser.add_argument("--interval", type=int, default=5, help="seconds between two ticks of the planner")
    parser.add_argument("--models", help="a home whose model cache is used, so that nothing is built in the clock")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="latency-", ignore_cleanup_errors=True) as folder:
        home, watched, port = Path(folder) / "home", Path(folder) / "watched", free_port()
        home.mkdir()
        watched.mkdir()
        if arguments.models:
            (home / "models").symlink_to(Path(arguments.models, "models").resolve(strict=True))
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MEDIA_", "DAGSTER_"))}
        environment["MEDIA_PLANNER__INTERVAL_S"] = str(arguments.interval)
        command = [sys.executable, "-m", "cli.main", "dev", str(watched), "--home", str(home), "--port", str(port)]
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=log, stderr=log)
        library: Library | None = None
        try:
            wait("the UI answers", lambda: serves(port))
            library = Library(Settings(home=home))
            opened = library
            wait("the planner ticks", opened.backlog.notes)
            uploads = [follow(opened, Path(name), watched) for name in arguments.files]
        finally:
            if library is not None:
                library.close()
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    cold, *warm = [upload["searchable_s"] for upload in uploads]
    figures = {"planner_interval_s": arguments.interval, "uploads": uploads}
    if warm:
        figures["warm_to_cold"] = round(sum(warm) / len(warm) / cold, 3)
    versions = {name: version(name) for name in ("media-assets", "dagster")}
    print(json.dumps({"name": "latency", **figures, "python": platform.python_version(), "versions": versions}))


def follow(library: Library, file: Path, watched: Path) -> dict[str, Any]:
    """Upload one file, wait until a search finds it, print its way."""
    known = {row["media_id"] for row in library.registry.live()}
    aside = watched.parent / file.name
    shutil.copyfile(file, aside)
    start = time.time()
    aside.rename(watched / file.name)

    def fresh() -> str | None:
        return next((row["media_id"] for row in library.registry.live() if row["media_id"] not in known), None)

    media_id = wait("registered", fresh)
    wait("searchable", lambda: found(library, media_id))
    seconds = round(time.time() - start, 2)
    # The run's end is recorded after what it made.
    wait("the run ends", lambda: not library.backlog.open_batches())
    way = timeline(library, media_id, start)
    print(f"{file.name}")
    for name, value in (way | {"searchable": seconds}).items():
        print(f"{name:>28}  {value:8.2f}", flush=True)
    return {"file": file.name, "searchable_s": seconds, "timeline_s": way}


if __name__ == "__main__":
    main()
