"""The `media` stage: what a file is, measured by its content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from media_assets import schemas
from media_assets.engine.contract import Inputs, Prepared, Product, Stage
from media_assets.engine.versions import code_version
from media_assets.stages.support.decoding import DECODED, source
from resources.decoding.answers import Probed
from resources.decoding.client import decoder


class Media(Stage[None, None]):
    """Probe of one file: kind, codecs, size, duration and SHA-256; the text of a document as a side table.

    The kind follows the content, never the extension. Duration and times count from the media's own zero
    (see `resources.decoding.containers.origin_s`). Exact duplicates are found by whoever reads the table.
    """

    name = "media"
    memo = DECODED
    code_version = "1"
    description = "Kind, codecs, size, duration and SHA-256 of the file, and the text of a document."

    def prepare(self, inputs: Inputs) -> Prepared[None]:
        """Probe in a decoder process. Raises MediaError: unreadable, empty, unsupported, too_large, ..."""
        return Prepared(carry=decoder(self.settings).probe(source(inputs, self.settings)))

    def assemble(self, inputs: Inputs, carry: Any, outputs: Mapping[str, None]) -> Product:  # noqa: ARG002
        """One row, and one row per paragraph or cue in the side table `text`."""
        probed: Probed = carry
        facts = probed.facts
        row = {
            **facts.model_dump(),
            "media_id": inputs.media_id,
            "uri": inputs.item.uri,
            "duplicate_of": None,
            "version": inputs.version,
        }
        table = schemas.table(schemas.MEDIA, [row])
        figures: dict[str, int | float | str] = {"kind": facts.kind, "mime": facts.mime, "bytes": facts.bytes}
        if facts.duration_s is not None:
            figures["duration_s"] = round(facts.duration_s, 3)
        if probed.segments:
            figures["segments"] = len(probed.segments)
        # Dependants follow the bytes: equal files are analysed once, wherever they lie.
        content = f"{code_version(self)}:{facts.sha256}"
        return Product(table, {"text": _text_table(inputs, probed)}, figures, content=content)


def _text_table(inputs: Inputs, probed: Probed) -> pa.Table:
    rows: list[dict[str, object]] = [
        {
            "media_id": inputs.media_id,
            "segment": index,
            "start_s": segment.start_s,
            "end_s": segment.end_s,
            "text": segment.text,
            "version": inputs.version,
        }
        for index, segment in enumerate(probed.segments)
    ]
    return schemas.table(schemas.MEDIA_TEXT, rows)
