"""Given real small media, when the decode group's stages run, then these facts, stills, tracks and samples."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from media_assets import schemas
from media_assets.engine.contract import Inputs, MediaItem, Product
from media_assets.stages.audio import Audio
from media_assets.stages.frames import Frames
from media_assets.stages.media import Media
from media_assets.stages.support.previews.contact_sheet import MAX_BYTES, contact_sheet
from media_assets.stages.support.tracks import SAMPLE_RATE, read_pcm, read_still, read_track
from resources.decoding import pictures
from resources.errors import NotApplicable
from resources.files.derived import DerivedStore
from resources.models.registry import ModelRegistry
from resources.settings import Settings

RED, GREEN, BLUE = (200, 30, 30), (30, 180, 40), (40, 50, 200)
STAGES = {"media": Media, "frames": Frames, "audio": Audio}

Derive = Callable[..., Product]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"))


@pytest.fixture
def derive(settings: Settings, tmp_path: Path) -> Derive:
    """`derive(stage, path)`: the stage's product for the file, with its upstream tables stored first."""
    store = DerivedStore(tmp_path / "derived")
    registry = ModelRegistry(settings)
    seen: dict[str, Inputs] = {}

    def run(stage: str, path: Path | str) -> Product:
        if str(path) not in seen:
            item = MediaItem(f"item-{len(seen)}", str(path), "")
            seen[str(path)] = Inputs(item, store, "v1", frozenset(STAGES), wants_preview=True)
            if stage != "media":
                run("media", path)
        inputs = seen[str(path)]
        made = STAGES[stage](settings, registry)
        product = made.assemble(inputs, made.prepare(inputs).carry, {})
        assert product.table.schema.equals(schemas.PER_MEDIA[stage])
        store.write(stage, inputs.media_id, product.table)
        return product

    return run


