"""Whether a job that runs is well: its checkpoints keep up, and its steps advance.

Both conditions warn; what is done about a hang is decided elsewhere.  Their messages do not change with every
report, so that a warning is written once.
"""

from __future__ import annotations

from internlm_operator.api import JobSpec, Progress
from internlm_operator.plan import Draft
from internlm_operator.status import condition, current_attempt, holds
from internlm_operator.times import parse_time, stamp

# Saves that may be missing: one may be under way, and the next one waits for it.
SAVES_OVERDUE = 2
# Training says nothing for this long only if something is wrong, or if its reports are far apart anyway.
SILENT_SECONDS = 600.0
SILENT_REPORTS = 10


def note_health(draft: Draft, spec: JobSpec) -> None:
    """Say CheckpointStale and ProgressStalled of a job that runs."""
    _note_checkpoint(draft, spec)
    _note_silence(draft, spec)


def _note_checkpoint(draft: Draft, spec: JobSpec) -> None:
    status, attempt = draft.status, current_attempt(draft.status)
    assert attempt is not None
    if attempt.end_step is None:
        draft.say("CheckpointStale", False, "SettingUp")
        return
    newest = status.checkpoint.step if status.checkpoint else None
    since = max(newest or 0, attempt.start_step or 0)
    if attempt.end_step - since <= SAVES_OVERDUE * spec.checkpoint.every_steps:
        draft.say("CheckpointStale", False, "Fresh")
        return
    failing = status.progress is not None and status.progress.failed_saves > 0
    there = "There is no checkpoint" if newest is None else f"The newest checkpoint is that of step {newest}"
    message = f"{there}, though one is due every {spec.checkpoint.every_steps} steps"
    message += "; saves fail, and the log of worker 0 says why." if failing else "."
    _warn(draft, "CheckpointStale", "SavesFail" if failing else "SaveOverdue", message)


def _note_silence(draft: Draft, spec: JobSpec) -> None:
    status, attempt = draft.status, current_attempt(draft.status)
    assert attempt is not None
    running = condition(status, "Running")
    told = [
        parse_time(status.progress.last_report_time if status.progress else None),
        parse_time(running.last_transition_time if running else None),
        draft.observed.listening_since,
    ]
    last = max((time for time in told if time is not None), default=draft.now)
    if attempt.end_step is None or status.progress is None:
        # Data may be made from raw text first, for hours.
        draft.say("ProgressStalled", False, "SettingUp")
        return
    limit = max(
        SILENT_SECONDS, SILENT_REPORTS * spec.training.log_every_steps * _step_seconds(status.progress)
    )
    silent = (draft.now - last).total_seconds()
    if silent < limit:
        draft.wake(limit - silent)
        draft.say("ProgressStalled", False, "Progressing")
        return
    message = (
        f"No report came since {stamp(last)}, after step {attempt.end_step}: the workers hang, or cannot "
    )
    _warn(draft, "ProgressStalled", "NoReport", message + "reach the operator.")


def _step_seconds(progress: Progress) -> float:
    left = progress.total_steps - progress.step
    return progress.eta_seconds / left if progress.eta_seconds and left > 0 else 0.0


def _warn(draft: Draft, type: str, reason: str, message: str) -> None:
    if not holds(draft.status, type):
        draft.event("Warning", type, message)
    draft.say(type, True, reason, message)
