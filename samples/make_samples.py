"""Makes the shipped sample media and their golden manifest from sources anyone may redistribute.

`python samples/make_samples.py [FOLDER]` writes `media/` and `manifest.json` into FOLDER (default: this
folder). Photographs come from the scikit-image wheel (LICENCES.md), speech from espeak-ng, lettering from
the DejaVu fonts inside matplotlib, everything else is drawn and synthesised here. Nothing is random and
every truth in the manifest is known by construction.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
FPS = 25
WIDTH, HEIGHT = 640, 360
FADE_FRAMES = 25
"""Length of each half of the fade through black, frames."""
OWN = "CC0-1.0, made by this project"

Pixels = npt.NDArray[np.uint8]
Samples = npt.NDArray[np.int16]

PHOTOS_SHA256 = {
    "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
}
"""Photographs inside the scikit-image wheel, with their SHA-256."""


@dataclass(frozen=True)
class Photo:
    """One photograph: where it comes from, what it shows and who allows its use."""

    source: str
    label: str
    caption: str
    licence: str


PHOTOS = {
    "astronaut": Photo(
        "astronaut.png",
        "astronaut",
        "a smiling astronaut in an orange space suit before a flag and a model space shuttle",
        "public domain (NASA)",
    ),
    "cat": Photo(
        "chelsea.png", "tabby cat", "a close-up of a tabby cat's face", "CC0-1.0 (photographer Stefan van der Walt)"
    ),
    "coffee": Photo(
        "coffee.png",
        "espresso",
        "a cup of coffee on a red saucer with a spoon",
        "CC0-1.0 (photographer Rachel Michetti, courtesy of Pikolo Espresso Bar)",
    ),
    "galaxies": Photo(
        "hubble_deep_field.jpg",
        "galaxies",
        "thousands of galaxies and stars in the black sky",
        "public domain (NASA, Hubble eXtreme Deep Field)",
    ),
    "photographer": Photo(
        "camera.png",
        "tripod",
        "a man looking through a camera on a tripod, black and white",
        "CC0-1.0 (photographer Lav Varshney)",
    ),
}

Window = tuple[float, float, float]
"""Centre x, centre y and width of a crop, as fractions of the photograph."""


@dataclass(frozen=True)
class Shot:
    """One shot of the film: a card of text lines, or a photograph seen through a moving window.

    `caption_frames` counts from the shot's first frame, end inclusive.
    """

    frames: int
    photo: str = ""
    start: Window = (0.5, 0.5, 1.0)
    end: Window = (0.5, 0.5, 1.0)
    lines: tuple[str, ...] = ()
    caption: str = ""
    caption_frames: tuple[int, int] = (0, 0)
    fade_in: bool = False
    fade_out: bool = False


FILM = (
    Shot(75, lines=("MEDIA ASSETS", "A Sample Film")),
    Shot(
        125, "astronaut", (0.50, 0.30, 0.95), (0.42, 0.32, 0.70), caption="READY FOR LAUNCH", caption_frames=(25, 112)
    ),
    Shot(125, "cat", (0.55, 0.50, 0.95), (0.45, 0.45, 0.75)),
    Shot(
        150,
        "coffee",
        (0.45, 0.50, 0.70),
        (0.55, 0.45, 0.90),
        caption="Espresso Bar open today",
        caption_frames=(15, 115),
        fade_out=True,
    ),
    Shot(150, "galaxies", (0.40, 0.40, 0.80), (0.60, 0.60, 0.55), fade_in=True),
    Shot(75, lines=("THE END",)),
)
FILM_SPEECH = (
    (0.3, "This is a short sample film."),
    (3.4, "An astronaut in an orange suit smiles at the camera."),
    (8.4, "The cat has soft fur and long whiskers."),
    (13.4, "A cup of hot coffee stands on a wooden table."),
    (20.4, "Far away, thousands of galaxies shine in the dark."),
    (25.4, "Thank you for watching."),
)
"""Start in the film, seconds, and what is said."""
NARRATION = (
    "Welcome to the library. Every picture and every sound in this folder was chosen with care. "
    "The computer reads this text aloud, and another program writes it down again."
)
POSTER = (
    "Public Library",
    "Open Monday to Friday",
    "from nine until five",
    "Please return all books",
    "before the end of March",
    "Room 204, second floor",
)
NOTES = (
    "Notes on the sample library.",
    "The lighthouse keeper climbs the stairs every evening and lights the lamp before the ships arrive.",
    "A good bread needs flour, water, salt and time. Let the dough rest overnight in a cool place.",
    "Volcanoes grow where molten rock reaches the surface, and their ash can make the soil fertile.",
)
COMMENTS = (
    ("What a beautiful photograph, thank you for sharing it.", False),
    ("You are a stupid idiot and everybody hates you.", True),
    ("The second shot is a little dark, but I like the music.", False),
    ("Shut up, you worthless piece of shit.", True),
    ("Where can I find the recording of the talk?", False),
    ("Go to hell, you disgusting moron.", True),
)
"""Comments and whether they are toxic."""


@dataclass(frozen=True)
class Word:
    """One spoken word; times in seconds from the start of its utterance."""

    text: str
    start_s: float


@dataclass
class Speech:
    """An utterance: mono int16 samples at `rate` Hz, and the start of every word."""

    rate: int
    samples: Samples
    words: list[Word] = field(default_factory=list)

    @property
    def duration_s(self) -> float:
        """Length, seconds."""
        return len(self.samples) / self.rate


class _Event(ctypes.Structure):
    """espeak_EVENT of espeak-ng's speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


