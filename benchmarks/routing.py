"""Routes and screens against the champions alone: what they save and what they lose, on one golden set.

    python benchmarks/routing.py GOLDEN [--home HOME] [--only ocr|asr|moderation] [--half chosen|held-out]

Decodes the golden media, and analyses what `moderation_scores` needs (finished ones in HOME are taken as they
are). Then every micro-batch, as the engine would form it across items, goes through both variants of
`ocr_text`, `transcript` and `moderation_scores`, one right after the other and first by turns, models loaded and
warm: cost is what `infer` takes, wall and CPU seconds. The tables of both are measured by `evals/ocr`, `evals/asr`
and `evals/moderation`. `--half` takes half of the golden files, by a hash of their names: thresholds are chosen on
the one and tried on the other.

Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from rich.console import Console

from cli.run import Work
from evals.evaluate import evaluate
from evals.golden import Golden, GoldenItem
from evals.probes import PolicyModerator
from evals.result import Reader
from media_assets.engine.contract import Inputs, MediaItem, Prepared, Stage, Unit
from media_assets.stages.moderation_labels import ModerationLabels
from media_assets.stages.moderation_scores import ModerationScores
from media_assets.stages.ocr_text import OcrText
from media_assets.stages.transcript import Transcript
from resources.errors import NotApplicable
from resources.files.derived import DerivedStore
from resources.library import Library
from resources.models.registry import CATALOGUE, ModelRegistry

DECODED = ("media", "frames", "audio")
ANALYSED = ("shots", "transcript", "ocr_text", "embeddings")
SCREENED = "moderation"
TASKS: dict[str, tuple[type[Stage[Any, Any]], str]] = {
    "ocr": (OcrText, "ocr"),
    "asr": (Transcript, "asr"),
    SCREENED: (ModerationScores, "moderation"),
}
HALVES = ("chosen", "held-out")
ROUTES = re.compile(r"^\[\[\w+\.(?:routes|screens)\]\]\n(?:.+\n)+", re.MULTILINE)


@dataclass
class Variant:
    """One way to answer: the stage with its models, a store of its own, and what it took."""

    name: str
    stage: Stage[Any, Any]
    store: DerivedStore
    wall_s: float = 0.0
    cpu_s: float = 0.0
    answers: dict[str, Any] = field(default_factory=dict)
    rows: Counter[str] = field(default_factory=Counter)

    def infer(self, units: Sequence[Unit[Any]]) -> None:
        """Answer one micro-batch."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.answers.update(self.stage.infer(units))
        self.wall_s += time.perf_counter() - wall
        self.cpu_s += time.process_time() - cpu


def half_of(golden: Golden, half: str) -> Golden:
    """The golden set with the items of one of `HALVES`: an item's half is the last bit of its name's SHA-256."""
    kept = (item for item in golden.items if hashlib.sha256(item.file.encode()).digest()[-1] % 2 == HALVES.index(half))
    return replace(golden, items=tuple(kept))


def prepared(library: Library, stage: Stage[Any, Any]) -> Iterator[tuple[Inputs, Prepared[Any]]]:
    """Every item the stage applies to; both variants share what was prepared."""
    for row in library.registry.live():
        inputs = Inputs(MediaItem(row["media_id"], row["uri"], row["etag"]), library.store, "benchmark")
        if all(library.store.exists(asset, inputs.media_id) for asset in stage.inputs):
            try:
                yield inputs, stage.prepare(inputs)
            except NotApplicable:
                continue


def compare(library: Library, golden: Golden, variants: Sequence[Variant], task: str) -> dict[str, Any]:
    """Figures of one task."""
    wanted = set(golden.match(library.items()).values())
    items = [(inputs, made) for inputs, made in prepared(library, variants[0].stage) if inputs.media_id in wanted]
    units = [replace(unit, id=f"{inputs.media_id}/{unit.id}") for inputs, made in items for unit in made.units]
    for variant in variants:
        variant.stage.load()
        variant.stage.infer(units[:1])
    sizes = [variant.stage.units_per_call() for variant in variants]
    for first in range(0, len(units), math.lcm(*sizes)):
        for variant, size in list(zip(variants, sizes, strict=True))[:: -1 if first else 1]:
            for start in range(first, min(first + math.lcm(*sizes), len(units)), size):
                variant.infer(units[start : start + size])
    figures: dict[str, Any] = {"units": len(units)}
    for variant in variants:
        for inputs, made in items:
            outputs = {unit.id: variant.answers[f"{inputs.media_id}/{unit.id}"] for unit in made.units}
            product = variant.stage.assemble(inputs, made.carry, outputs)
            variant.store.write(variant.stage.name, inputs.media_id, product.table)
            variant.store.write("media", inputs.media_id, inputs.table("media"))
            answered = product.table.filter(pc.field("score").is_valid()) if task == SCREENED else product.table
            variant.rows.update(name.partition("@")[0] for name in answered["model"].to_pylist())
            if task == SCREENED:
                decide(library, variant, inputs)
        moderator = PolicyModerator(library.settings, variant.stage.models)
        result = evaluate(task, golden, Reader(variant.store, library.items(), moderator=moderator))
        quality = {name: figure.value for name, figure in result.figures.items() if figure.better}
        figures[variant.name] = {
            "infer_s": round(variant.wall_s, 2),
            "cpu_s": round(variant.cpu_s, 2),
            "rows": dict(variant.rows),
            "quality": quality,
        }
    champion, routed = variants
    if task == SCREENED:
        figures["screen"] = screened([inputs.media_id for inputs, _ in items], champion, routed)
    figures["saved_wall"] = round(champion.wall_s / routed.wall_s, 2)
    figures["saved_cpu"] = round(champion.cpu_s / routed.cpu_s, 2)
    return figures


