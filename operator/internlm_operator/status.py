"""The parts of a job's status: conditions, progress, attempts."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import ValidationError

from internlm_operator.api import (
    Attempt,
    Checkpoint,
    Condition,
    JobStatus,
    Progress,
)
from internlm_operator.failures import shorten
from internlm_operator.report import Report
from internlm_operator.times import duration, seconds_since, stamp

CONDITIONS = (
    *("Queued", "Starting", "Running", "Restarting", "Suspended"),
    *("CheckpointStale", "ProgressStalled", "Succeeded", "Failed"),
)
MAX_ATTEMPTS = 10
# Seconds between two writes that only carry progress.
PROGRESS_SECONDS = 5.0
_PROGRESS_OF_ATTEMPT = (
    "start_step",
    "end_step",
    "checkpoint_step",
    "load_seconds",
    "checkpoint_stall_seconds",
)


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
        message=shorten(message),  # others' words may be of any length
        last_transition_time=since,
        observed_generation=generation,
    )
    others = [c for c in status.conditions if c.type != type]
    order = {name: i for i, name in enumerate(CONDITIONS)}
    status.conditions = sorted([*others, new], key=lambda c: order.get(c.type, len(order)))


def current_attempt(status: JobStatus) -> Attempt | None:
    """The attempt whose gang exists or is being formed."""
    return status.attempts[-1] if status.attempts and not status.attempts[-1].end_time else None


def is_finished(status: JobStatus) -> bool:
    """Whether the job is over: what two of three places say, since a hand may have changed one of them."""
    verdict = holds(status, "Succeeded") or holds(status, "Failed")
    ended = bool(status.attempts) and current_attempt(status) is None
    return [bool(status.completion_time), verdict, ended].count(True) >= 2


def final_failure(status: JobStatus) -> tuple[str, str] | None:
    """(reason, message) of a finished job that failed; None for one that succeeded."""
    succeeded, failed = holds(status, "Succeeded"), condition(status, "Failed")
    reason = status.attempts[-1].reason if status.attempts else ""
    if succeeded == holds(status, "Failed"):  # the conditions do not say
        succeeded = reason == "Completed"
    if succeeded:
        return None
    if failed is not None and failed.status == "True":
        return failed.reason, failed.message
    return reason or "Error", status.last_failure.message if status.last_failure else ""


def take_report(status: JobStatus, report: Report, time: datetime) -> None:
    """Put a report of the last attempt into the status.

    Within an attempt steps only grow, and the newest checkpoint never goes back: a report that says less was
    overtaken by another one or by the trainer's last words. It goes back where an attempt begins before it.
    """
    attempt = status.attempts[-1]
    assert report.attempt == attempt.number
    if report.step < (attempt.end_step or 0):
        return
    _note_resume_step(status, attempt, report.start_step)
    attempt.end_step = report.step
    attempt.load_seconds = max(attempt.load_seconds, round(report.load_seconds))
    attempt.checkpoint_stall_seconds = max(
        attempt.checkpoint_stall_seconds, round(report.checkpoint_stall_seconds)
    )
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
        straggler_rank=report.straggler_rank,
        straggler_score=_rounded(report.straggler_score),
        eta_seconds=report.eta_seconds,
        eta=duration(report.eta_seconds),
        last_report_time=stamp(time),
    )
    status.progress_text = f"{report.step}/{report.total_steps}"
    status.checkpoint_request = report.checkpoint_request or status.checkpoint_request
    found, known = report.checkpoint, status.checkpoint
    if found is not None and (known is None or found.step >= known.step):
        status.checkpoint = Checkpoint.model_validate(found.model_dump(by_alias=True))
        if found.step > max(_saved_before(status), known.step if known else 0):
            attempt.checkpoint_step = found.step
            reset_budget(status)


def _note_resume_step(status: JobStatus, attempt: Attempt, step: int) -> None:
    # Of a program that does not tell it, `kubeflow` takes the first step that this process heard of.
    if attempt.start_step or attempt.start_step == step:
        return
    earlier, known = status.attempts[:-1], status.checkpoint.step if status.checkpoint else 0
    if step > max([a.start_step or 0 for a in earlier] + [known]):
        # A checkpoint of an earlier attempt whose report did not come.
        reset_budget(status)
    if attempt.start_step is None and step < known:
        # The newest one could not be used: it is damaged, or not in the job's store any more.
        status.checkpoint = None
    attempt.start_step = step
    failure = status.last_failure
    if earlier and failure is not None and failure.attempt == earlier[-1].number:
        failure.lost_steps = max(0, (earlier[-1].end_step or 0) - step)


def _saved_before(status: JobStatus) -> int:
    """The step up to which checkpoints of the last attempt are no progress: where it began, or as far as earlier ones
    came from there, if that was in vain."""
    start = status.attempts[-1].start_step or 0
    in_vain = [a.checkpoint_step or 0 for a in status.attempts[:-1] if (a.start_step or 0) >= start]
    return max([start, *in_vain])


def reset_budget(status: JobStatus) -> None:
    """Restarts so far do not count any more: there is progress, or a person looked at the job."""
    status.recent_restarts = []
    status.attempts_without_progress = 0


def _rounded(value: float | None) -> float | None:
    """As many digits as a person reads; kubectl prints all that there are."""
    return None if value is None else round(value, 4)


def take_last_step(status: JobStatus, step: int) -> None:
    """The step that the trainer left in its termination message; the last report may have been older."""
    attempt = status.attempts[-1]
    attempt.end_step = max(step, attempt.end_step or 0)
    if step > (attempt.start_step or 0):  # the trainer saves before it ends well
        attempt.checkpoint_step = max(step, attempt.checkpoint_step or 0)
    progress = status.progress
    if progress is not None and step > progress.step:
        progress.step = min(step, progress.total_steps)
        no_estimate(status)
        status.progress_text = f"{progress.step}/{progress.total_steps}"


def no_estimate(status: JobStatus) -> None:
    """How long the rest will take is not known of workers that do not run."""
    if status.progress is not None:
        status.progress.eta_seconds, status.progress.eta = None, ""


def only_progress_changed(old: JobStatus, new: JobStatus) -> bool:
    """Whether a write of `new` over `old` could wait: nothing happened but steps and checkpoints."""
    return _without_progress(old) == _without_progress(new)


def _without_progress(status: JobStatus) -> dict[str, Any]:
    content = status.model_dump(
        exclude={"progress", "progress_text", "checkpoint", "checkpoint_request", "goodput"}
    )
    for attempt in content["attempts"]:
        for field in _PROGRESS_OF_ATTEMPT:
            attempt.pop(field)
    return content


def progress_write_due(old: JobStatus, now: datetime) -> float:
    """Seconds until progress may be written again; 0 now."""
    if old.progress is None:
        return 0.0
    age = seconds_since(old.progress.last_report_time, now)
    # A time in the future comes from another clock; do not wait for it.
    return PROGRESS_SECONDS - age if age is not None and 0 <= age < PROGRESS_SECONDS else 0.0


def what_is_saved(status: JobStatus) -> str:
    """Where a suspended job will go on, and whether its workers had the time to save all that they had done."""
    checkpoint = status.checkpoint
    saved = checkpoint.step if checkpoint else 0
    lost = (status.attempts[-1].end_step or 0) - saved if status.attempts else 0
    sentence = f"Set spec.suspend to false to go on from step {saved}."
    if lost > 0:
        sentence += (
            f" {lost} steps after it were not saved; if the workers had too little time, make "
            "spec.template.spec.terminationGracePeriodSeconds longer."
        )
    return sentence