class Espeak:
    """The espeak-ng library of the espeakng-loader wheel, with a fixed voice and speed.

    The library keeps state that shifts the next utterance by milliseconds, so the same bytes come out
    only when the same sentences are said in the same order in a fresh process.
    """

    SYNCHRONOUS, UTF8, RATE, POS_CHARACTER = 2, 1, 1, 1
    EVENT_END, EVENT_WORD = 0, 1

    def __init__(self, voice: str = "en-us", words_per_minute: int = 145) -> None:
        import espeakng_loader  # type: ignore[import-untyped]

        library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.rate = int(library.espeak_Initialize(self.SYNCHRONOUS, 0, data, 0))
        if self.rate <= 0:
            raise RuntimeError("espeak-ng could not be initialised from the espeakng-loader wheel")
        library.espeak_SetVoiceByName(voice.encode())
        library.espeak_SetParameter(self.RATE, words_per_minute, 0)
        self._library = library

    def say(self, text: str) -> Speech:
        """`text` spoken; text must be ASCII, so that espeak's character positions are Python's."""
        chunks: list[bytes] = []
        words: list[Word] = []

        def collect(wave: Any, count: int, events: Any) -> int:
            if wave and count:
                chunks.append(ctypes.string_at(wave, count * 2))
            for event in _until_end(events):
                if event.type == self.EVENT_WORD:
                    start = event.text_position - 1
                    words.append(Word(text[start : start + event.length], event.audio_position / 1000))
            return 0

        callback = _Callback(collect)  # kept in a name, so that it lives as long as espeak-ng may call it
        self._library.espeak_SetSynthCallback(callback)
        encoded = text.encode("ascii")
        self._library.espeak_Synth(encoded, len(encoded) + 1, 0, self.POS_CHARACTER, 0, self.UTF8, None, None)
        self._library.espeak_Synchronize()
        return Speech(self.rate, np.frombuffer(b"".join(chunks), np.int16), words)


def _until_end(events: Any) -> Iterator[_Event]:
    index = 0
    while events[index].type != Espeak.EVENT_END:
        yield events[index]
        index += 1


def photograph(name: str) -> Image.Image:
    """A photograph as the scikit-image wheel ships it, RGB. Raises RuntimeError when it is another one."""
    source = PHOTOS[name].source
    data = files("skimage").joinpath("data", source)
    content = data.read_bytes()
    if hashlib.sha256(content).hexdigest() != PHOTOS_SHA256[source]:
        raise RuntimeError(f"{source} of the installed scikit-image is not the picture whose licence was checked")
    with data.open("rb") as stream:
        return Image.open(stream).convert("RGB")


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans from the matplotlib wheel, `size` in pixels."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    found = find_spec("matplotlib")  # not imported: it makes folders in the user's home
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("matplotlib is not installed")
    return ImageFont.truetype(str(Path(found.submodule_search_locations[0], "mpl-data", "fonts", "ttf", name)), size)


