"""Spoken text for tests, the same samples each time: espeak-ng carries noise on from one text to the next.

python -m tests.speech VOICE TEXT   writes int16 samples, 16 kHz mono, to stdout
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PCM = npt.NDArray[np.int16]
SAMPLE_RATE = 16_000


@cache
def say(text: str, voice: str) -> PCM:
    """espeak-ng speaking `text`, in a process of its own: int16 [samples], 16 kHz."""
    command = [sys.executable, "-m", "tests.speech", voice, text]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.int16)


def spoken(text: str, voice: str) -> PCM:
    """As `say`, in this process."""
    import espeakng_loader

    espeak = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = espeak.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0)
    blocks: list[npt.NDArray[np.int16]] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(wave: Any, count: int, _events: Any) -> int:
        if wave and count:
            blocks.append(np.ctypeslib.as_array(wave, (count,)).copy())
        return 0

    espeak.espeak_SetSynthCallback(collect)
    espeak.espeak_SetVoiceByName(voice.encode())
    espeak.espeak_SetParameter(1, 140, 0)
    encoded = text.encode()
    espeak.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, 1, None, None)
    espeak.espeak_Synchronize()
    samples = np.concatenate(blocks).astype(np.float64)
    at = np.arange(int(len(samples) * SAMPLE_RATE / rate)) * rate / SAMPLE_RATE
    return (np.interp(at, np.arange(len(samples)), samples) * 0.6).astype(np.int16)


if __name__ == "__main__":
    sys.stdout.buffer.write(spoken(sys.argv[2], sys.argv[1]).tobytes())
