"""Many things going wrong at once, against a calm run over the same media.

    python -m benchmarks.chaos [--scenario store|disk] [--items 100] [--seconds 240] [--kill-every 15] [--seed 7]

Photos, one in a hundred of them cut short, go through the groups in batches of the planner, each batch in a process of
its own, until a bounded time of faults is over; then the rest is let run. Worker processes are killed with -9 at random
and the PostgreSQL server is restarted. Besides:

- `store`: media and derived files of the decode group are on a real S3 server, behind a proxy that answers some
  requests with 500;
- `disk`: the home, database and all, of the decode and the analyse group is on a disk that is slow for some processes,
  full for a while and gone for a while; some processes die while a model loads. Needs root (for the mounts).

At the end

- every item is `ok`, `not_applicable`, or quarantined for its own fault (or for an input's);
- the stored tables are those of the calm run: the same bytes, or numbers of models that differ by rounding;
- nothing finished was computed again: an outcome is claimed anew only after its process was killed, its storage
  failed, or its input was not there.

Ends with one JSON line per scenario; exit 1 when one of these does not hold.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.bad_disk import INSIDE, BadDisk, enter_namespace
from benchmarks.chaos_system import System
from jobs.planner import Batch
from tests.s3_server import ENVIRONMENT, REGION, client, s3_proxy, s3_server

BUCKET = "chaos"
ERROR_RATE = 0.02
SLOW_MS = 300
DISK_MB = 700
TOLERANCE = 2e-3
"""Of a model's numbers: a picture among others in its micro-batch is summed in another order."""
ENGINE = (
    "[engine]\nbatch_items = 25\nretry_base_s = 1.0\nmax_attempts = 8\n[planner]\nmax_in_flight = 2\nmax_wait_s = 0.0\n"
)
Tables = dict[str, bytes]


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


class Disturbances:
    """What befalls a system until `seconds` are over; `more` maps the names of further troubles to their doers."""

    def __init__(
        self, system: System, seconds: float, kill_every_s: float, more: dict[str, Callable[[], None]]
    ) -> None:
        self._system, self._seconds, self._every_s = system, seconds, kill_every_s
        self._more = list(more.items())
        self._killed_s = self._restarted_s = 0.0
        self._done = 0

    def __call__(self, elapsed_s: float) -> bool:
        """Do what is due; whether more is to come."""
        if elapsed_s < self._seconds:
            if elapsed_s - self._killed_s > self._every_s and self._system.kill_one():
                self._killed_s = elapsed_s
            if elapsed_s - self._restarted_s > 4 * self._every_s and self._system.restart_postgres():
                self._restarted_s = elapsed_s
        while self._done < len(self._more) and elapsed_s > self._seconds * (self._done + 1) / (len(self._more) + 1):
            name, do = self._more[self._done]
            self._done += 1
            self._system.happened[name] += 1
            do()
        return elapsed_s < self._seconds


def calm(_: float) -> bool:
    """Nothing happens."""
    return False


@contextmanager
def store(
    arguments: argparse.Namespace, folder: Path, rng: random.Random
) -> Iterator[tuple[System, System, Tables, Tables]]:
    """The calm and the disturbed system and their tables, with media and derived files on S3."""
    errors: Counter[str] = Counter()

    def meddle(method: str, _path: str, body: bytes) -> bytes | int:
        if rng.random() < ERROR_RATE:
            errors[method] += 1
            return 500
        return body

    def settings(endpoint: str, prefix: str) -> str:
        reached = f'[s3]\nendpoint_url = "{endpoint}"\nregion = "{REGION}"\nmax_attempts = 2\n'
        return f'storage_url = "s3://{BUCKET}/{prefix}"\n{reached}{ENGINE}'

    with s3_server() as endpoint, s3_proxy(endpoint) as between:
        s3 = client(endpoint)
        s3.create_bucket(Bucket=BUCKET)
        for name, data in photos(arguments.items, arguments.seed).items():
            s3.put_object(Bucket=BUCKET, Key=f"media/{name}", Body=data)
        quiet = System(folder / "calm", settings(endpoint, "calm"), ("decode",), rng)
        wild = System(folder / "wild", settings(between.url, "wild"), ("decode",), rng)
        for system in (quiet, wild):
            system.register(f"s3://{BUCKET}/media/")
        quiet.happened["seconds"] = round(quiet.run(calm, 1200))
        between.meddle = meddle
        trouble = Disturbances(wild, arguments.seconds, arguments.kill_every, {})
        wild.happened["seconds"] = round(wild.run(trouble, 2400))
        between.meddle = None
        wild.happened["errors of S3"] = sum(errors.values())
        yield quiet, wild, _objects(s3, "calm", quiet), _objects(s3, "wild", wild)