def card(lines: Sequence[str]) -> Image.Image:
    """A title card: centred white lines on dark blue, the first one large."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), (18, 28, 64))
    draw = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        y = HEIGHT // 2 + 80 * row - 40 * (len(lines) - 1)
        draw.text((WIDTH // 2, y), line, "white", font(64 if row == 0 else 38, bold=row == 0), anchor="mm")
    return picture


def view(photo: Image.Image, shot: Shot, progress: float) -> Image.Image:
    """What the moving window of `shot` shows at `progress` (0-1), 640x360."""
    x, y, width = (a + (b - a) * progress for a, b in zip(shot.start, shot.end, strict=True))
    crop_w = width * photo.width
    crop_h = crop_w * HEIGHT / WIDTH
    left = min(max(x * photo.width - crop_w / 2, 0), photo.width - crop_w)
    top = min(max(y * photo.height - crop_h / 2, 0), photo.height - crop_h)
    box = (left, top, left + crop_w, top + crop_h)
    return photo.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)


def draw_caption(picture: Image.Image, text: str) -> None:
    """A caption in a black band at the foot of the picture."""
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, HEIGHT - 60, WIDTH, HEIGHT), "black")
    draw.text((WIDTH // 2, HEIGHT - 30), text, "white", font(32, bold=True), anchor="mm")


def brightness(shot: Shot, frame: int) -> float:
    """Factor 0-1 of the shot's fades at one of its frames."""
    factor = 1.0
    if shot.fade_in:
        factor = min(factor, frame / FADE_FRAMES)
    if shot.fade_out:
        factor = min(factor, (shot.frames - 1 - frame) / FADE_FRAMES)
    return factor


def film_frames() -> Iterator[Pixels]:
    """Every frame of the film, uint8 [360, 640, 3], RGB."""
    for shot in FILM:
        photo = photograph(shot.photo) if shot.photo else None
        for frame in range(shot.frames):
            picture = view(photo, shot, frame / (shot.frames - 1)) if photo else card(shot.lines)
            if shot.caption and shot.caption_frames[0] <= frame <= shot.caption_frames[1]:
                draw_caption(picture, shot.caption)
            yield (np.asarray(picture) * brightness(shot, frame)).round().astype(np.uint8)


