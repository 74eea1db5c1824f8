"""The parts of a job's status: conditions, progress, attempts, and how often the gang may restart."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError

from internlm_operator.api import (
    Attempt,
    Checkpoint,
    Condition,
    JobStatus,
    Progress,
    RecentRestarts,
    RecoverySpec,
)
from internlm_operator.failures import PLANNED
from internlm_operator.report import Report
from internlm_operator.times import seconds_since, stamp

CONDITIONS = ("Running", "Restarting", "Suspended", "Succeeded", "Failed")
MAX_ATTEMPTS = 10
# A bucket of recent restarts spans this part of the window, so at most this many buckets (and one) are kept.
BUCKETS = 64
# Seconds between two writes that only carry progress.
PROGRESS_SECONDS = 5.0
MAX_RESTART_DELAY = 300.0


def parse_status(stored: Any) -> JobStatus:
    """The stored status; a part that a hand or another version made unreadable starts anew."""
    fields = dict(stored) if isinstance(stored, dict) else {}
    while True:
        try:
            return JobStatus.model_validate(fields)
        except ValidationError as error:
            for broken in {str(e["loc"][0]) for e in error.errors()}:
                del fields[broken]


def dump_status(status: JobStatus) -> dict[str, Any]:
    """The status as the API stores it."""
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


def condition(status: JobStatus, type: str) -> Condition | None:
    return next((c for c in status.conditions if c.type == type), None)


def holds(status: JobStatus, type: str) -> bool:
    found = condition(status, type)
    return found is not None and found.status == "True"


def set_condition(
    status: JobStatus, type: str, value: bool, reason: str, message: str, generation: int, now: datetime
) -> None:
    """Set a condition; `lastTransitionTime` changes only when its value does."""
    word = "True" if value else "False"
    old = condition(status, type)
    since = old.last_transition_time if old is not None and old.status == word else stamp(now)
    new = Condition(
        type=type,
        status=word,
        reason=reason,
        message=message,
        last_transition_time=since,
        observed_generation=generation,
    )
    others = [c for c in status.conditions if c.type != type]
    order = {name: i for i, name in enumerate(CONDITIONS)}
    status.conditions = sorted([*others, new], key=lambda c: order.get(c.type, len(order)))


def current_attempt(status: JobStatus) -> Attempt | None:
    """The attempt whose gang exists or is being formed."""
    return status.attempts[-1] if status.attempts and not status.attempts[-1].end_time else None


def take_report(status: JobStatus, report: Report, time: datetime) -> None:
    """Put a report of the last attempt into the status.

    Within an attempt steps only grow, and the newest checkpoint never goes back: a report that says less was
    overtaken by another one or by the trainer's last words.
    """
    attempt = status.attempts[-1]
    assert report.attempt == attempt.number
    if report.step < (attempt.end_step or 0):
        return
    attempt.start_step = report.start_step
    attempt.end_step = report.step
    status.progress = Progress(
        step=report.step,
        total_steps=report.total_steps,
        tokens=report.tokens,
        skipped_steps=report.skipped_steps,
        failed_saves=report.failed_saves,
        loss=_rounded(report.loss),
        validation_loss=_rounded(report.validation_loss),
        tokens_per_second=_rounded(report.tokens_per_second),
        tokens_per_gpu_per_second=_rounded(report.tokens_per_gpu_per_second),
        tflops_per_gpu=_rounded(report.tflops_per_gpu),
        eta_seconds=report.eta_seconds,
        last_report_time=stamp(time),
    )
    status.progress_text = f"{report.step}/{report.total_steps}"
    found = report.checkpoint
    if found is not None and (status.checkpoint is None or found.step >= status.checkpoint.step):
        status.checkpoint = Checkpoint.model_validate(found.model_dump(by_alias=True))


def _rounded(value: float | None) -> float | None:
    """As many digits as a person reads; kubectl prints all that there are."""
    return None if value is None else round(value, 4)


def take_last_step(status: JobStatus, step: int) -> None:
    """The step that the trainer left in its termination message; the last report may have been older."""
    attempt = status.attempts[-1]
    attempt.end_step = max(step, attempt.end_step or 0)
    progress = status.progress
    if progress is not None and step > progress.step:
        progress.step = min(step, progress.total_steps)
        progress.eta_seconds = None
        status.progress_text = f"{progress.step}/{progress.total_steps}"


def count_restart(status: JobStatus, recovery: RecoverySpec, now: datetime) -> None:
    """Count a restart. Those close to each other expire together, at most window / BUCKETS early."""
    status.restarts += 1
    status.recent_restarts = _recent(status, recovery, now)
    last = status.recent_restarts[-1] if status.recent_restarts else None
    age = seconds_since(last.time, now) if last else None
    if last is not None and age is not None and age < recovery.window_seconds / BUCKETS:
        last.count += 1
    else:
        status.recent_restarts.append(RecentRestarts(time=stamp(now), count=1))


def restarts_in_window(status: JobStatus, recovery: RecoverySpec, now: datetime) -> int:
    """Restarts that count towards the limit now."""
    return sum(bucket.count for bucket in _recent(status, recovery, now))


def _recent(status: JobStatus, recovery: RecoverySpec, now: datetime) -> list[RecentRestarts]:
    ages = [(bucket, seconds_since(bucket.time, now)) for bucket in status.recent_restarts]
    return [bucket for bucket, age in ages if age is not None and age < recovery.window_seconds]


def restart_delay(attempts: list[Attempt]) -> timedelta:
    """How long after the last attempt's end the next one may start.

    Nothing after an attempt that trained, or that was stopped from outside; 10, 20, 40... up to 300 s after
    2, 3, 4... in a row that failed without a step, so that an outage does not use up the restarts at once.
    """
    fruitless = 0
    for attempt in reversed(attempts):
        trained = (attempt.end_step or 0) > (attempt.start_step or 0)
        if trained or not attempt.end_time or attempt.reason in PLANNED:
            break
        fruitless += 1
    if fruitless < 2:
        return timedelta()
    return timedelta(seconds=min(10.0 * 2 ** (fruitless - 2), MAX_RESTART_DELAY))


def only_progress_changed(old: JobStatus, new: JobStatus) -> bool:
    """Whether a write of `new` over `old` could wait: nothing happened but steps and checkpoints."""
    return _without_progress(old) == _without_progress(new)


def _without_progress(status: JobStatus) -> dict[str, Any]:
    content = status.model_dump(exclude={"progress", "progress_text", "checkpoint"})
    for attempt in content["attempts"]:
        attempt["start_step"] = attempt["end_step"] = None
    return content


def progress_write_due(old: JobStatus, now: datetime) -> float:
    """Seconds until progress may be written again; 0 now."""
    if old.progress is None:
        return 0.0
    age = seconds_since(old.progress.last_report_time, now)
    # A time in the future comes from another clock; do not wait for it.
    return PROGRESS_SECONDS - age if age is not None and 0 <= age < PROGRESS_SECONDS else 0.0
