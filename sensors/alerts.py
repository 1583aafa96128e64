"""`alert_sensor`: posts what failed since the last post to a webhook, as generic JSON or for Slack."""

import time
from collections.abc import Sequence
from typing import Any

import dagster as dg
from pydantic import BaseModel, ConfigDict, ValidationError

from resources.library import Library
from resources.settings import Settings
from sensors.failures import KINDS_LISTED, Failures, Position, current_position, failures_since, utc
from sensors.webhook import post

NAME = "alert_sensor"
INTERVAL_S = 15
UNSET = "Alerts go nowhere: set alerts.webhook_url."


class Memory(BaseModel):
    """The sensor's cursor: what was posted, and when (seconds since the epoch)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    position: Position
    posted_at: float


def build_alert_sensor(settings: Settings) -> dg.SensorDefinition:
    """The sensor that posts failures to `alerts.webhook_url`; its cursor moves once the receiver answered 2xx."""
    alerts = settings.alerts

    @dg.sensor(
        name=NAME,
        minimum_interval_seconds=INTERVAL_S,
        default_status=dg.DefaultSensorStatus.RUNNING if alerts.webhook_url else dg.DefaultSensorStatus.STOPPED,
        description="Posts failed runs, quarantined outcomes, failed checks, lost batches and rejected messages.",
        required_resource_keys={"media"},
    )
    def alert_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        if alerts.webhook_url is None:
            return dg.SkipReason(UNSET)
        library: Library = context.resources.media
        now = time.time()
        memory = _memory(context)
        if memory is None:
            position = current_position(context.instance, library.database)
            return _result("Failures from now on are posted.", position, 0.0)
        if 0 <= (since := now - memory.posted_at) < alerts.min_interval_s:
            return dg.SkipReason(f"The last post was {since:.0f} s ago; failures are joined until the next.")
        found, position = failures_since(memory.position, context.instance, library.database, now)
        if not found:
            # Not a post: the next failure goes out at once.
            return _result("Nothing failed.", position, 0.0)
        body = slack_body(found) if alerts.format == "slack" else json_body(found, now)
        post(alerts.webhook_url.get_secret_value(), body, alerts.timeout_s)
        return _result(f"Posted: {headline(found)}.", position, now)

    return alert_sensor


def _memory(context: dg.SensorEvaluationContext) -> Memory | None:
    if not context.cursor:
        return None
    try:
        return Memory.model_validate_json(context.cursor)
    except ValidationError:
        context.log.warning("The cursor is not of this version: failures before this tick are not posted.")
        return None


def _result(told: str, position: Position, posted_at: float) -> dg.SensorResult:
    memory = Memory(position=position, posted_at=posted_at)
    return dg.SensorResult(skip_reason=dg.SkipReason(told), cursor=memory.model_dump_json())


def headline(found: Sequence[Failures]) -> str:
    """How many of what."""
    return ", ".join(f"{part.count:,} {part.kind}" for part in found)


def json_body(found: Sequence[Failures], now: float) -> dict[str, Any]:
    """The generic body."""
    return {
        "source": "media-assets",
        "at": utc(now),
        "total": sum(part.count for part in found),
        "text": _text(found),
        "failures": [
            {
                "kind": part.kind,
                "count": part.count,
                "by": [{"what": what, "count": count} for what, count in part.by[:KINDS_LISTED]],
                "examples": [{"what": e.what, "error": e.error, "run_id": e.run_id} for e in part.examples],
                "more": part.count - len(part.examples),
            }
            for part in found
        ],
    }


def slack_body(found: Sequence[Failures]) -> dict[str, Any]:
    """The body of Slack's incoming webhooks, with its three control characters escaped."""
    return {"text": _text(found).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}


def _text(found: Sequence[Failures]) -> str:
    lines = [f"media-assets: {headline(found)}"]
    for part in found:
        lines += ["", f"{part.kind}: {part.count:,}"]
        lines += [f"  {count:,} × {what}" for what, count in part.by[:KINDS_LISTED]]
        if more := len(part.by) - KINDS_LISTED:
            lines += [f"  and {more:,} more classes"] if more > 0 else []
        for example in part.examples:
            run = f" [run {example.run_id}]" if example.run_id else ""
            lines.append(f"• {example.what}{run}: {example.error}")
        if more := part.count - len(part.examples):
            lines.append(f"  and {more:,} more")
    return "\n".join(lines)
