"""One library under test and the driver that does what the daemon does: the planner, and a process per batch."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import sqlalchemy as sa

from jobs.planner import Batch, Planner
from resources.errors import MediaError
from resources.ingest.discovery import discover
from resources.ingest.uploads import Upload
from resources.library import Library
from resources.records import embedded_postgres
from resources.settings import Settings

PROJECT = Path(__file__).parents[1]
ROUND_S = 0.5
QUIET_ROUNDS = 3
OWN_FAULTS = ("truncated", "undecodable", "upstream_failed")
WORKER = """
import sys, json
from cli.run import Work
from resources.library import Library
from rich.console import Console
library = Library.open(sys.argv[1])
work = Work(library, Console(stderr=True))
from media_assets.orchestration.partitions import add_partitions, explicit_batch_tags
group, keys, careful = sys.argv[2], json.loads(sys.argv[3]), sys.argv[4] == "careful"
add_partitions(work.instance, library.settings, keys)
import dagster as dg
from media_assets.definitions import build
from media_assets.orchestration.grouping import groups
(stages,) = [one.load(library.settings, library.models) for one in groups(library.settings) if one.name == group]
result = build(library).resolve_job_def(f"process_{group}").execute_in_process(
    instance=work.instance, tags=explicit_batch_tags(keys, library.settings),
    asset_selection=[dg.AssetKey(stage.name) for stage in stages],
    run_config={"ops": {group: {"config": {"keys": keys, "careful": careful}}},
                "loggers": {"console": {"config": {"log_level": "CRITICAL"}}}})
sys.exit(0 if result.success else 1)
"""


class System:
    """One library with a Postgres of its own, whose settings are the text `settings`."""

    def __init__(self, home: Path, settings: str, groups: Sequence[str], rng: random.Random) -> None:
        self.home, self.groups, self.rng = home, tuple(groups), rng
        home.mkdir(mode=0o700)
        (home / "settings.toml").write_text(settings)
        self.library = Library(Settings.load(home))
        self.assets = [stage.name for stages in Planner(self.library, self.groups).stages.values() for stage in stages]
        self.workers: dict[int, tuple[Batch, subprocess.Popen[bytes]]] = {}
        self.faults: Callable[[Batch], str] = lambda _: ""
        self.happened: Counter[str] = Counter()

    def register(self, place: str) -> list[str]:
        """Register what is at a place."""
        found = discover([place], self.library.settings.s3)
        return self.library.registry.add([upload for upload in found if isinstance(upload, Upload)])

    def run(self, disturb: Callable[[float], bool], limit_s: float) -> float:
        """Drive the planner until nothing is left; returns the seconds it took.

        `disturb` is called each round with the seconds so far, and says whether more is to come.
        """
        started = time.monotonic()
        quiet = 0
        while quiet < QUIET_ROUNDS:
            elapsed = time.monotonic() - started
            if elapsed > limit_s:
                raise SystemExit(f"not done after {limit_s:.0f} s: {self.library.backlog.notes()}")
            more = disturb(elapsed)
            try:
                busy = self._round()
            except (sa.exc.DBAPIError, MediaError, OSError) as error:
                self.happened[f"the driver: {type(error).__name__}"] += 1
                self._revive()
                busy = True
            quiet = 0 if busy or more else quiet + 1
            time.sleep(ROUND_S)
        return time.monotonic() - started

    def _round(self) -> bool:
        for batch_id, (batch, process) in list(self.workers.items()):
            if (code := process.poll()) is not None:
                if code == -signal.SIGKILL and "models.loading" in self.faults(batch):
                    self.happened["kills while a model loads"] += 1
                self.library.backlog.ended(batch_id, "finished" if code == 0 else "failed", 1.0)
                del self.workers[batch_id]
        for record in self.library.backlog.open_batches():
            if record.id not in self.workers:  # made by a tick that broke off; the planner's sensor does so, later
                self.library.backlog.ended(record.id, "lost", 1.0)
        tick = Planner(self.library, self.groups).tick()
        for batch in tick.batches:
            self.workers[batch.id or 0] = (batch, self._launch(batch))
        depth = self.library.backlog.depth(Planner(self.library, self.groups).plan)
        return bool(self.workers or depth.ready or depth.waiting or depth.in_batches)

    def _launch(self, batch: Batch) -> subprocess.Popen[bytes]:
        mode = "careful" if batch.is_careful else "normal"
        command = [sys.executable, "-c", WORKER, str(self.home), batch.group, json.dumps(batch.keys), mode]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MEDIA_", "DAGSTER_"))}
        if fault := self.faults(batch):
            environment["MEDIA_FAULT"] = fault
        quiet = subprocess.DEVNULL
        return subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=quiet, stderr=quiet)

    def kill_one(self) -> bool:
        """Kill a worker, if there is one; whether there was."""
        if not self.workers:
            return False
        self.happened["kills"] += 1
        os.kill(self.workers[self.rng.choice(list(self.workers))][1].pid, signal.SIGKILL)
        return True

    def restart_postgres(self) -> bool:
        """Cut every session of the server, and start it again; whether it ran."""
        try:
            pid = int((self.home / "postgres" / "postmaster.pid").read_text().splitlines()[0])
        except OSError:
            return False
        self.happened["restarts of PostgreSQL"] += 1
        os.kill(pid, signal.SIGINT)  # fast shutdown
        while _is_alive(pid):
            time.sleep(0.1)
        self._revive()
        return True

    def _revive(self) -> None:
        """See that the server runs, if it can."""
        self.library.close()
        try:
            embedded_postgres.serve(self.home / "postgres")
        except MediaError as error:
            self.happened[f"the server: {type(error).__name__}"] += 1

    def wrong(self, poison: set[str]) -> list[str]:
        """Outcomes that are neither done nor quarantined for their own fault."""
        found = []
        for row in self.library.outcomes.rows():
            if row["asset"] not in self.assets or row["status"] in ("ok", "not_applicable"):
                continue
            own = row["media_id"] in poison and row["error_class"] in OWN_FAULTS
            if (row["status"] != "quarantined" and row["error_class"] != "upstream_failed") or not own:
                found.append(f"{row['asset']} of {row['media_id']}: {row['status']} {row['error_class']}")
        return found

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
            process.wait()
        self.library.close()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
