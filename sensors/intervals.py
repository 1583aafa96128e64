"""How often a sensor ticks."""


def every(seconds: int) -> int:
    """`minimum_interval_seconds` of a sensor that is to tick every `seconds`.

    The daemon's looks are a little more or less than five seconds apart: a sensor that asked for exactly its
    interval would often miss the look that was meant for it and tick one later.
    """
    return max(1, seconds - 1)
