"""Which columns hold pictures and sound: those are read per media item, not from the catalog."""

from __future__ import annotations

import pyarrow as pa

BLOBS: dict[str, tuple[str, ...]] = {"frames": ("image",), "audio": ("flac",)}
"""Columns too large for the catalog, by asset."""


def lean(asset: str, schema: pa.Schema) -> pa.Schema:
    """`schema` without the asset's blobs: the columns of the catalog."""
    blobs = BLOBS.get(asset, ())
    return pa.schema([field for field in schema if field.name not in blobs])
