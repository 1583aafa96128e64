"""How often a sensor ticks, and how long a tick may stay to be there when something happens."""

import dagster as dg

_STAY_S = 4.0  # within the daemon's five seconds from look to look, so that none is missed


def every(seconds: int) -> int:
    """`minimum_interval_seconds` of a sensor that is to tick every `seconds`.

    The daemon's looks are a little more or less than five seconds apart: a sensor that asked for exactly its
    interval would often miss the look that was meant for it and tick one later.
    """
    return max(1, seconds - 1)


def stay_s(instance: dg.DagsterInstance) -> float:
    """Seconds for which a tick with nothing to do may wait for news; 0 where the sensors take turns.

    With `sensors: use_threads` in dagster.yaml each has a thread of the daemon, and nobody waits for it.
    """
    return _STAY_S if instance.get_sensor_settings().get("use_threads") else 0.0
