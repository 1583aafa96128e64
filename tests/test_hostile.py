"""Given hostile, broken or oddly named files, when they are probed and decoded, then each ends in a sensible
result or one stable error of its own, and the files beside it are not harmed."""

from __future__ import annotations

import io
import os
import shutil
import signal
import struct
import sys
import tarfile
import threading
import wave
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from resources import errors
from resources.decoding import protocol
from resources.decoding.answers import Decoded, Probed
from resources.decoding.client import Decoder
from resources.decoding.collector import Collector
from resources.decoding.pool import DecoderPool, Message
from resources.decoding.sources import localize
from resources.errors import MediaError
from resources.files.local import version_of
from resources.ingest.discovery import confinement
from resources.ingest.uploads import uri_of
from resources.settings import Decoding, Ingestion, Limits

LIMITS = Limits()


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder(LIMITS, Decoding(workers=1))
    yield made
    made.close()


def new_decoder(**limits: float) -> Decoder:
    return Decoder(Limits(**limits), Decoding(workers=1))


def probe(decoder: Decoder, path: Path | str | bytes) -> Probed:
    return decoder.probe(localize(os.fsdecode(path), LIMITS.max_bytes))


def decode(decoder: Decoder, path: Path, wanted: frozenset[str] = frozenset({"frames"})) -> Decoded:
    facts = probe(decoder, path).facts
    file = localize(str(path), LIMITS.max_bytes)
    return decoder.decode(file, facts.kind, facts.bytes, facts.duration_s, wanted)


def clip(path: Path, seconds: int = 2, faststart: bool = True, noisy: bool = False, size: int = 64) -> Path:
    """An MP4 with a moving gradient, its index first or last."""
    options = {"movflags": "faststart"} if faststart else {}
    generator = np.random.default_rng(0)
    with av.open(str(path), "w", container_options=options) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(seconds * 25):
            pixels = np.full((size, size, 3), (index * 3 % 256, 80, 120), np.uint8)
            if noisy:
                pixels = generator.integers(0, 255, (size, size, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def picture(form: str) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)).save(sink, form)
    return sink.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises one-bit `width` x `height` and holds a handful of bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def wav(seconds: float, promised_s: float | None = None) -> bytes:
    sink = io.BytesIO()
    with wave.open(sink, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\x10\x20" * int(8000 * (promised_s or seconds)))
    return sink.getvalue()[: 44 + 2 * int(8000 * seconds)]


def tar() -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("inner.mp4"))
    return sink.getvalue()


def gif_bomb() -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
        + b"\x02\x02\x4c\x01\x00;"
    )


PROBE_FAILURES: dict[str, tuple[str, Callable[[], bytes], type[MediaError]]] = {
    "zero bytes": ("empty.mp4", lambda: b"", errors.Empty),
    "header-only wav": ("silent.wav", lambda: wav(0), errors.Empty),
    "half a wav header": ("header.wav", lambda: wav(1)[:22], errors.Undecodable),
    "60000x60000 png": ("bomb.png", lambda: png_header(60_000, 60_000), errors.TooLarge),
    "65535x65535 gif": ("bomb.gif", gif_bomb, errors.TooLarge),
    "png cut in its header": ("cut.png", lambda: picture("PNG")[:30], errors.Undecodable),
    "noise named txt": ("noise.txt", lambda: np.random.default_rng(3).bytes(20_000), errors.Unsupported),
    "zeros named mp4": ("zeros.mp4", lambda: bytes(5_000), errors.Unsupported),
    "tar": ("pictures.tar", tar, errors.Unsupported),
    "zip": ("pictures.jpg", lambda: b"PK\x03\x04" + bytes(100), errors.Unsupported),
    "pdf": ("page.pdf", lambda: b"%PDF-1.7\n1 0 obj\n", errors.Unsupported),
    "blank text": ("blank.txt", lambda: b" \n\t\n", errors.Empty),
    "subtitles without cues": ("none.vtt", lambda: b"WEBVTT\n\n", errors.Empty),
}


@pytest.mark.parametrize("case", PROBE_FAILURES)
def test_a_hopeless_file_fails_its_probe_with_a_stable_class(decoder: Decoder, tmp_path: Path, case: str) -> None:
    name, make, expected = PROBE_FAILURES[case]
    path = tmp_path / name
    path.write_bytes(make())
    with pytest.raises(MediaError) as caught:
        probe(decoder, path)
    assert type(caught.value) is expected, caught.value
    assert caught.value.message.endswith(".")
    assert caught.value.remedy_text


