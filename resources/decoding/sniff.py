"""What a file is, by its first bytes: a picture, a container, a document or something refused. Never by its name."""

from __future__ import annotations

import codecs

from resources.errors import Unsupported

HEAD_BYTES = 64 * 1024

PICTURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
}
REFUSED = {
    b"PK\x03\x04": "a zip archive or office document",
    b"PK\x05\x06": "an empty zip archive",
    b"%PDF-": "a PDF document",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\x7fELF": "a program",
    b"MZ": "a Windows program",
    b"SQLite format 3\x00": "a database",
    b"PAR1": "a Parquet table",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old office document",
}
TAR_MAGIC_AT, TAR_MAGIC = 257, b"ustar"
ALLOWED_CONTROLS = frozenset("\t\n\r\f\x1b\x85")
BOMS = (codecs.BOM_UTF8, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def picture_format(head: bytes) -> str | None:
    """Pillow's name of the picture format `head` claims to be, or None."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "AVIF"
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0":
        return "BMP"
    return next((name for magic, name in PICTURES.items() if head.startswith(magic)), None)


def claims_container(head: bytes) -> bool:
    """Whether `head` bears the mark of a common audio or video container."""
    marks = (b"RIFF", b"\x1aE\xdf\xa3", b"OggS", b"fLaC", b"ID3", b"FLV", b"FORM", b"RIFX", b"RF64")
    return head.startswith(marks) or head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free")


def refuse_foreign(head: bytes) -> None:
    """Raise Unsupported for archives, documents and programs, naming what the file is."""
    found = next((name for magic, name in REFUSED.items() if head.startswith(magic)), None)
    if head[TAR_MAGIC_AT : TAR_MAGIC_AT + len(TAR_MAGIC)] == TAR_MAGIC:
        found = "a tar archive"
    if found:
        raise Unsupported(
            f"The file is {found}, not media.", "Unpack or export it and add the media files it holds one by one."
        )


def looks_like_text(head: bytes) -> bool:
    """Whether `head` reads as text: a byte order mark, or no control characters in any plausible charset."""
    if head.startswith(b"%PDF-"):
        return False
    if head.startswith(BOMS):
        return True
    if any(byte < 0x20 and chr(byte) not in ALLOWED_CONTROLS for byte in head) or 0x7F in head:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return _mostly_ascii_or_script(head)
    return True


def _mostly_ascii_or_script(head: bytes) -> bool:
    """A legacy charset has line structure or blanks, and few bytes of the C1 range that no text uses."""
    blanks = sum(head.count(byte) for byte in (b" ", b"\n", b"\t"))
    return blanks * 40 >= len(head)
