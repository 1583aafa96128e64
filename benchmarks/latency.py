"""From a file that lands in a watched folder to a search that finds it, on an idle local system, step by step.

    python benchmarks/latency.py [FILE] [--interval 5] [--models HOME]

Starts `media-assets dev` on an empty folder, waits until its sensors tick, copies FILE into the folder and follows it:
seen by the folder sensor, planned, run and finished in each group, the library rebuilt, found by a search for what
looks like it. Ends with one JSON line; seconds count from the moment the file was complete.
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
from resources.errors import MediaError
from resources.library import Library
from resources.settings import Settings

PROJECT = Path(__file__).parents[1]
DEADLINE_S = 900.0
GROUPS = ("decode", "analyse", "label")


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
        time.sleep(0.25)
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
    """Seconds from `start` to what the records tell of."""
    with library.database.engine.connect() as connection:

        def one(query: str) -> float | None:
            value = connection.execute(sa.text(query), {"id": media_id}).scalar()
            return None if value is None else round(float(value) - start, 2)

        told = {"registered": one("select extract(epoch from discovered_at) from uploads where media_id = :id")}
        batch = "select min(extract(epoch from {}_at)) from batches where \"group\" = '{}'"
        for group in GROUPS:
            told[f"{group} planned"] = one(batch.format("created", group))
            run = "select min({}) from runs where run_id in (select run_id from batches where \"group\" = '{}')"
            told[f"{group} run began"] = one(run.format("start_time", group))
            told[f"{group} run ended"] = one(run.format("end_time", group))
        rebuild = "select {} from runs where pipeline_name = 'rebuild' and status = 'SUCCESS'"
        told["rebuild began"] = one(rebuild.format("max(start_time)"))
        told["rebuild ended"] = one(rebuild.format("max(end_time)"))
        told["model seconds"] = one("select sum(seconds) from outcomes where media_id = :id")
    told["model seconds"] = round((told["model seconds"] or 0.0) + start, 2)
    return {name: value for name, value in told.items() if value is not None}


def main() -> None:
    """Follow one file; print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default=str(next((PROJECT / "samples" / "media" / "photos").iterdir())))
    parser.add_argument("--interval", type=int, default=5, help="seconds between two ticks of the planner")
    parser.add_argument("--models", help="a home whose model cache is used, so that nothing is built in the clock")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="latency-", ignore_cleanup_errors=True) as folder:
        home, watched, port = Path(folder) / "home", Path(folder) / "watched", free_port()
        home.mkdir()
        watched.mkdir()
        if arguments.models:
            (home / "models").symlink_to(Path(arguments.models, "models").resolve())
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
            target = watched / Path(arguments.file).name
            shutil.copyfile(arguments.file, target)
            start = time.time()
            rows = wait("registered", opened.registry.live)
            media_id = rows[0]["media_id"]
            print(f"{media_id} is registered", flush=True)
            wait("searchable", lambda: found(opened, media_id))
            seconds = round(time.time() - start, 2)
            figures: dict[str, Any] = {
                "file": target.name,
                "planner_interval_s": arguments.interval,
                "timeline_s": timeline(opened, media_id, start) | {"searchable": seconds},
            }
        finally:
            if library is not None:
                library.close()
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    for name, value in figures["timeline_s"].items():
        print(f"{name:>20}  {value:8.2f}")
    versions = {name: version(name) for name in ("media-assets", "dagster")}
    print(json.dumps({"name": "latency", **figures, "python": platform.python_version(), "versions": versions}))


if __name__ == "__main__":
    main()