def film_sound(espeak: Espeak) -> tuple[Speech, list[dict[str, object]]]:
    """The film's sound track, and the truth of what is said when (seconds from the start of the film)."""
    track = np.zeros(sum(shot.frames for shot in FILM) * espeak.rate // FPS, np.int16)
    segments: list[dict[str, object]] = []
    free_s = 0.0
    for start_s, text in FILM_SPEECH:
        speech = espeak.say(text)
        if start_s < free_s:
            raise RuntimeError(f"the sentence at {start_s} s starts before the previous one ended ({free_s:.2f} s)")
        free_s = start_s + speech.duration_s
        at = round(start_s * espeak.rate)
        track[at : at + len(speech.samples)] = speech.samples
        segments.append(
            {"start": start_s, "end": round(free_s, 3), "text": text, "words": timed(speech.words, start_s)}
        )
    return Speech(espeak.rate, track), segments


def timed(words: Sequence[Word], offset_s: float = 0.0) -> list[dict[str, object]]:
    """Words in the manifest's form: `w` and its `start`, seconds."""
    return [{"w": word.text, "start": round(offset_s + word.start_s, 3)} for word in words]


def chime() -> Speech:
    """Four seconds of bell-like tones, no speech."""
    rate = 16_000
    time = np.arange(4 * rate) / rate
    sound = np.zeros_like(time)
    for start_s, frequency in ((0.0, 523.25), (0.8, 659.25), (1.6, 783.99), (2.4, 1046.5)):
        since = np.clip(time - start_s, 0, None)
        bell = sum(np.sin(2 * np.pi * frequency * partial * since) / partial**1.5 for partial in (1, 2.76, 5.4))
        sound += np.where(time >= start_s, bell * np.exp(-2.5 * since), 0)
    return Speech(rate, (sound / np.abs(sound).max() * 12_000).astype(np.int16))


def encode(path: Path, sound: Speech, codec: str, bit_rate: int = 0, frames: Iterator[Pixels] | None = None) -> None:
    """Write a sound, or a film with it, without dates or random identifiers, so that bytes repeat."""
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        video = _video_stream(container) if frames is not None else None
        audio = container.add_stream(codec, rate=sound.rate)
        audio.layout = "mono"
        audio.codec_context.flags |= av.codec.context.Flags.bitexact
        if bit_rate:
            audio.bit_rate = bit_rate
        packets = list(_sound_packets(audio, sound))
        if video is not None and frames is not None:
            packets.extend(_film_packets(video, frames))
        for packet in sorted(packets, key=lambda packet: float(packet.dts * packet.time_base)):
            container.mux(packet)


def _video_stream(container: Any) -> Any:
    video = container.add_stream("libx264", rate=FPS)
    video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    video.options = {"crf": "25", "preset": "slow", "threads": "1"}
    video.codec_context.flags |= av.codec.context.Flags.bitexact
    return video


def _film_packets(stream: Any, frames: Iterator[Pixels]) -> Iterator[Any]:
    for index, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
        frame.pts, frame.time_base = index, Fraction(1, FPS)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _sound_packets(stream: Any, sound: Speech) -> Iterator[Any]:
    frame = av.AudioFrame.from_ndarray(sound.samples.reshape(1, -1), format="s16", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = sound.rate, 0, Fraction(1, sound.rate)
    resampler = av.AudioResampler(stream.format.name, "mono", sound.rate, stream.codec_context.frame_size or 1024)
    for piece in (*resampler.resample(frame), *resampler.resample(None)):
        yield from stream.encode(piece)
    yield from stream.encode(None)


def poster() -> Image.Image:
    """A printed notice, black on white."""
    picture = Image.new("RGB", (760, 520), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((12, 12, 747, 507), outline="black", width=3)
    for row, line in enumerate(POSTER):
        draw.text((70, 50 + 74 * row), line, "black", font(46 if row == 0 else 36, bold=row == 0))
    return picture


def subtitles(segments: Sequence[dict[str, object]]) -> str:
    """The film's speech as SubRip."""

    def stamp(seconds: object) -> str:
        ms = round(float(str(seconds)) * 1000)
        return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02},{ms % 1000:03}"

    cues = (f"{n}\n{stamp(s['start'])} --> {stamp(s['end'])}\n{s['text']}\n" for n, s in enumerate(segments, 1))
    return "\n".join(cues)


def film_truth(segments: list[dict[str, object]]) -> dict[str, object]:
    """Ground truth of the film from its shot list: a cut is the first frame of the new shot."""
    cuts: list[int] = []
    gradual: list[dict[str, object]] = []
    texts: list[dict[str, object]] = []
    first = 0
    for shot in FILM:
        if shot.fade_in:
            gradual.append({"kind": "fade through black", "around": [first - FADE_FRAMES, first + FADE_FRAMES - 1]})
        elif first:
            cuts.append(first)
        if shot.lines:
            texts.append({"text": list(shot.lines), "frames": [first, first + shot.frames - 1]})
        if shot.caption:
            begin, end = shot.caption_frames
            texts.append({"text": shot.caption, "frames": [first + begin, first + end]})
        first += shot.frames
    transcript = " ".join(text for _, text in FILM_SPEECH)
    return {
        "frame_index": "0-based, decode order; a cut is the first frame of the new shot",
        "frames": first,
        "fps": FPS,
        "hard_cuts": cuts,
        "gradual": gradual,
        "ambiguous": [],
        "on_screen_text": texts,
        "speech": {"language": "en", "transcript": transcript, "segments": segments},
    }


class Library:
    """The sample folder under construction: writes files and collects their manifest entries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[dict[str, object]] = []

    def path(self, name: str) -> Path:
        """Where the sample `name` goes."""
        path = self.folder / "media" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add(self, name: str, kind: str, truth: dict[str, object], source: str, licence: str = OWN) -> None:
        """Record a written sample in the manifest."""
        content = self.path(name).read_bytes()
        self.entries.append(
            {
                "file": f"media/{name}",
                "kind": kind,
                "source": source,
                "licence": licence,
                "ground_truth": truth,
                "truth_basis": "by construction" if licence == OWN else "caption written by eye",
                "sha256": hashlib.sha256(content).hexdigest(),
                "bytes": len(content),
            }
        )

    def finish(self) -> None:
        """Write manifest.json."""
        text = json.dumps(self.entries, indent=1, ensure_ascii=False)
        (self.folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def add_photos(library: Library) -> None:
    """The photographs, a near-duplicate of one and a byte copy of another."""
    for name, photo in PHOTOS.items():
        picture = photograph(name)
        picture.thumbnail((640, 640), Image.Resampling.LANCZOS)
        picture.save(library.path(f"photos/{name}.jpg"), quality=88)
        truth: dict[str, object] = {
            "label": photo.label,
            "caption": photo.caption,
            "expected": [],
            "sexual": False,
            "gore": False,
            "group": name if name in ("cat", "coffee") else None,
        }
        if truth["group"]:
            truth["original"] = True
        library.add(f"photos/{name}.jpg", "images", truth, f"scikit-image data/{photo.source}", photo.licence)
    cat = Image.open(library.path("photos/cat.jpg"))
    cropped = cat.crop((6, 4, cat.width - 6, cat.height - 4))
    smaller = cropped.resize((round(cropped.width * 0.8), round(cropped.height * 0.8)), Image.Resampling.LANCZOS)
    smaller.save(library.path("photos/cat_smaller.jpg"), quality=60)
    library.path("photos/coffee_copy.jpg").write_bytes(library.path("photos/coffee.jpg").read_bytes())
    variants = {
        "cat_smaller": ("cat", "cropped, resized to 80 %, JPEG quality 60"),
        "coffee_copy": ("coffee", "byte copy"),
    }
    for name, (group, variant) in variants.items():
        truth = {"group": group, "variant": variant, "original": False}
        library.add(f"photos/{name}.jpg", "duplicates", truth, f"photos/{group}.jpg", PHOTOS[group].licence)


def add_film(library: Library, espeak: Espeak) -> None:
    """The film, its subtitles and a truncated copy."""
    sound, segments = film_sound(espeak)
    film = library.path("film.mp4")
    encode(film, sound, "aac", 64_000, film_frames())
    library.add("film.mp4", "video", film_truth(segments), "the photographs above, DejaVu lettering, espeak-ng speech")
    srt = library.path("film.srt")
    srt.write_text(subtitles(segments), encoding="utf-8")
    cues = [{key: segment[key] for key in ("start", "end", "text")} for segment in segments]
    library.add("film.srt", "text", {"language": "en", "cues": cues}, "the film's speech")
    broken = library.path("broken/film_truncated.mp4")
    broken.write_bytes(film.read_bytes()[:60_000])
    truth: dict[str, object] = {
        "expected": "a clear error: the upload ends before the index of the file",
        "error_classes": ["truncated", "undecodable"],
    }
    library.add("broken/film_truncated.mp4", "hostile", truth, "the first 60,000 bytes of film.mp4")


def add_sounds(library: Library, espeak: Espeak) -> None:
    """A narration and a sound without speech."""
    speech = espeak.say(NARRATION)
    encode(library.path("narration.mp3"), speech, "libmp3lame", 48_000)
    spoken: dict[str, object] = {"language": "en", "transcript": NARRATION, "words": timed(speech.words)}
    library.add("narration.mp3", "speech", spoken, "espeak-ng speech")
    encode(library.path("chime.flac"), chime(), "flac")
    silent: dict[str, object] = {"transcript": "", "speech": False, "what": "four bell tones"}
    library.add("chime.flac", "speech", silent, "synthesised")


def add_texts(library: Library) -> None:
    """A picture of text, a document and a file of comments."""
    poster().save(library.path("poster.png"), optimize=True)
    library.add("poster.png", "ocr", {"text_lines": list(POSTER), "languages": ["en"]}, "DejaVu lettering")
    library.path("notes.txt").write_text("\n\n".join(NOTES) + "\n", encoding="utf-8")
    library.add("notes.txt", "text", {"language": "en", "text_lines": list(NOTES)}, "written here")
    rows = "".join(f'"{text}",{"Toxic" if toxic else "Not Toxic"}\n' for text, toxic in COMMENTS)
    library.path("comments.csv").write_text("text,is_toxic\n" + rows, encoding="utf-8")
    truth = {"rows": len(COMMENTS), "toxic": sum(toxic for _, toxic in COMMENTS), "column": "is_toxic"}
    library.add("comments.csv", "moderation", truth, "written here")


def make(folder: Path) -> None:
    """Write all samples and their manifest into `folder`."""
    library = Library(folder)
    espeak = Espeak()
    add_photos(library)
    add_film(library, espeak)
    add_sounds(library, espeak)
    add_texts(library)
    library.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE, help="where to write (default: samples/)")
    make(parser.parse_args().folder)
