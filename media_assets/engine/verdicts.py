"""What is said of a task: what it cost, why it hung, and why it could not begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from media_assets.engine.contract import Stage
from media_assets.engine.recorder import Task
from resources.errors import UpstreamFailed
from resources.records.outcome import Cost, Outcome, Status


def cost_of(
    task: Task,
    device: str,
    rows: int = 0,
    bytes_out: int = 0,
    answered: Sequence[str] | None = None,
    copied_from: str | None = None,
) -> Cost:
    """What the task took. `answered` names the models that answered; without it, those that might have."""
    models = ", ".join(identities(task.stage) if answered is None else answered) or None
    where = task.stage.answered_on(task.media_id) or (device if models else "cpu")
    return Cost(task.seconds, task.units, rows, bytes_out, where, models, copied_from)


def identities(stage: Stage[Any, Any]) -> tuple[str, ...]:
    """Identities of a stage's models."""
    return tuple(spec.identity for spec in stage.specs())


def no_answer(stage: Stage[Any, Any], limit_s: float) -> str:
    """The sentence for a micro-batch whose answer did not come."""
    models = ", ".join(identities(stage))
    return f"{stage.name}{f' ({models})' if models else ''} gave no answer within {limit_s:g} s."


def hang_of(task: Task, limit_s: float) -> str:
    """The sentence for a call of the work lane that hangs."""
    return f"{task.work.doing} for {task.stage.name} gave no sign of life for {limit_s:g} s."


def why_blocked(name: str, record: Outcome | None) -> tuple[str, bool]:
    """Why what is made from the input `name` cannot begin, and whether that may pass."""
    if record is None:
        return f"{name} has not been made for this item. Materialize {name} first.", True
    if record.status is Status.RUNNING:
        return f"{name} is in flight in run {record.run_id}.", True
    root = record.error or ""
    if record.error_class != UpstreamFailed.code:
        root = f"{name} failed ({record.error_class}): {root}"
    return root, record.status is Status.RETRYABLE