@contextmanager
def disk(
    arguments: argparse.Namespace, folder: Path, rng: random.Random
) -> Iterator[tuple[System, System, Tables, Tables]]:
    """The calm and the disturbed system and their tables, the latter's home on a bad disk."""
    media, models = folder / "media", folder / "models"
    for place in (media, models):
        place.mkdir()
    for name, data in photos(arguments.items, arguments.seed).items():
        (media / name).write_bytes(data)
    bad = BadDisk(folder, DISK_MB)
    try:
        systems = []
        for home in (folder / "calm", bad.path / "wild"):
            system = System(home, ENGINE, ("decode", "analyse"), rng)
            (home / "models").symlink_to(models)
            system.register(str(media))
            systems.append(system)
        quiet, wild = systems
        quiet.happened["seconds"] = round(quiet.run(calm, 2400))
        chosen: dict[int, str] = {}

        def faults(batch: Batch) -> str:
            dies = f"models.loading:kill:{rng.randint(1, 3)}" if batch.group == "analyse" else ""
            told = rng.choice([dies, dies, f"storage.before_rename:slow:{SLOW_MS}", ""])
            return chosen.setdefault(batch.id or 0, told)

        def settle() -> None:
            wild.faults = lambda batch: chosen.get(batch.id or 0, "")

        wild.faults = faults
        troubles = {"disk full": bad.fill, "disk empty again": bad.empty, "disk gone": bad.vanish}
        troubles |= {"disk back": bad.come_back, "no more faults in workers": settle}
        wild.happened["seconds"] = round(
            wild.run(Disturbances(wild, arguments.seconds, arguments.kill_every, troubles), 3600)
        )
        wild.happened["slow workers"] = sum("slow" in told for told in chosen.values())
        yield quiet, wild, _files(quiet), _files(wild)
    finally:
        bad.close()


def _objects(s3: Any, prefix: str, system: System) -> Tables:
    """Every stored table below a prefix, by its name there."""
    found: Tables = {}
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/"):
        for entry in page.get("Contents", ()):
            name = entry["Key"].removeprefix(f"{prefix}/")
            if name.split("/")[0] in system.assets:
                found[name] = s3.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read()
    return found


def _files(system: System) -> Tables:
    """Every stored table of a home, by its name there."""
    root = system.home / "derived"
    files = [path for asset in system.assets for path in (root / asset).rglob("*.parquet")]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def same(one: bytes | None, other: bytes | None) -> bool:
    """Whether two stored tables are equal, numbers of models up to rounding."""
    if one is None or other is None:
        return False
    if one == other:
        return True
    first, second = pq.read_table(pa.BufferReader(one)), pq.read_table(pa.BufferReader(other))
    return first.schema.equals(second.schema) and all(
        _alike(first.column(name), second.column(name)) for name in first.column_names
    )


def _alike(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    if one.equals(other):
        return True
    while pa.types.is_list(one.type) or pa.types.is_fixed_size_list(one.type):
        one, other = (
            pa.chunked_array(one).combine_chunks().flatten(),
            pa.chunked_array(other).combine_chunks().flatten(),
        )
    is_number = pa.types.is_floating(one.type) and len(one) == len(other)
    return is_number and bool(np.allclose(one.to_numpy(), other.to_numpy(), atol=TOLERANCE, equal_nan=True))


SCENARIOS = {"store": store, "disk": disk}


def measure(name: str, arguments: argparse.Namespace) -> bool:
    """Run a scenario and print its figures; whether all held."""
    rng = random.Random(arguments.seed)
    with (
        tempfile.TemporaryDirectory(prefix="chaos-") as folder,
        SCENARIOS[name](arguments, Path(folder), rng) as (quiet, wild, before, after),
    ):
        poison = {row["media_id"] for row in wild.library.registry.live() if _is_poison(row["uri"])}
        wrong = wild.wrong(poison) + quiet.wrong(poison)
        different = sorted(key for key in before.keys() | after.keys() if not same(before.get(key), after.get(key)))
        again = wild.claimed_again()
        figures: dict[str, Any] = {
            "scenario": name,
            "items": arguments.items,
            "poison": len(poison),
            "calm_s": quiet.happened.pop("seconds"),
            "wild_s": wild.happened.pop("seconds"),
            "happened": dict(wild.happened),
            "tables": len(before),
            "tables_different": len(different),
            "wrong_outcomes": len(wrong),
            "claimed_again_after": dict(again),
            "finished_again": again["ok"] + again["not_applicable"],
        }
        for system in (quiet, wild):
            system.close()
    for key, value in figures.items():
        print(f"{key:>20}  {value}")
    for text in [*wrong, *different][:20]:
        print(f"  {text}")
    versions = {package: version(package) for package in ("media-assets", "dagster", "sqlalchemy")}
    print(json.dumps({"name": "chaos", **figures, "python": platform.python_version(), "versions": versions}))
    return not (wrong or different or figures["finished_again"])


def _is_poison(uri: str) -> bool:
    return int(Path(uri).stem) % 100 == 50


def main() -> None:
    """Run the scenarios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=SCENARIOS, action="append", help="default: all of them")
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=240.0, help="how long things go wrong at most")
    parser.add_argument("--kill-every", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    chosen = arguments.scenario or list(SCENARIOS)
    if "disk" in chosen:
        enter_namespace("benchmarks.chaos")
        if INSIDE not in os.environ:
            print("The scenario `disk` is left out: only root may mount its disk.")
            chosen.remove("disk")
    held = [measure(name, arguments) for name in chosen]
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
