"""Pictures: opening within pixel limits, upright RGB, stills, perceptual hashes and repeats."""

from __future__ import annotations

import io
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from resources.decoding.protocol import THUMBNAIL
from resources.errors import MediaError, TooLarge, Truncated, Undecodable

JPEG_STILL = {"quality": 92, "subsampling": 2}
JPEG_IMAGE = {"quality": 95, "subsampling": 0}
PNG_IMAGE = {"compress_level": 1}
PNG_MAX_PIXELS = 4_000_000
MIMES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
    "WEBP": "image/webp",
    "AVIF": "image/avif",
    "JPEG2000": "image/jp2",
}
LOSSLESS = frozenset({"PNG", "BMP", "GIF", "TIFF"})
EXIF_ORIENTATION = 0x0112
CLOCKWISE_OF_ORIENTATION = {3: 180, 6: 90, 8: 270, 5: 90, 7: 270, 4: 180}
TRUNCATION_WORDS = ("truncated", "premature", "end of file", "eof", "not enough data", "unexpected end")

REDUCED_SIDE = 256
REPEAT_MAX_DIFFERENCE = 16
REPEAT_MEMORY = 64


@dataclass(frozen=True, slots=True)
class Still:
    """An encoded picture: JPEG or PNG bytes, size in pixels, 64-bit perceptual hash."""

    image: bytes
    width: int
    height: int
    phash: bytes


@contextmanager
def opened(stream: BinaryIO, form: str, max_pixels: int) -> Iterator[Image.Image]:
    """The picture behind `stream`, its header read and its size checked before a pixel is allocated.

    Raises TooLarge, Truncated, Undecodable for anything the block or Pillow raises on the bytes.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(stream, formats=_formats(form)) as picture:
                _check_size(picture.width, picture.height, max_pixels)
                yield picture
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise TooLarge(f"The picture has more than {max_pixels} pixels (limits.max_pixels).") from None
    except (MediaError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - Pillow's plugins raise nearly anything on hostile bytes
        if any(word in str(error).lower() for word in TRUNCATION_WORDS):
            raise Truncated(f"The {form} picture ends before its pixels do.") from None
        raise Undecodable(f"The {form} picture cannot be decoded ({type(error).__name__}).") from None


def display_size(picture: Image.Image) -> tuple[int, int, int]:
    """Width and height after EXIF orientation, and the clockwise rotation in degrees that it asks for."""
    orientation = picture.getexif().get(EXIF_ORIENTATION, 1)
    rotation = CLOCKWISE_OF_ORIENTATION.get(orientation, 0)
    size = picture.size if rotation % 180 == 0 else picture.size[::-1]
    return size[0], size[1], rotation


def image_still(picture: Image.Image, max_side: int) -> tuple[Still, Image.Image]:
    """An opened picture as its one still, upright, RGB, no side longer than `max_side`; and its thumbnail.

    PNG where the original was lossless and small, so that fine print stays exact; else JPEG.
    """
    lossless = picture.format in LOSSLESS and picture.width * picture.height <= PNG_MAX_PIXELS
    picture.load()
    ImageOps.exif_transpose(picture, in_place=True)
    upright = _rgb(picture)
    upright.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    form, options = ("PNG", PNG_IMAGE) if lossless else ("JPEG", JPEG_IMAGE)
    reduction = reduced(upright)
    still = encoded(upright, reduction, form, options)
    thumbnail = reduction.copy()
    thumbnail.thumbnail(THUMBNAIL, Image.Resampling.HAMMING)  # nearly as sharp as by default, in 2/3 of the time
    return still, thumbnail


def encoded(picture: Image.Image, reduction: Image.Image, form: str, options: dict[str, int]) -> Still:
    """An RGB picture, with its `reduced` copy, as a still."""
    sink = io.BytesIO()
    picture.save(sink, form, **options)
    return Still(sink.getvalue(), picture.width, picture.height, perceptual_hash(reduction))


def perceptual_hash(reduction: Image.Image) -> bytes:
    """64-bit DCT hash of a `reduced` picture, 8 bytes, row-major from the lowest frequencies (imagehash.phash)."""
    import imagehash

    return np.packbits(imagehash.phash(reduction).hash.reshape(-1)).tobytes()


def reduced(picture: Image.Image) -> Image.Image:
    """The picture averaged down to 256 pixels on its longest side; itself where it is smaller."""
    scale = REDUCED_SIDE / max(picture.size)
    if scale >= 1:
        return picture
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BOX)


class Repeats:
    """Finds the earlier still that shows practically the same picture.

    Two stills are the same when no pixel channel of their reductions to 256 pixels on the longest side
    differs by more than 16 of 255. The maximum, not a mean or a hash distance, decides: a perceptual hash
    cannot see a changed digit, while on the reduction a pixel stands for a block of 5x5 (at 1280), which a
    changed stroke moves far and coding noise, averaged over the block, does not. A still is compared with
    the originals only, never with repeats, so slow drift cannot chain; the last 64 originals are kept.
    """

    def __init__(self) -> None:
        self._originals: OrderedDict[int, npt.NDArray[np.int16]] = OrderedDict()

    def earlier(self, frame: int, reduction: Image.Image) -> int | None:
        """Frame of an earlier still whose `reduced` picture is the same, or None and remember this one."""
        pixels = np.asarray(reduction, np.int16)
        for original in reversed(self._originals):
            other = self._originals[original]
            if other.shape == pixels.shape and np.abs(other - pixels).max() <= REPEAT_MAX_DIFFERENCE:
                self._originals.move_to_end(original)
                return original
        self._originals[frame] = pixels
        if len(self._originals) > REPEAT_MEMORY:
            self._originals.popitem(last=False)
        return None


def _formats(form: str) -> tuple[str, ...]:
    return ("JPEG", "MPO") if form == "JPEG" else (form,)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise Undecodable(f"The picture claims a size of {width}x{height} pixels.")
    if width * height > max_pixels:
        raise TooLarge(f"The picture has {width}x{height} pixels, more than {max_pixels} (limits.max_pixels).")


def _rgb(picture: Image.Image) -> Image.Image:
    """Any mode as RGB: deep greys scaled to 8 bits, transparency over white; itself where it is RGB."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        return _stretched(picture).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        canvas = Image.new("RGB", layer.size, (255, 255, 255))
        canvas.paste(layer, mask=layer.getchannel("A"))
        return canvas
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _stretched(picture: Image.Image) -> Image.Image:
    """Samples of unknown depth, mapped from their own range to 0-255; a range within 0-255 or 16 bits is kept."""
    values = np.nan_to_num(np.asarray(picture, np.float64))
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 255 and picture.mode == "I":
        low, high = 0.0, 255.0
    elif low >= 0 and high <= 65_535 and picture.mode == "I":
        low, high = 0.0, 65_535.0
    scaled = (values - low) * (255.0 / max(high - low, 1e-9))
    return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))
