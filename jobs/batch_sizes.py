"""How much work one run takes on: where a step starts a process, so much that the start is a twentieth of it at most.

On Ray a step takes some 15 s until its models are loaded (docs/benchmarks.md), for which 300 s of work are enough. What
the settings name is taken as it stands.
"""

from __future__ import annotations

import sys

from resources.settings import Settings

EXPRESS_ON_RAY_S = 300.0


def most_items(settings: Settings) -> int:
    """Items that fill a planned batch: `engine.batch_items`; on Ray any number, for seconds of work alone fill it."""
    if settings.compute.executor == "ray" and "batch_items" not in settings.engine.model_fields_set:
        return sys.maxsize
    return settings.engine.batch_items


def express_s(settings: Settings) -> float:
    """Seconds of work up to which one run takes all groups: `planner.express_s`; on Ray more: one start for four."""
    if settings.compute.executor == "ray" and "express_s" not in settings.planner.model_fields_set:
        return EXPRESS_ON_RAY_S
    return settings.planner.express_s