def decide(library: Library, variant: Variant, inputs: Inputs) -> None:
    """Write the policy's decisions on the scores of one item."""
    stage = ModerationLabels(library.settings, variant.stage.models)
    made = Inputs(inputs.item, variant.store, inputs.version)
    product = stage.assemble(made, stage.prepare(made).carry, {})
    variant.store.write(stage.name, inputs.media_id, product.table)


def screened(media_ids: Sequence[str], champion: Variant, routed: Variant) -> dict[str, Any]:
    """How often the screened model was asked, what it would have found where it was not, and decisions that differ."""
    verdicts: Counter[str] = Counter()
    unseen: list[float] = []
    changed: Counter[str] = Counter()
    for media_id in media_ids:
        tables = [variant.store.read("moderation_scores", media_id).to_pylist() for variant in (champion, routed)]
        full, thin = ({(row["source"], row["start_s"], row["label"]): row for row in rows} for rows in tables)
        seen: set[str] = set()
        for key, row in thin.items():
            if row["screening"] and row["source"] not in seen:
                seen.add(row["source"])
                verdicts[row["screening"]] += 1
                unseen += [full[key]["score"]] if row["score"] is None else []
        decisions = [
            {(row["label"], row["start_s"], row["end_s"], row["action"]) for row in rows}
            for rows in (
                variant.store.read("moderation_labels", media_id).to_pylist() for variant in (champion, routed)
            )
        ]
        changed.update(action for *_, action in decisions[0] ^ decisions[1])
    return {
        "stills": dict(verdicts),
        "skipped_with_a_detection": sum(score > 0 for score in unseen),
        "strongest_skipped": round(max(unseen, default=0.0), 3),
        "decisions_changed": dict(changed),
    }


def show(task: str, figures: dict[str, Any]) -> None:
    """One table for people."""
    champion, routed = figures["champion"], figures["routed"]
    print(f"\n{task}, {figures['units']} model inputs{'champion':>32}{'routed':>12}")
    for name in ("infer_s", "cpu_s"):
        print(f"{name:>40}{champion[name]:>16}{routed[name]:>12}")
    for name, value in champion["quality"].items():
        print(f"{name:>40}{value:>16.4f}{routed['quality'][name]:>12.4f}")
    print(f"{'rows by model':>40}   {champion['rows']}   {routed['rows']}")
    if "screen" in figures:
        print(f"{'screen':>40}   {figures['screen']}")
    print(f"{'saved':>40}   {figures['saved_wall']} x wall, {figures['saved_cpu']} x CPU")


def wanted(task: str, item: GoldenItem) -> bool:
    """Whether the item is what the task is measured on."""
    if task == SCREENED:
        return bool(item.moderation or item.subject) or item.kind == "video"
    return bool(item.print or item.speech or item.screen_text)


def main() -> None:
    """Measure, print tables and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden")
    parser.add_argument("--home", help="a home that may hold the decoded media already; default: a temporary one")
    parser.add_argument("--only", choices=list(TASKS))
    parser.add_argument("--half", choices=HALVES, help="only this half of the golden files")
    arguments = parser.parse_args()
    golden = Golden.load(arguments.golden)
    if arguments.half:
        golden = half_of(golden, arguments.half)
    with tempfile.TemporaryDirectory(prefix="routing-") as folder:
        library = Library.open(arguments.home or folder)
        unrouted = Path(folder, "unrouted.toml")
        unrouted.write_text(ROUTES.sub("", CATALOGUE.read_text()))
        registries = {
            "champion": ModelRegistry(library.settings, unrouted),
            "routed": ModelRegistry(library.settings, CATALOGUE),
        }
        tasks = [arguments.only] if arguments.only else list(TASKS)
        results: dict[str, Any] = {}
        try:
            for task in tasks:
                paths = [str(golden.root / item.file) for item in golden.items if wanted(task, item)]
                Work(library, Console(stderr=True), (*DECODED, *(ANALYSED if task == SCREENED else ()))).run(paths)
            for task in tasks:
                kind, evaluation = TASKS[task]
                variants = [
                    Variant(name, kind(library.settings, models), DerivedStore(Path(folder, task, name)))
                    for name, models in registries.items()
                ]
                results[task] = compare(library, golden, variants, evaluation)
                show(task, results[task])
        finally:
            library.close()
    versions = {name: version(name) for name in ("media-assets", "torch", "onnxruntime", "ctranslate2")}
    print(
        json.dumps(
            {
                "name": "routing",
                "half": arguments.half,
                **results,
                "python": platform.python_version(),
                "versions": versions,
            }
        )
    )


if __name__ == "__main__":
    main()
