"""The engine against Ray Data and Daft: the same models over the same files, in turn, on the same cores.

    python -m benchmarks.peers [images|speech …] [--media FOLDER] [--home HOME] [--rounds 2] [--plain]
    python -m benchmarks.peers --faults [--media FOLDER] [--home HOME]

Ours does what `media-assets run` does for the assets that are needed: Dagster runs, outcome records, checks. The others
are pipelines as their manuals show them: files from a folder, a pool of workers that load the model once, answers as
Parquet; with one worker that has all cores and with two that share them. They use our adapter of the same model, and,
`plain`, the same weights and settings through the calls of the model's own library, as somebody without our adapter
would. Daft gets an environment of its own in HOME, made on first use.

`in work`: ours from the call that registers the files to its end, records, events and checks included, two files having
been processed before; the others from the first batch a loaded model is given to the last it has answered, so that
what they read ahead, and writing the last file, cost them nothing. `whole`: the process from start to end. CPU seconds
and memory are those of all processes it started. Ratios are of the means of all rounds. The answers must agree, or the
comparison fails; `--plain`, which leaves out the rows with our adapter, tells how far they agree and does not judge.

`--faults`: a worker is killed with -9 in the middle of the pictures; then one of them is cut short. Ends with one JSON
line; exit 1 when answers do not agree.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.peers.options import WARM_UP
from resources.models.registry import CATALOGUE

PROJECT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
ROUTES = re.compile(r"^\[\[\w+\.routes\]\]\n(?:.+\n)+", re.MULTILINE)
PR_SET_CHILD_SUBREAPER = 36
SAMPLE_S = 0.1
DEADLINE_S = 1200.0
MIN_COSINE = 0.985  # ours embeds the still it keeps; encoding a picture once more alone gives 0.9905 and up
MAX_WORD_ERROR = 0.02
SAMPLE_RATE, FULL_SCALE = 16_000, 32_767
PICTURES, SOUNDS = (".jpg", ".jpeg", ".png"), (".wav", ".flac", ".mp3")


# -- files ------------------------------------------------------------------------------------------------


def pictures(media: Path, into: Path, count: int, seed: int) -> None:
    """`count` JPEG pictures: crops of those below `media`, each with bytes of its own."""
    rng = random.Random(seed)
    sources = _found(media, PICTURES)
    for number in range(count):
        with Image.open(sources[number % len(sources)]) as source:
            picture = source.convert("RGB")
        left, top, right, bottom = (rng.uniform(0, 0.1) for _ in range(4))
        width, height = picture.size
        box = (int(width * left), int(height * top), int(width * (1 - right)), int(height * (1 - bottom)))
        picture.crop(box).save(into / f"{number:04}.jpg", quality=90)


def clips(media: Path, into: Path, count: int, seed: int) -> None:
    """`count` WAV clips of at most a minute: those below `media` at another loudness, after a little silence."""
    from faster_whisper import decode_audio

    rng = random.Random(seed)
    sources = _found(media, SOUNDS)
    for number in range(count):
        sound = decode_audio(str(sources[number % len(sources)]), sampling_rate=SAMPLE_RATE)[: 60 * SAMPLE_RATE]
        silence = np.zeros(rng.randrange(SAMPLE_RATE // 5), np.float32)
        sound = np.concatenate([silence, sound * rng.uniform(0.7, 0.95)])
        with wave.open(str(into / f"{number:04}.wav"), "wb") as clip:
            clip.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
            clip.writeframes((sound * FULL_SCALE).astype("<i2").tobytes())


def _found(media: Path, suffixes: Sequence[str]) -> list[Path]:
    found = sorted(path for path in media.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    usable = [path for path in found if not {"hostile", "broken"} & set(path.relative_to(media).parts)]
    if not usable:
        raise SystemExit(f"no {', '.join(suffixes)} below {media}")
    return usable


# -- variants ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to do the work: a module of this folder, how many workers hold the model, and how it is set up.

    `plain`: calls of the model's library instead of our adapter; `routed`: the route as shipped.
    """

    name: str
    module: str
    workers: int = 1
    plain: bool = False
    routed: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is the engine."""
        return self.module == "ours"


OURS = Variant("ours", "ours")
SHIPPED = Variant("ours, with the route", "ours", routed=True)
MODULES = {"Ray Data": "ray_data", "Daft": "daft_frame"}
PEERS = tuple(
    Variant(f"{name}, {workers} worker{'s' * (workers > 1)}", module, workers)
    for name, module in MODULES.items()
    for workers in (1, 2)
)
ADAPTER, LIBRARY = "adapter", "plain"
PLAIN = tuple(Variant(f"{name}, 2 workers, plain", module, 2, plain=True) for name, module in MODULES.items())


@dataclass(slots=True)
class Outcome:
    """What a process did: its exit code, seconds, and memory; `calls` are the logged batches of its workers."""

    code: int
    whole_s: float
    cpu_s: float
    peak_mb: float
    calls: list[dict[str, Any]]
    rows: dict[str, dict[str, Any]]
    said: str

    @property
    def work_s(self) -> float:
        """From the first logged call's start to the last one's end."""
        return float(max(call["end_s"] for call in self.calls) - min(call["start_s"] for call in self.calls))

    @property
    def done(self) -> Counter[str]:
        """How often each file was answered by a model, as logged."""
        return Counter(name for call in self.calls for name in call["names"])


@dataclass(slots=True)
class Bench:
    """Where things are: a scratch folder, a home with models, the interpreter of each library."""

    root: Path
    models: Path
    daft: str
    cores: int
    runs: int = field(default=0)

    def home(self, routed: bool) -> Path:
        """A new home that shares the models' cache; without routes where the champion is to answer alone."""
        self.runs += 1
        home = self.root / f"home-{self.runs}"
        home.mkdir()
        (home / "models").symlink_to(self.models / "models")
        if not routed:
            (home / "models.toml").write_text(ROUTES.sub("", CATALOGUE.read_text()))
        return home

    def run(
        self,
        variant: Variant,
        task: str,
        folder: Path,
        home: Path | None = None,
        tolerant: bool = False,
        kill: Callable[[psutil.Process, Path, Path], bool] | None = None,
    ) -> Outcome:
        """Run one variant to its end. `kill` is asked again and again until it has killed what it wants to."""
        home = home or self.home(variant.routed)
        self.runs += 1
        out, events = self.root / f"out-{self.runs}", self.root / f"events-{self.runs}"
        events.mkdir()
        threads = max(1, self.cores // variant.workers)
        command = [
            *(self.daft if variant.module == "daft_frame" else sys.executable, "-m"),
            f"benchmarks.peers.{variant.module}",
            *(f"{task}-plain" if variant.plain else task, str(folder), str(out), str(events), str(home)),
            *("--workers", str(variant.workers), "--threads", str(threads), "--cores", str(self.cores)),
            *(["--tolerant"] if tolerant else []),
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MEDIA_", "DAGSTER_"))}
        environment |= {"PYTHONPATH": str(PROJECT), "RAY_AUTH_MODE": "disabled", "DAFT_PROGRESS_BAR": "0"}
        if not variant.ours:
            environment["OMP_NUM_THREADS"] = str(threads)
        with tempfile.TemporaryFile() as said:
            started = time.monotonic()
            process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=said, stderr=said)
            watch = Watch(process.pid)
            watch.start()
            while process.poll() is None:
                if kill is not None and kill(psutil.Process(process.pid), events, home):
                    kill = None
                if time.monotonic() - started > DEADLINE_S:
                    process.kill()
                time.sleep(SAMPLE_S)
            whole_s = time.monotonic() - started
            watch.close()
            said.seek(0)
            text = said.read().decode(errors="replace")
        calls = [json.loads(line) for log in sorted(events.iterdir()) for line in log.read_text().splitlines()]
        return Outcome(process.returncode, whole_s, watch.cpu_s, watch.peak_mb, calls, _rows(out), text)


def _rows(out: Path) -> dict[str, dict[str, Any]]:
    """Rows of every Parquet file by file name; of those without an answer, none."""
    rows = [row for file in sorted(out.glob("*.parquet")) for row in pq.ParquetFile(file).read().to_pylist()]
    return {
        row.pop("path").rpartition("/")[2]: row
        for row in rows
        if all(value is not None for name, value in row.items() if name != "path")
    }


class Watch(threading.Thread):
    """CPU seconds and the largest sum of resident memory of all processes that descend from this one.

    Shared pages count once per process. What a process used after it was last seen, a tenth of a second, is lost.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._over = threading.Event()
        self._used: dict[tuple[int, float], float] = {}
        self.peak_mb = 0.0

    @property
    def cpu_s(self) -> float:
        """User and system seconds."""
        return sum(self._used.values())

    def run(self) -> None:
        """Look until closed."""
        while not self._over.wait(SAMPLE_S):
            resident = 0
            for process in _descendants():
                try:
                    with process.oneshot():
                        times = process.cpu_times()
                        resident += process.memory_info().rss
                        self._used[process.pid, process.create_time()] = times.user + times.system
                except psutil.Error:
                    continue
            self.peak_mb = max(self.peak_mb, resident / 2**20)

    def close(self) -> None:
        """Stop looking, and end what the process left behind."""
        self._over.set()
        self.join()
        left = _descendants()
        for process in left:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(left, timeout=10)


def _descendants() -> list[psutil.Process]:
    return list(psutil.Process().children(recursive=True))


# -- throughput -------------------------------------------------------------------------------------------


def compare(
    bench: Bench, task: str, folder: Path, rounds: int, peers: Mapping[str, Sequence[Variant]]
) -> dict[str, Any]:
    """Figures of every variant, seconds of every round; the order turns from round to round."""
    variants = [OURS, *chain(*peers.values()), *([SHIPPED] if task == "speech" else [])]
    found: dict[str, list[Outcome]] = {variant.name: [] for variant in variants}
    for turn in range(rounds):
        for variant in variants[:: -1 if turn % 2 else 1]:
            outcome = bench.run(variant, task, folder)
            if outcome.code:
                raise SystemExit(f"{variant.name} failed:\n{outcome.said[-4000:]}")
            seconds = f"{outcome.work_s:.1f} s in work, {outcome.whole_s:.0f} s whole"
            print(f"{task}, round {turn + 1}: {variant.name}: {seconds}", file=sys.stderr, flush=True)
            found[variant.name].append(outcome)
    base = found[OURS.name][0].rows
    count = len(list(folder.iterdir()))
    figures: dict[str, Any] = {"files": count}
    for variant in variants:
        outcomes = found[variant.name]
        # The files ours processed before its clock started are not among those it is timed on.
        timed = count - WARM_UP if variant.ours else count
        figures[variant.name] = {
            "per_s": round(timed / fmean(outcome.work_s for outcome in outcomes), 2),
            "work_s": [round(outcome.work_s, 2) for outcome in outcomes],
            "whole_s": [round(outcome.whole_s, 1) for outcome in outcomes],
            "cpu_s": round(fmean(outcome.cpu_s for outcome in outcomes), 1),
            "peak_mb": round(max(outcome.peak_mb for outcome in outcomes)),
            "agreement": round(AGREEMENT[task](base, outcomes[0].rows), 4),
        }
    for label, group in peers.items():
        best = max(figures[peer.name]["per_s"] for peer in group)
        soonest = min(fmean(figures[peer.name]["whole_s"]) for peer in group)
        figures[f"ratio_in_work_{label}"] = round(figures[OURS.name]["per_s"] / best, 3)
        figures[f"ratio_whole_{label}"] = round(soonest / fmean(figures[OURS.name]["whole_s"]), 3)
    worst = [figures[variant.name]["agreement"] for variant in (OURS, *peers.get(ADAPTER, ()))]
    figures["agree"] = min(worst) >= MIN_COSINE if task == "images" else max(worst) <= MAX_WORD_ERROR
    return figures


def cosine(ours: Mapping[str, dict[str, Any]], other: Mapping[str, dict[str, Any]]) -> float:
    """The lowest cosine of two vectors of one picture; -1 where one has pictures that the other lacks."""
    if ours.keys() != other.keys():
        return -1.0
    return min(float(np.dot(ours[name][space], other[name][space])) for name in ours for space in other[name])


def word_error(ours: Mapping[str, dict[str, Any]], other: Mapping[str, dict[str, Any]]) -> float:
    """Share of our words that the other has otherwise; 1 where one has clips that the other lacks."""
    import jiwer

    if ours.keys() != other.keys():
        return 1.0
    spoken = sorted(name for name in ours if ours[name]["text"].strip())
    if any(other[name]["text"].strip() for name in ours.keys() - set(spoken)):
        return 1.0
    return float(jiwer.wer([ours[name]["text"] for name in spoken], [other[name]["text"] for name in spoken]))


AGREEMENT = {"images": cosine, "speech": word_error}


def show(task: str, figures: Mapping[str, Any]) -> None:
    """One table for people."""
    columns = ("per_s", "work_s", "whole_s", "cpu_s", "peak_mb", "agreement")
    print(f"\n{task}, {figures['files']} files".ljust(26) + "".join(name.rjust(11) for name in columns))
    for name, row in figures.items():
        if isinstance(row, dict):
            means = {
                column: round(fmean(value), 1) if isinstance(value, list) else value for column, value in row.items()
            }
            print(name.rjust(25) + "".join(str(means[column]).rjust(11) for column in columns))
    for label, meaning in ((ADAPTER, "with our adapter"), (LIBRARY, "with the library's own calls")):
        if f"ratio_in_work_{label}" in figures:
            work, whole = figures[f"ratio_in_work_{label}"], figures[f"ratio_whole_{label}"]
            print(f"ours against the better peer {meaning}: {work} x in work, {whole} x whole")


# -- faults -----------------------------------------------------------------------------------------------


def faults(bench: Bench, folder: Path) -> dict[str, Any]:
    """What becomes of the other files when one is cut short, and when a worker is killed with -9."""
    names = sorted(path.name for path in folder.iterdir())
    peers = [variant for variant in PEERS if variant.workers == 2]
    figures: dict[str, Any] = {"files": len(names)}

    def account(label: str, expected: Iterable[str], outcome: Outcome, **more: Any) -> None:
        figures[label] = {**accounted(expected, outcome), **more}
        print(f"{label}: {figures[label]}", file=sys.stderr, flush=True)

    for variant in peers:
        account(f"{variant.name}: worker killed", names, bench.run(variant, "images", folder, kill=Killer(len(names))))
    outcome = bench.run(OURS, "images", folder, kill=DecoderKiller())
    account("ours: decoder killed", names, outcome, **_said(outcome))
    home = bench.home(False)
    bench.run(OURS, "images", folder, home, kill=RunKiller(len(names)))
    again = bench.run(OURS, "images", folder, home)
    account("ours: run killed, run again", names, again, **_said(again))
    victim = folder / names[len(names) // 2]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 3])
    good = [name for name in names if name != victim.name]
    for variant in peers:
        account(f"{variant.name}: one file cut short", good, bench.run(variant, "images", folder))
        outcome = bench.run(variant, "images", folder, tolerant=True)
        account(f"{variant.name}: one file cut short, tolerant", good, outcome)
    outcome = bench.run(OURS, "images", folder)
    account("ours: one file cut short", good, outcome, **_said(outcome))
    victim.write_bytes(whole)
    return figures


def accounted(expected: Iterable[str], outcome: Outcome) -> dict[str, Any]:
    """Whether the job succeeded, and how many of the `expected` files have no answer or were answered twice."""
    wanted = set(expected)
    return {
        "succeeded": outcome.code == 0,
        "answered": len(wanted & outcome.rows.keys()),
        "lost": len(wanted - outcome.rows.keys()),
        "done_twice": sum(times > 1 for times in outcome.done.values()),
        "whole_s": round(outcome.whole_s, 1),
    }


def _said(outcome: Outcome) -> dict[str, Any]:
    """What ours tells about itself: what was claimed again, and the errors it recorded."""
    said = next((call for call in outcome.calls if "summary" in call), None)
    if said is None:
        return {}
    errors = Counter(failure["error_class"] for failure in said["summary"]["failures"])
    return {
        "done_twice": said["finished_twice"],
        "claimed_again": said["claimed_again"],
        "computed_in_this_run": said["summary"]["computed"].get("embeddings", 0),
        "errors": dict(errors),
    }


class Killer:
    """Kills the worker that has answered last, once a third of the files is answered."""

    def __init__(self, files: int) -> None:
        self._wanted = files // 3

    def __call__(self, _: psutil.Process, events: Path, __: Path) -> bool:
        """Whether it has killed."""
        lines = [line for log in events.iterdir() for line in log.read_text().splitlines(keepends=True)]
        calls = [json.loads(line) for line in lines if line.endswith("\n")]
        if sum(len(call["names"]) for call in calls) < self._wanted:
            return False
        os.kill(max(calls, key=lambda call: call["end_s"])["pid"], signal.SIGKILL)
        return True


class RunKiller:
    """Kills the process of our run once a third of the files has vectors."""

    def __init__(self, files: int) -> None:
        self._wanted = files // 3

    def __call__(self, process: psutil.Process, _: Path, home: Path) -> bool:
        """Whether it has killed."""
        if len(list((home / "derived" / "embeddings").rglob("*.parquet"))) < self._wanted:
            return False
        process.kill()
        return True


class DecoderKiller:
    """Kills a decoder process of our run once it has begun to decode in earnest."""

    def __call__(self, process: psutil.Process, _: Path, home: Path) -> bool:
        """Whether it has killed."""
        if len(list((home / "derived" / "frames").rglob("*.parquet"))) < 2:
            return False
        for child in process.children():
            if "resources.decoding.worker" in child.cmdline():
                child.kill()
                return True
        return False


# -- the whole --------------------------------------------------------------------------------------------


def daft_python(folder: Path) -> str:
    """The interpreter of an environment with Daft and its pyarrow in front of this project's packages."""
    python = folder / "bin" / "python"
    if not (folder / ".complete").exists():
        uv = str(Path(sys.executable).with_name("uv"))
        subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, str(folder)], check=True)
        install = [uv, "pip", "install", "-q", "--compile-bytecode", "--python", str(python), "-r", str(REQUIREMENTS)]
        subprocess.run(install, check=True)
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "project.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
        (folder / ".complete").touch()
    return str(python)


