"""What a worker of Ray Data or Daft does with a batch of files: our models, loaded once, and a log of calls."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from PIL import Image

from resources.models.registry import ModelRegistry
from resources.settings import Settings

VECTOR = pa.list_(pa.float32())
STRETCHES = 8  # most that Whisper is given at once, as in the engine


class Task(Protocol):
    """One workload: its batch size, the columns of its answers, and a callable that is made once per worker."""

    batch: int
    answer: pa.StructType

    def __init__(self, models: ModelRegistry, threads: int) -> None: ...

    def __call__(self, files: Sequence[bytes]) -> list[dict[str, Any]]:
        """An answer per file, in their order."""


class Images:
    """Pictures as vectors of the `embedding` model."""

    batch = 16
    answer = pa.struct([("joint", VECTOR), ("visual", VECTOR)])

    def __init__(self, models: ModelRegistry, threads: int) -> None:
        from resources.models.openclip import OpenClip

        self._model = OpenClip(models.spec("embedding"), models.cache, threads)

    def __call__(self, files: Sequence[bytes]) -> list[dict[str, Any]]:
        """Raises what Pillow raises on a file that is no whole picture."""
        pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
        joint, visual = self._model.embed_images(pictures)
        return [{"joint": one, "visual": other} for one, other in zip(joint, visual, strict=True)]


class Speech:
    """Clips as text of `whisper-base`: voice activity, merged stretches of up to 30 s, Whisper."""

    batch = 4
    answer = pa.struct([("text", pa.string())])

    def __init__(self, models: ModelRegistry, threads: int) -> None:
        from resources.compute import process
        from resources.models import whisper
        from resources.models.vad import SpeechDetector

        # The adapter takes every core, which two workers beside each other must not.
        process.usable_cpus = lambda: threads
        spec = models.spec("asr", "whisper-base")
        self._recogniser = whisper.WhisperRecogniser(spec, whisper.load_network(spec, models.cache))
        self._detector = SpeechDetector(models.spec("vad"), models.cache)
        self._parameters = whisper.WhisperParameters(**spec.parameters)

    def __call__(self, files: Sequence[bytes]) -> list[dict[str, Any]]:
        """Raises what PyAV raises on a file without decodable sound."""
        import numpy as np
        from faster_whisper import decode_audio

        from resources.models.vad import SAMPLE_RATE, merge
        from resources.models.whisper import FULL_SCALE, Stretch

        stretches: dict[str, Stretch] = {}
        owners: dict[str, int] = {}
        for number, data in enumerate(files):
            pcm = decode_audio(io.BytesIO(data), sampling_rate=SAMPLE_RATE)
            spans = merge(self._detector.speech(pcm), self._parameters.chunk_s, self._parameters.max_pause_s)
            # The samples as the file has them: read as int16 and divided by as much.
            samples = [np.rint(pcm[span.start : span.end] * FULL_SCALE).astype(np.int16) for span in spans]
            found = {f"{number}/{at}": Stretch(part, samples[0]) for at, part in enumerate(samples)}
            stretches |= found
            owners |= dict.fromkeys(found, number)
        keys = list(stretches)
        heard: dict[Any, Any] = {}
        for first in range(0, len(keys), STRETCHES):
            heard |= self._recogniser.transcribe({key: stretches[key] for key in keys[first : first + STRETCHES]})
        texts = [" ".join(heard[key].text for key in keys if owners[key] == number) for number in range(len(files))]
        return [{"text": text.strip()} for text in texts]


class PlainImages:
    """Pictures as vectors of the same checkpoint, by open_clip's own calls."""

    batch = 16
    answer = pa.struct([("joint", VECTOR)])

    def __init__(self, models: ModelRegistry, threads: int) -> None:
        import open_clip
        import torch

        from resources.models.openclip_offline import local_towers, offline_checkpoint, register_image_tower
        from resources.models.weights import locate

        torch.set_num_threads(threads)
        spec = models.spec("embedding")
        register_image_tower()
        folder = offline_checkpoint(locate(spec, models.cache), spec, models.cache)
        self._model, _, self._preprocess = open_clip.create_model_and_transforms(
            f"local-dir:{folder}", **local_towers(folder)
        )
        self._model.eval()

    def __call__(self, files: Sequence[bytes]) -> list[dict[str, Any]]:
        """Raises what Pillow raises on a file that is no whole picture."""
        import torch

        pixels = torch.stack([self._preprocess(Image.open(io.BytesIO(data)).convert("RGB")) for data in files])
        with torch.inference_mode():
            vectors = self._model.encode_image(pixels, normalize=True).numpy()
        return [{"joint": vector} for vector in vectors]


class PlainSpeech:
    """Clips as text of the same Whisper, one after the other by faster-whisper's own call, with its VAD."""

    batch = 4
    answer = pa.struct([("text", pa.string())])

    def __init__(self, models: ModelRegistry, threads: int) -> None:
        from faster_whisper import WhisperModel

        from resources.models.weights import locate

        spec = models.spec("asr", "whisper-base")
        folder = locate(spec, models.cache)["model.bin"].parent
        self._beams = spec.parameters["beam_size"]
        self._model = WhisperModel(str(folder), device="cpu", compute_type=spec.precision, cpu_threads=threads)

    def __call__(self, files: Sequence[bytes]) -> list[dict[str, Any]]:
        """Raises what PyAV raises on a file without decodable sound."""
        texts = []
        for data in files:
            segments, _ = self._model.transcribe(
                io.BytesIO(data), beam_size=self._beams, vad_filter=True, word_timestamps=True
            )
            texts.append(" ".join(segment.text.strip() for segment in segments))
        return [{"text": text} for text in texts]


TASKS: dict[str, type[Task]] = {
    "images": Images,
    "speech": Speech,
    "images-plain": PlainImages,
    "speech-plain": PlainSpeech,
}


class Worker:
    """A workload in one process; every call is logged to `events`/<pid>.jsonl in seconds of the monotonic clock."""

    def __init__(self, task: str, home: str, threads: int, events: str) -> None:
        self._log = Path(events, f"{os.getpid()}.jsonl")
        self._task = TASKS[task](ModelRegistry(Settings.load(home)), threads)

    def __call__(self, paths: Sequence[str], files: Sequence[bytes]) -> list[dict[str, Any]]:
        """Answers for the files, in their order."""
        started = time.monotonic()
        answers = self._task(files)
        names = [path.rpartition("/")[2] for path in paths]
        line = {"pid": os.getpid(), "start_s": started, "end_s": time.monotonic(), "names": names}
        with self._log.open("a") as log:
            log.write(json.dumps(line) + "\n")
        return answers


if __name__ == "__main__":  # load the models of tasks once, so that what is built or verified the first time is there
    for name in sys.argv[2:]:
        TASKS[name](ModelRegistry(Settings.load(sys.argv[1])), 1)
