"""Many things going wrong at once, against a calm run over the same media.

    python -m benchmarks.chaos [--items 100] [--seconds 240] [--kill-every 15] [--seed 7]

Photos, one in a hundred of them cut short, go through the decode group in batches of the planner, each in a process
of its own, with media and derived files on a real S3 server behind a proxy. In the chaotic run the proxy answers
some requests with 500 or cuts the connection's answer, worker processes are killed with -9 at random, and the Postgres
server is restarted, until a bounded time is over; then the rest is let run. At the end:

- every item is `ok`, `not_applicable`, or quarantined for its own fault (or for an input's);
- the stored tables are the same bytes as those of the calm run;
- nothing finished was computed again: an outcome is claimed anew only after its process was killed, its storage
  failed, or its input was not there.

Ends with one JSON line; exit 1 when one of these does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from PIL import Image

from jobs.planner import Batch, Planner
from resources import embedded_postgres
from resources.library import Library
from resources.registry import Upload, discover
from resources.settings import Settings
from tests.s3_server import ENVIRONMENT, REGION, client, s3_proxy, s3_server

PROJECT = Path(__file__).parents[1]
BUCKET = "chaos"
GROUP = "decode"
ASSETS = ("media", "frames", "audio")
ERROR_RATE = 0.02
ROUND_S = 0.5
WORKER = """
import sys, json
from cli.run import Work
from resources.library import Library
from rich.console import Console
library = Library.open(sys.argv[1])
work = Work(library, Console(stderr=True))
from media_assets.partitions import add_partitions, explicit_batch_tags
keys, careful = json.loads(sys.argv[2]), sys.argv[3] == "careful"
add_partitions(work.instance, library.settings, keys)
import dagster as dg
from media_assets.definitions import build
job = build(library).resolve_job_def("process_decode")
checks = [dg.AssetKey(name) for name in ("media", "frames", "audio")]
result = job.execute_in_process(
    instance=work.instance, tags=explicit_batch_tags(keys, library.settings), asset_selection=checks,
    run_config={"ops": {"decode": {"config": {"keys": keys, "careful": careful}}},
                "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}})
sys.exit(0 if result.success else 1)
"""


def photos(count: int, seed: int) -> dict[str, bytes]:
    """JPEG pictures by name; one in a hundred is cut short."""
    rng = np.random.default_rng(seed)
    made: dict[str, bytes] = {}
    for number in range(count):
        pixels = rng.integers(0, 255, (18, 24, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((960, 720)).save(file, "JPEG", quality=85)
        data = file.getvalue()
        made[f"{number:04d}.jpg"] = data[: len(data) // 3] if number % 100 == 50 else data
    return made


class System:
    """One library on S3 with a Postgres of its own, and the driver that does what the daemon does."""

    def __init__(self, home: Path, endpoint: str, prefix: str, rng: random.Random) -> None:
        self.home, self.endpoint, self.prefix, self.rng = home, endpoint, prefix, rng
        home.mkdir()
        self.settings_file()
        self.library = Library(Settings.load(home))
        self.workers: dict[int, tuple[Batch, subprocess.Popen[bytes]]] = {}
        self.kills = self.restarts = 0

    def settings_file(self) -> None:
        """Write the settings that the workers read."""
        (self.home / "settings.toml").write_text(
            f'storage_url = "s3://{BUCKET}/{self.prefix}"\n'
            f'[s3]\nendpoint_url = "{self.endpoint}"\nregion = "{REGION}"\nmax_attempts = 2\n'
            "[engine]\nbatch_items = 25\nretry_base_s = 1.0\nmax_attempts = 8\n"
            "[planner]\nmax_in_flight = 2\nmax_wait_s = 0.0\n"
        )

    def register(self) -> list[str]:
        """Register what is in the bucket."""
        found = discover([f"s3://{BUCKET}/media/"], self.library.settings.s3)
        return self.library.registry.add([upload for upload in found if isinstance(upload, Upload)])

    def run(self, chaos_s: float, kill_every_s: float, limit_s: float) -> float:
        """Drive the planner until nothing is left; returns the seconds it took."""
        started = last_kill = last_restart = time.monotonic()
        quiet = 0
        while quiet < 3:
            now = time.monotonic()
            if now - started > limit_s:
                raise SystemExit(f"not done after {limit_s:.0f} s: {self.planner_says()}")
            wild = now - started < chaos_s
            if wild and self.workers and now - last_kill > kill_every_s:
                last_kill = now
                self._kill(self.rng.choice(list(self.workers)))
            if wild and now - last_restart > 4 * kill_every_s:
                last_restart = now
                self._restart_postgres()
            try:
                busy = self._round()
            except sa.exc.OperationalError:
                continue  # the server is coming back
            quiet = 0 if busy else quiet + 1
            time.sleep(ROUND_S)
        return time.monotonic() - started

    def planner_says(self) -> str:
        """The planner's last words."""
        return str(self.library.backlog.notes())

    def _round(self) -> bool:
        for batch_id, (_, process) in list(self.workers.items()):
            if (code := process.poll()) is not None:
                self.library.backlog.ended(batch_id, "finished" if code == 0 else "failed", 1.0)
                del self.workers[batch_id]
        tick = Planner(self.library, (GROUP,)).tick()
        for batch in tick.batches:
            self.workers[batch.id or 0] = (batch, self._launch(batch))
        depth = self.library.backlog.depth(Planner(self.library, (GROUP,)).plan)
        return bool(self.workers or depth.ready or depth.waiting or depth.in_batches)

    def _launch(self, batch: Batch) -> subprocess.Popen[bytes]:
        mode = "careful" if batch.is_careful else "normal"
        command = [sys.executable, "-c", WORKER, str(self.home), json.dumps(batch.keys), mode]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MEDIA_", "DAGSTER_"))}
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=quiet, stderr=quiet)

    def _kill(self, batch_id: int) -> None:
        self.kills += 1
        os.kill(self.workers[batch_id][1].pid, signal.SIGKILL)

    def _restart_postgres(self) -> None:
        self.restarts += 1
        pid = int((self.home / "postgres" / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, signal.SIGINT)  # fast shutdown: every session is cut
        while _is_alive(pid):
            time.sleep(0.1)
        self.library.close()
        embedded_postgres.serve(self.home / "postgres")

    def faults(self, poison: set[str]) -> list[str]:
        """Outcomes that are neither done nor quarantined for their own fault."""
        wrong = []
        for row in self.library.outcomes.rows():
            if row["asset"] not in ASSETS or row["status"] in ("ok", "not_applicable"):
                continue
            own = row["media_id"] in poison and row["error_class"] in ("truncated", "undecodable", "upstream_failed")
            if (row["status"] != "quarantined" and row["error_class"] != "upstream_failed") or not own:
                wrong.append(f"{row['asset']} of {row['media_id']}: {row['status']} {row['error_class']}")
        return wrong

    def claimed_again(self) -> Counter[str]:
        """Why outcomes were claimed more than once: by the state that was left before."""
        query = sa.text(
            "select before, count(*) from (select status, lag(status) over w as before from outcome_history"
            " window w as (partition by media_id, asset order by id)) h"
            " where status = 'running' and before is not null group by 1"
        )
        with self.library.database.engine.connect() as connection:
            return Counter({row[0]: row[1] for row in connection.execute(query)})

    def close(self) -> None:
        """End workers and connections."""
        for _, process in self.workers.values():
            process.kill()
        self.library.close()


def tables(s3: Any, prefix: str) -> dict[str, str]:
    """SHA-256 of every stored table below a prefix, by its name there."""
    found: dict[str, str] = {}
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/"):
        for entry in page.get("Contents", ()):
            name = entry["Key"].removeprefix(f"{prefix}/")
            if name.split("/")[0] in ASSETS:
                data = s3.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
                found[name] = hashlib.sha256(data).hexdigest()
    return found


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    """Run both, compare, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=240.0, help="how long things go wrong at most")
    parser.add_argument("--kill-every", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    rng = random.Random(arguments.seed)
    errors = Counter[str]()

    def meddle(method: str, _path: str, body: bytes) -> bytes | int:
        if rng.random() < ERROR_RATE:
            errors[method] += 1
            return 500
        return body

    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, s3_server() as endpoint, s3_proxy(endpoint) as between:
        s3 = client(endpoint)
        s3.create_bucket(Bucket=BUCKET)
        for name, data in photos(arguments.items, arguments.seed).items():
            s3.put_object(Bucket=BUCKET, Key=f"media/{name}", Body=data)
        calm = System(Path(folder) / "calm", endpoint, "calm", rng)
        calm.register()
        calm_s = calm.run(0, 1e9, 1200)
        wild = System(Path(folder) / "wild", between.url, "wild", rng)
        ids = wild.register()
        poison = {key for key in ids if int(key[:4]) % 100 == 50}
        between.meddle = meddle
        wild_s = wild.run(arguments.seconds, arguments.kill_every, 2400)
        between.meddle = None
        wrong = wild.faults(poison) + calm.faults(poison)
        before, after = tables(s3, "calm"), tables(s3, "wild")
        different = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        again = wild.claimed_again()
        figures: dict[str, Any] = {
            "items": arguments.items,
            "poison": len(poison),
            "kills": wild.kills,
            "postgres_restarts": wild.restarts,
            "s3_errors": sum(errors.values()),
            "calm_s": round(calm_s, 1),
            "wild_s": round(wild_s, 1),
            "tables": len(before),
            "tables_different": len(different),
            "wrong_outcomes": len(wrong),
            "claimed_again_after": dict(again),
            "finished_again": again["ok"] + again["not_applicable"],
        }
        calm.close()
        wild.close()
    for name, value in figures.items():
        print(f"{name:>20}  {value}")
    for text in [*wrong, *different][:20]:
        print(f"  {text}")
    versions = {name: version(name) for name in ("media-assets", "dagster", "sqlalchemy")}
    print(json.dumps({"name": "chaos", **figures, "python": platform.python_version(), "versions": versions}))
    if wrong or different or figures["finished_again"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
