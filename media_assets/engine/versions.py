"""Versions: what an item's artifact depends on, as one digest computable before anything runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from media_assets.engine.contract import MediaItem, Stage


def code_version(stage: Stage[Any, Any]) -> str:
    """Digest of the stage's code version, models, routes and screens, and of the settings that change its output.

    This is the asset's code version in Dagster: a changed model shows there as changed code.
    """
    cached = stage.__dict__.get("_code_version")
    if cached is None:
        cached = stage.__dict__["_code_version"] = _code_version(stage)
    return str(cached)


def _code_version(stage: Stage[Any, Any]) -> str:
    models = [spec.digest for spec in stage.specs()]
    models += [declared.digest for declared in stage.routes()] + [declared.digest for declared in stage.screens()]
    return _digest([stage.name, stage.code_version, models, dict(stage.parameters())])


def item_version(stage: Stage[Any, Any], item: MediaItem, contents: Sequence[str]) -> str:
    """Digest of the stage and of the contents of its inputs, in the order of `stage.inputs`.

    A stage without inputs reads the upload itself, identified by URI and etag.
    """
    return _digest([code_version(stage), list(contents) if stage.inputs else [item.uri, item.etag]])


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