def main() -> int:
    """Measure, print tables and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=[], metavar="task", help="images, speech; default: both")
    parser.add_argument("--media", type=Path, default=PROJECT / "samples" / "media", help="pictures and speech")
    parser.add_argument("--home", type=Path, default=PROJECT / "var", help="its models are used, and built if need be")
    parser.add_argument("--images", type=int, default=200, help="pictures made of those found")
    parser.add_argument("--clips", type=int, default=32, help="clips made of the speech found")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--plain", action="store_true", help="only pipelines that call the models' own libraries")
    parser.add_argument("--faults", action="store_true", help="what becomes of a corrupt file and of a killed worker")
    arguments = parser.parse_args()
    tasks = arguments.tasks or (["images"] if arguments.faults else ["images", "speech"])
    if wrong := set(tasks) - {"images", "speech"}:
        parser.error(f"there is no task {', '.join(sorted(wrong))}")
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # daemons of Ray and Postgres stay in sight
    home = arguments.home.absolute()
    subprocess.run([sys.executable, "-m", "benchmarks.peers.work", str(home), *tasks], cwd=PROJECT, check=True)
    held = True
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="peers-", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        bench = Bench(root, home, daft_python(home / "peers"), len(os.sched_getaffinity(0)))
        for task in tasks:
            (root / task).mkdir()
            make, count = {"images": (pictures, arguments.images), "speech": (clips, arguments.clips)}[task]
            make(arguments.media.absolute(), root / task, count, arguments.seed)
        if arguments.faults:
            figures["faults"] = faults(bench, root / "images")
            for label, row in figures["faults"].items():
                print(label.rjust(40), row)
        else:
            for task in tasks:
                peers = {LIBRARY: PLAIN} if arguments.plain else {ADAPTER: PEERS, LIBRARY: PLAIN}
                figures[task] = compare(bench, task, root / task, arguments.rounds, peers)
                show(task, figures[task])
                held &= figures[task]["agree"]
    versions = {name: version(name) for name in ("media-assets", "dagster", "torch", "ctranslate2", "ray")}
    print(json.dumps({"name": "peers", **figures, "python": platform.python_version(), "versions": versions}))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