def test_an_mp4_cut_before_its_index_is_truncated(decoder: Decoder, tmp_path: Path) -> None:
    path = clip(tmp_path / "tail-index.mp4", faststart=False, noisy=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(errors.Truncated):
        probe(decoder, path)


def test_an_mp4_cut_behind_its_index_is_truncated_when_decoded(decoder: Decoder, tmp_path: Path) -> None:
    path = clip(tmp_path / "half.mp4", seconds=4, noisy=True)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert isinstance(decode(decoder, path).frames, errors.Truncated)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_picture_cut_in_half_is_truncated(decoder: Decoder, tmp_path: Path, form: str) -> None:
    data = picture(form)
    path = tmp_path / f"half.{form.lower()}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(errors.Truncated):
        decode(decoder, path)


def test_flipped_bytes_cost_frames_not_the_file(decoder: Decoder, tmp_path: Path) -> None:
    path = clip(tmp_path / "flipped.mp4", seconds=4, noisy=True)
    data = bytearray(path.read_bytes())
    for at in np.random.default_rng(5).integers(len(data) // 2, len(data) - 100, 30):
        data[at] ^= 0x55
    path.write_bytes(data)
    frames = decode(decoder, path).frames
    assert not isinstance(frames, MediaError)
    assert frames.facts is not None
    assert frames.facts.frames_decoded >= 50


def test_text_with_a_video_name_is_a_document(decoder: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "movie.mp4"
    path.write_text("This is a script, not a film.")
    probed = probe(decoder, path)
    assert probed.facts.kind == "text"
    assert [segment.text for segment in probed.segments] == ["This is a script, not a film."]


def test_a_playlist_is_text_and_opens_nothing_else(decoder: Decoder, tmp_path: Path) -> None:
    secret = clip(tmp_path / "secret.mp4")
    path = tmp_path / "list.m3u8"
    path.write_text(f"#EXTM3U\n#EXTINF:2,\nfile://{secret}\n#EXT-X-ENDLIST\n")
    assert probe(decoder, path).facts.kind == "text"


def test_a_broken_sound_track_leaves_the_picture_whole(decoder: Decoder, tmp_path: Path) -> None:
    path = tmp_path / "mixed.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        sound = container.add_stream("mp3", rate=16_000, layout="mono")
        for index in range(50):
            pixels = np.full((64, 64, 3), index, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        tone = av.AudioFrame.from_ndarray(np.ones((1, 32_000), np.int16), "s16p", "mono")
        tone.sample_rate = 16_000
        packets = [*sound.encode(tone), *sound.encode(None)]
        coded = [bytes(packet) for packet in packets if packet.size]
        container.mux(packets)
        container.mux(video.encode(None))
    data = path.read_bytes()
    for packet in coded:
        data = data.replace(packet, bytes(len(packet)))
    path.write_bytes(data)
    result = decode(decoder, path, frozenset({"frames", "audio"}))
    assert isinstance(result.audio, errors.Undecodable)
    assert not isinstance(result.frames, MediaError)
    assert result.frames.facts is not None
    assert result.frames.facts.frames_decoded == 50


@pytest.mark.parametrize(
    "name",
    [b"caf\xe9.mp4", b"two\nlines.mp4", b"quote'\";--.mp4", b"\xe2\x80\xaertl.mp4", b"-rf.mp4", b"n" * 240 + b".mp4"],
)
def test_odd_names_are_only_names(decoder: Decoder, tmp_path: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    data = clip(tmp_path / "ok.mp4").read_bytes()
    with open(path, "wb") as file:
        file.write(data)
    assert probe(decoder, path).facts.kind == "video"
    uri = uri_of(os.fsdecode(path))
    assert decoder.probe(localize(uri, 10**9)).facts.kind == "video"
    assert uri.encode("utf-8")


def test_what_cannot_be_opened_is_unreadable(decoder: Decoder, tmp_path: Path) -> None:
    loop = tmp_path / "loop.mp4"
    loop.symlink_to(loop)
    for path in (tmp_path / "vanished.mp4", loop):
        with pytest.raises(errors.Unreadable):
            probe(decoder, path)
    with pytest.raises(errors.Unreadable):
        localize("memory://nowhere/at-all.mp4", LIMITS.max_bytes)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_unreadable(decoder: Decoder, tmp_path: Path) -> None:
    path = clip(tmp_path / "private.mp4")
    path.chmod(0)
    with pytest.raises(errors.Unreadable):
        probe(decoder, path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_link_swapped_in_after_the_registration_does_not_lead_out(decoder: Decoder, tmp_path: Path) -> None:
    """Given a registered file of a watched folder, when it, or the folder it is in, becomes a link to a file elsewhere
    of the same size and time, then it is refused; within the folder, and for who allows it, it may be a link."""
    watched, elsewhere = tmp_path / "watched", tmp_path / "elsewhere"
    (watched / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    secret = clip(elsewhere / "a.mp4")
    path = watched / "sub" / "a.mp4"
    shutil.copy2(secret, path)
    ingestion = Ingestion(folders=(str(watched), str(watched / "sub")))
    within = confinement(str(path), ingestion)
    assert within == str(watched)
    assert confinement(str(secret), ingestion) is None
    assert confinement(str(path), ingestion.model_copy(update={"follow_links": True})) is None
    etag = version_of(path.stat())
    file = localize(str(path), 10**9, etag=etag, within=within)
    assert decoder.probe(file).facts.kind == "video"
    path.rename(watched / "b.mp4")
    path.symlink_to(watched / "b.mp4")
    assert decoder.probe(file).facts.kind == "video"
    path.unlink()
    path.symlink_to(secret)
    with pytest.raises(errors.Unreadable, match=r"through a link\. Set ingestion\.follow_links"):
        decoder.probe(file)
    with pytest.raises(errors.Unreadable, match="through a link"):
        decoder.decode(file, "video", secret.stat().st_size, 1.0, frozenset({"frames"}))
    assert decoder.probe(localize(str(path), 10**9, etag=etag)).facts.kind == "video"
    path.unlink()
    path.parent.rmdir()
    path.parent.symlink_to(elsewhere)
    with pytest.raises(errors.Unreadable, match="through a link"):
        decoder.probe(file)


def test_folders_and_pipes_are_refused_without_waiting(decoder: Decoder, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe):
        with pytest.raises(errors.Unsupported, match="no regular file"):
            probe(decoder, path)


def test_a_file_that_changed_since_its_probe_is_noticed(decoder: Decoder, tmp_path: Path) -> None:
    path = clip(tmp_path / "growing.mp4")
    facts = probe(decoder, path).facts
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(errors.SourceChanged):
        decoder.decode(localize(str(path), 10**9), facts.kind, facts.bytes, facts.duration_s, frozenset({"frames"}))


def test_a_file_that_is_another_version_than_the_registered_one_is_not_taken_for_it(
    decoder: Decoder, tmp_path: Path
) -> None:
    """Given a file replaced by one of the same size, before it is probed or before it is decoded, then it says so."""
    path = tmp_path / "a.png"
    pixels = np.zeros((40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path, compress_level=0)
    file = localize(str(path), LIMITS.max_bytes, etag=version_of(path.stat()))
    facts = decoder.probe(file).facts
    assert decoder.decode(file, facts.kind, facts.bytes, None, frozenset({"frames"}))
    Image.fromarray(pixels + 200).save(tmp_path / "other.png", compress_level=0)
    os.replace(tmp_path / "other.png", path)
    assert path.stat().st_size == facts.bytes
    for look in (
        lambda: decoder.probe(file),
        lambda: decoder.decode(file, facts.kind, facts.bytes, None, frozenset({"frames"})),
    ):
        with pytest.raises(errors.SourceChanged, match="since it was registered"):
            look()


def test_limits_on_bytes_pixels_and_duration_refuse(tmp_path: Path) -> None:
    path = clip(tmp_path / "clip.mp4")
    for limit in ({"max_bytes": 100}, {"max_pixels": 4000}, {"max_duration_s": 1.0}):
        strict = new_decoder(**limit)
        with pytest.raises(errors.TooLarge):
            probe(strict, path)
        strict.close()


def test_memory_hunger_ends_in_an_error_of_that_file_alone(tmp_path: Path) -> None:
    """A picture within the pixel limit that needs more memory than the worker has."""
    path = tmp_path / "hungry.png"
    sink = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(sink, "PNG")
    path.write_bytes(sink.getvalue())
    tight = new_decoder(max_pixels=500_000_000, decode_memory_bytes=1200 * 2**20)
    facts = probe(tight, path).facts
    with pytest.raises(errors.OutOfMemory):
        tight.decode(localize(str(path), 10**9), facts.kind, facts.bytes, None, frozenset({"frames"}))
    assert probe(tight, clip(tmp_path / "good.mp4")).facts.kind == "video"
    tight.close()


def test_a_worker_that_dies_on_a_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first worker is killed by SIGKILL after it has taken its second file."""
    good = clip(tmp_path / "good.mp4")
    mortal = new_decoder()
    monkeypatch.setenv("MEDIA_FAULT", "decoding.file:kill:2")
    assert probe(mortal, good).facts.kind == "video"
    (first,) = mortal.pool.pids()
    with pytest.raises(errors.DecoderCrashed, match="signal 9"):
        probe(mortal, good)
    monkeypatch.delenv("MEDIA_FAULT")
    assert probe(mortal, good).facts.kind == "video"
    assert mortal.pool.pids() != (first,)
    mortal.close()


def test_a_worker_that_died_idle_is_replaced_unnoticed(tmp_path: Path) -> None:
    good = clip(tmp_path / "good.mp4")
    made = new_decoder()
    probe(made, good)
    (first,) = made.pool.pids()
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert probe(made, good).facts.kind == "video"
    assert made.pool.pids() != (first,)
    made.close()


def test_a_worker_that_hangs_is_killed_by_the_watchdog(tmp_path: Path) -> None:
    good = clip(tmp_path / "good.mp4")
    impatient = new_decoder(decode_timeout_s=1.0, decode_factor=0.1)
    probe(impatient, good)
    (stuck,) = impatient.pool.pids()
    os.kill(stuck, signal.SIGSTOP)
    with pytest.raises(errors.DecodeTimeout):
        decode(impatient, good)
    with pytest.raises(ProcessLookupError):
        os.kill(stuck, 0)
    impatient.close()


def test_many_threads_share_few_workers(tmp_path: Path) -> None:
    good, bad = clip(tmp_path / "good.mp4"), tmp_path / "bad.mp4"
    bad.write_bytes(b"\x00" * 300)
    shared = Decoder(LIMITS, Decoding(workers=2))
    outcomes: list[str] = []

    def work(path: Path) -> None:
        try:
            outcomes.append(probe(shared, path).facts.kind)
        except MediaError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=work, args=(path,)) for path in [good, bad] * 6]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["unsupported"] * 6 + ["video"] * 6
    assert len(shared.pool.pids()) <= 2
    shared.close()


def test_leaving_an_answer_half_read_costs_only_that_worker(tmp_path: Path) -> None:
    path = clip(tmp_path / "good.mp4")
    pool = DecoderPool(1, LIMITS.decode_memory_bytes, 60)
    request = protocol.Request("probe", os.fsencode(path).hex(), ".mp4", 10**9, 10**8, 1e4, 10**6)
    half = pool.run(request, lambda: 60)
    next(half)
    half.close()
    assert [message.kind for message in pool.run(request, lambda: 60)][-1] == "media"
    pool.close()


STILL = {
    "frame": 0,
    "pts": 0,
    "time_base": "1/25",
    "start_s": 0.0,
    "width": 200,
    "height": 200,
    "reason": "interval",
    "phash": "00" * 8,
    "repeat_of": None,
}


@pytest.mark.parametrize(
    "message",
    [
        Message("still", {**STILL, "width": 100}, picture("JPEG")),
        Message("still", STILL, b"no picture"),
        Message("still", {**STILL, "start_s": -1.0}, picture("JPEG")),
        Message("still", {**STILL, "extra": 1}, picture("JPEG")),
        Message("thumbnail", {"width": 2, "height": 1}, b"short"),
        Message("thumbnail", {"width": 161, "height": 1}, bytes(483)),
        Message("thumbnail", {"width": 0, "height": 1}, b""),
        Message("track", {"first_frame": 0, "start_s": [0.0]}, b"short"),
        Message("track", {"first_frame": 7, "start_s": [0.0]}, bytes(protocol.FRAME_BYTES)),
        Message("pcm", {"first_sample": 0}, b"odd"),
        Message("facts", {"part": "frames", "frames_decoded": "many", "decode_errors": 0, "end_s": 0.0}, b""),
        Message("surprise", {}, b""),
    ],
)
def test_a_lying_worker_is_treated_as_crashed(message: Message) -> None:
    with pytest.raises(errors.DecoderCrashed):
        Collector(LIMITS).take(message)