def video(path: Path, pictures_rgb: list[np.ndarray], times: list[int], tone_from: int | None = None) -> Path:
    """An H.264 file with `pictures_rgb` at `times` (ms) and, from `tone_from` ms on, a 1 s AAC tone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width = pictures_rgb[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("aac", rate=48_000, layout="stereo") if tone_from is not None else None
        for pixels, at in zip(pictures_rgb, times, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            tone = np.sin(np.arange(48_000) * 2 * np.pi * 440 / 48_000) * 0.5
            frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]).astype(np.float32), "fltp", "stereo")
            frame.sample_rate, frame.pts = 48_000, 48 * tone_from
            frame.time_base = Fraction(1, 48_000)
            container.mux(sound.encode(frame))
            container.mux(sound.encode(None))
    return path


def plain(colour: tuple[int, int, int], width: int = 160, height: int = 96) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def sound(path: Path, samples: np.ndarray, rate: int) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path


def only_row(product: Product) -> dict[str, Any]:
    (row,) = product.table.to_pylist()
    return row


def test_a_video_with_sound_gives_facts_stills_track_and_samples(derive: Derive, tmp_path: Path) -> None:
    """Two colours of two seconds each at 25 fps, with a tone in the second second."""
    shown = [plain(RED)] * 50 + [plain(BLUE)] * 50
    path = video(tmp_path / "clip.mp4", shown, [40 * n for n in range(100)], tone_from=1000)

    media = only_row(derive("media", path))
    assert (media["kind"], media["mime"], media["video_codec"], media["audio_codec"]) == (
        "video",
        "video/mp4",
        "h264",
        "aac",
    )
    assert (media["width"], media["height"], media["rotation"], media["has_audio"]) == (160, 96, 0, True)
    assert media["duration_s"] == pytest.approx(4.0, abs=0.05)
    assert media["fps"] == pytest.approx(25, abs=0.3)
    assert media["bytes"] == path.stat().st_size

    frames = derive("frames", path)
    rows = frames.table.to_pylist()
    assert [(row["frame"], row["reason"]) for row in rows] == [
        (0, "interval"),
        (25, "interval"),
        (50, "interval"),
        (75, "interval"),
    ]
    assert [row["start_s"] for row in rows] == pytest.approx([0, 1, 2, 3])
    assert [row["end_s"] for row in rows] == pytest.approx([1, 2, 3, 4], abs=0.05)
    assert [row["repeat_of"] for row in rows] == [None, 0, None, 50]
    assert [row["pts"] * float(Fraction(row["time_base"])) for row in rows] == pytest.approx([0, 1, 2, 3])
    assert np.abs(np.asarray(read_still(rows[0])).mean((0, 1)) - RED).max() < 6
    assert np.abs(np.asarray(read_still(rows[2])).mean((0, 1)) - BLUE).max() < 6
    assert frames.facts["repeats"] == 2

    track, times = read_track(frames.sides["track"])
    assert track.shape == (100, 27, 48, 3)
    assert np.abs(track[49].mean((0, 1)) - RED).max() < 6
    assert np.abs(track[50].mean((0, 1)) - BLUE).max() < 6
    assert times == pytest.approx(np.arange(100) * 0.04)

    pcm = read_pcm(derive("audio", path).table)
    assert np.abs(pcm[: SAMPLE_RATE * 9 // 10]).max() < 0.01
    assert np.abs(pcm[SAMPLE_RATE * 12 // 10 : SAMPLE_RATE * 19 // 10]).max() == pytest.approx(0.5, abs=0.08)


def test_a_cut_between_two_steady_stills_makes_a_still_at_the_cut(derive: Derive, tmp_path: Path) -> None:
    shown = [plain(RED)] * 10 + [plain(GREEN)] * 5 + [plain(RED)] * 10
    path = video(tmp_path / "cut.mp4", shown, [40 * n for n in range(25)])
    rows = derive("frames", path).table.to_pylist()
    assert [(row["frame"], row["reason"], row["repeat_of"]) for row in rows] == [
        (0, "interval", None),
        (10, "change", None),
        (15, "change", 0),
    ]


def test_a_strobe_cannot_make_every_frame_a_still(derive: Derive, tmp_path: Path) -> None:
    path = video(tmp_path / "strobe.mp4", [plain(RED), plain(BLUE)] * 50, [40 * n for n in range(100)])
    frames = derive("frames", path)
    assert frames.facts["frames_decoded"] == 100
    assert 8 <= frames.table.num_rows <= 24


def test_variable_frame_rate_keeps_the_times_of_the_file(derive: Derive, tmp_path: Path) -> None:
    times = [0, 40, 80, 500, 540, 1900, 1910, 3000]
    path = video(tmp_path / "vfr.mp4", [plain((20 * n, 60, 90)) for n in range(8)], times)
    _, seen = read_track(derive("frames", path).sides["track"])
    assert seen == pytest.approx(np.array(times) / 1000, abs=1e-3)


def test_a_turned_video_is_upright(derive: Derive, tmp_path: Path) -> None:
    """A matrix that players turn clockwise by 90 degrees: the stored left edge ends on top."""
    picture = plain(BLUE)
    picture[:, :80] = RED
    path = video(tmp_path / "turned.mp4", [picture] * 10, [40 * n for n in range(10)])
    identity = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    quarter = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    data = path.read_bytes()
    track_header = data.index(b"tkhd")
    matrix = data.index(identity, track_header)
    path.write_bytes(data[:matrix] + quarter + data[matrix + len(quarter) :])

    media = only_row(derive("media", path))
    assert (media["width"], media["height"], media["rotation"]) == (96, 160, 90)
    frames = derive("frames", path)
    still = np.asarray(read_still(frames.table.to_pylist()[0]))
    assert still.shape == (160, 96, 3)
    assert still[:60].mean((0, 1))[0] > 150
    assert still[100:].mean((0, 1))[2] > 150
    track, _ = read_track(frames.sides["track"])
    assert track[0, :10].mean((0, 1))[0] > 150


def test_audio_is_resampled_and_survives_storage_bit_exactly(derive: Derive, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, SAMPLE_RATE * 61)
    path = sound(tmp_path / "noise.wav", noise, SAMPLE_RATE)
    product = derive("audio", path)
    assert product.table["samples"].to_pylist() == [60 * SAMPLE_RATE, SAMPLE_RATE]
    expected = (noise * 32767).astype("<i2").astype(np.float32) / 32768
    assert np.array_equal(read_pcm(product.table), expected)
    assert product.table["rms"].to_pylist()[0] == pytest.approx(np.sqrt((expected**2).mean()), rel=0.01)

    slow = sound(tmp_path / "slow.wav", np.sin(np.arange(8000) * 2 * np.pi * 100 / 8000) * 0.5, 8000)
    assert len(read_pcm(derive("audio", slow).table)) == pytest.approx(SAMPLE_RATE, abs=64)
    media = only_row(derive("media", slow))
    assert (media["kind"], media["mime"], media["width"]) == ("audio", "audio/wav", None)
    with pytest.raises(NotApplicable):
        derive("frames", slow)


def test_a_silent_video_has_no_audio_and_that_is_no_error(derive: Derive, tmp_path: Path) -> None:
    path = video(tmp_path / "mute.mp4", [plain(RED)] * 5, [40 * n for n in range(5)])
    with pytest.raises(NotApplicable, match="no audio stream"):
        derive("audio", path)


@pytest.mark.parametrize(
    ("mode", "form", "stored"),
    [
        ("RGB", "PNG", "PNG"),
        ("P", "GIF", "PNG"),
        ("L", "TIFF", "PNG"),
        ("RGB", "JPEG", "JPEG"),
        ("CMYK", "JPEG", "JPEG"),
    ],
)
def test_images_become_one_rgb_still(derive: Derive, tmp_path: Path, mode: str, form: str, stored: str) -> None:
    path = tmp_path / f"picture.{form.lower()}"
    Image.fromarray(plain(RED)).convert(mode).save(path, form)
    row = only_row(derive("frames", path))
    assert (row["reason"], row["start_s"], row["end_s"], row["width"], row["height"]) == ("image", 0, 0, 160, 96)
    assert Image.open(io.BytesIO(row["image"])).format == stored
    mean = np.asarray(read_still(row)).mean((0, 1))
    assert np.abs(mean - (mean.mean() if mode == "L" else RED)).max() < 40


def test_transparency_is_white_deep_grey_is_scaled_and_exif_turns(derive: Derive, tmp_path: Path) -> None:
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(clear)
    assert np.asarray(read_still(only_row(derive("frames", clear)))).min() == 255

    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((20, 40), 32_768, np.uint16)).save(deep)
    assert np.asarray(read_still(only_row(derive("frames", deep)))).mean() == pytest.approx(128, abs=1)

    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), RED).save(turned, exif=exif)
    media = only_row(derive("media", turned))
    assert (media["width"], media["height"], media["rotation"]) == (20, 40, 90)
    assert read_still(only_row(derive("frames", turned))).size == (20, 40)


def test_an_animated_gif_is_a_video(derive: Derive, tmp_path: Path) -> None:
    path = tmp_path / "moving.gif"
    first, *rest = [Image.fromarray(plain(colour)) for colour in (RED, GREEN, BLUE)]
    first.save(path, save_all=True, append_images=rest, duration=500)
    media = only_row(derive("media", path))
    assert (media["kind"], media["mime"], media["has_audio"]) == ("video", "image/gif", False)
    assert derive("frames", path).facts["frames_decoded"] == 3


def test_cover_art_does_not_make_music_a_video(derive: Derive, tmp_path: Path) -> None:
    cover = io.BytesIO()
    Image.new("RGB", (32, 32), RED).save(cover, "JPEG")
    plain_mp3 = tmp_path / "plain.mp3"
    with av.open(str(plain_mp3), "w") as container:
        stream = container.add_stream("mp3", rate=44_100, layout="mono")
        tone = (np.sin(np.arange(44_100) * 0.06) * 9000).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(tone.reshape(1, -1), "s16p", "mono")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    picture = b"\x00image/jpeg\x00\x03\x00" + cover.getvalue()
    body = b"APIC" + len(picture).to_bytes(4, "big") + b"\x00\x00" + picture
    size = bytes(len(body) >> shift & 0x7F for shift in (21, 14, 7, 0))
    path = tmp_path / "cover.mp3"
    path.write_bytes(b"ID3\x03\x00\x00" + size + body + plain_mp3.read_bytes())
    media = only_row(derive("media", path))
    assert (media["kind"], media["mime"], media["audio_codec"]) == ("audio", "audio/mpeg", "mp3")


def test_documents_become_paragraphs_rows_and_cues(derive: Derive, tmp_path: Path) -> None:
    prose = tmp_path / "prose.md"
    prose.write_bytes("Cafe\u0301 au lait.\r\n\r\n\r\nSecond\r\nparagraph.".encode())
    product = derive("media", prose)
    assert product.sides["text"]["text"].to_pylist() == ["Café au lait.", "Second\nparagraph."]
    assert only_row(product)["mime"] == "text/markdown"

    table = tmp_path / "table.csv"
    table.write_text('id;said\n1;"hello; there"\n')
    assert derive("media", table).sides["text"]["text"].to_pylist() == ["id, said", "1, hello; there"]

    cues = tmp_path / "cues.srt"
    cues.write_text("1\n00:00:01,500 --> 00:00:02,000\n<i>Hello</i>\n\n2\n00:00:03,000 --> 00:00:04,000\nBye\n")
    rows = derive("media", cues).sides["text"].to_pylist()
    assert [(row["start_s"], row["end_s"], row["text"]) for row in rows] == [(1.5, 2.0, "Hello"), (3.0, 4.0, "Bye")]

    legacy = tmp_path / "legacy.txt"
    legacy.write_bytes(("Der Fuß ist größer als die Brücke über den Fluß. " * 20).encode("latin-1"))
    assert "größer als die Brücke" in derive("media", legacy).sides["text"]["text"].to_pylist()[0]

    wide = tmp_path / "wide.txt"
    wide.write_bytes("Привет, мир".encode("utf-16"))
    assert derive("media", wide).sides["text"]["text"].to_pylist() == ["Привет, мир"]

    long = tmp_path / "long.txt"
    long.write_text("word " * 2_000)
    pieces = derive("media", long).sides["text"]["text"].to_pylist()
    assert " ".join(pieces).split() == ["word"] * 2_000
    assert max(map(len, pieces)) <= 2_000


def test_a_url_is_downloaded_once_and_decoded(derive: Derive, tmp_path: Path) -> None:
    import fsspec

    path = video(tmp_path / "clip.mp4", [plain(RED)] * 5, [40 * n for n in range(5)])
    fsspec.filesystem("memory").pipe("/bucket/clip.mp4", path.read_bytes())
    remote = only_row(derive("media", "memory://bucket/clip.mp4"))
    local = only_row(derive("media", f"file://{path}"))
    assert remote["sha256"] == local["sha256"]
    assert remote["uri"] == "memory://bucket/clip.mp4"
    assert derive("frames", "memory://bucket/clip.mp4").facts["frames_decoded"] == 5


def screen(clock: str) -> Image.Image:
    """A textured 720p picture with small print in one corner."""
    base = np.random.default_rng(1).integers(60, 200, (72, 128, 3), np.uint8)
    picture = Image.fromarray(base).resize((1280, 720), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(4))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((1100, 20, 1260, 60), fill=(255, 255, 255))
    draw.text((1110, 25), clock, fill=(0, 0, 0), font_size=24)
    return picture


def recompressed(picture: Image.Image, quality: int) -> Image.Image:
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=quality)
    return Image.open(sink).convert("RGB")


def test_a_repeat_survives_coding_noise_but_not_one_changed_digit() -> None:
    repeats = pictures.Repeats()
    assert repeats.earlier(0, pictures.reduced(screen("12:00"))) is None
    assert repeats.earlier(1, pictures.reduced(recompressed(screen("12:00"), 60))) == 0
    assert repeats.earlier(2, pictures.reduced(screen("12:01"))) is None
    assert repeats.earlier(3, pictures.reduced(recompressed(screen("12:01"), 60))) == 2
    same = [pictures.perceptual_hash(pictures.reduced(screen(clock))) for clock in ("12:00", "12:01")]
    assert (int.from_bytes(same[0]) ^ int.from_bytes(same[1])).bit_count() <= 2


def test_a_contact_sheet_stays_small_however_busy_the_stills() -> None:
    noise = np.random.default_rng(2).integers(0, 255, (30, 240, 320, 3), np.uint8)
    stills = []
    for pixels in noise:
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "JPEG")
        stills.append(sink.getvalue())
    sheet = contact_sheet(stills)
    assert len(sheet) <= MAX_BYTES
    assert Image.open(io.BytesIO(sheet)).size == (650, 368)
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])


@pytest.mark.parametrize("size", [(1600, 400), (30, 3000), (90, 60)])
def test_an_image_comes_with_its_thumbnail(derive: Derive, tmp_path: Path, size: tuple[int, int]) -> None:
    """Given an image whose left half is red and whose right half is blue, then its sheet shows both halves."""
    picture = Image.new("RGB", size, RED)
    picture.paste(BLUE, (size[0] // 2, 0, *size))
    picture.save(tmp_path / "halves.png")
    product = derive("frames", tmp_path / "halves.png")
    sheet = Image.open(io.BytesIO(product.previews["contact_sheet"])).convert("RGB")
    pixels = np.asarray(sheet, int)
    width, height = (max(1, round(side * min(1, 160 / size[0], 120 / size[1]))) for side in size)
    assert sheet.size == (164, 124)
    for color in (RED, BLUE):
        like = np.abs(pixels - color).max(axis=2) < 60
        assert like.sum() == pytest.approx(width * height / 2, rel=0.2, abs=height + width)
