"""The ledger of a job's time: every second since its creation is counted once, by what the job did then.

It advances when the status is written for another reason.  Nothing has happened since the last write, so all of
that time was spent as the stored status says; and since seconds are only ever added as the clock moves, and only
moved from one kind to another, they add up to the time since the creation.

The term and the idea are those of Google's ML Productivity Goodput
(https://cloud.google.com/blog/products/ai-machine-learning/goodput-metric-as-measure-of-ml-productivity).
"""

from __future__ import annotations

from datetime import datetime

from internlm_operator.api import Attempt, Goodput, JobStatus
from internlm_operator.failures import HUNG
from internlm_operator.times import parse_time, seconds_since, stamp
from internlm_operator.waits import REFUSED

KINDS = tuple(name for name in Goodput.model_fields if name.endswith("_seconds"))
# Processes that do not go on, or that nobody hears of.
_HUNG = (HUNG, "NodeLost")
_RUNNING = ("rendezvous_seconds", "productive_seconds", "hung_seconds")
_RESTARTING = ("OldWorkersTerminating", "WaitingToRestart", "RestartingInPlace")
_SCHEDULING = ("WorkersPending", "Unschedulable")
# Why there are no pods, or none that may look for a node.
_QUEUED = (*REFUSED, "SchedulingGated", "InvalidSpec")


def total(ledger: Goodput) -> int:
    """Seconds in the ledger."""
    return sum(getattr(ledger, kind) for kind in KINDS)


def advance(old: JobStatus, new: JobStatus, created: datetime, now: datetime) -> Goodput:
    """The ledger of `new`, which is about to replace `old`, at the time `now`."""
    ledger = old.goodput.model_copy()
    since, created = parse_time(ledger.as_of), created.replace(microsecond=0)
    if since is None or total(ledger) != round((since - created).total_seconds()):
        # The first entry, or one that a hand changed: begin again from what is certain.
        ledger, since = Goodput(furthest_step=ledger.furthest_step), created
    attempt = old.attempts[-1] if old.attempts else None
    after = next((a for a in new.attempts if attempt is not None and a.number == attempt.number), None)
    stalled = _stalled(new)
    if not old.completion_time:
        # Another replica's clock may be ahead; time does not run backwards.
        until = max(since, now.replace(microsecond=0))
        reported = new.progress.last_report_time if new.progress else None
        silent = int(max(0.0, seconds_since(reported, until) or 0.0))
        _spend(ledger, _kind(old), attempt, after, int((until - since).total_seconds()), stalled, silent)
        ledger.as_of = stamp(until)
    if after is not None:
        ledger.furthest_step = max(ledger.furthest_step, after.end_step or 0)
    return ledger


def _spend(
    ledger: Goodput,
    kind: str,
    attempt: Attempt | None,
    after: Attempt | None,
    seconds: int,
    stalled: bool,
    silent: int,
) -> None:
    """silent: seconds since the last report of progress."""
    if attempt is None or after is None or kind not in _RUNNING:
        _add(ledger, kind, seconds)
        return
    if kind != "rendezvous_seconds":
        advanced = (after.end_step or 0) > (attempt.end_step or 0)
        hangs = after.reason in _HUNG or stalled
        if advanced and hangs:  # the steps came before the last report
            waited = min(seconds, silent)
            _add(ledger, "hung_seconds", waited)
            seconds -= waited
        kind = "hung_seconds" if (hangs or kind == "hung_seconds") and not advanced else "productive_seconds"
    saving = max(0, min(seconds, after.checkpoint_stall_seconds - attempt.checkpoint_stall_seconds))
    loaded = max(0, min(seconds - saving, after.load_seconds - attempt.load_seconds))
    seconds -= saving + loaded
    _add(ledger, "checkpoint_stall_seconds", saving)
    _add(ledger, "load_seconds", loaded)
    if kind == "productive_seconds":
        redone = round(seconds * _share_redone(attempt, after, ledger.furthest_step))
        _add(ledger, "redone_seconds", redone)
        seconds -= redone
    _add(ledger, kind, seconds)


def _add(ledger: Goodput, kind: str, seconds: int) -> None:
    setattr(ledger, kind, getattr(ledger, kind) + seconds)


def _share_redone(before: Attempt, after: Attempt, furthest: int) -> float:
    """The part of the steps between two looks at an attempt that had been done by an earlier one."""
    begin, end = before.end_step or 0, after.end_step or 0
    if end <= begin:
        return 1.0 if begin < furthest else 0.0
    return max(0, min(end, furthest) - begin) / (end - begin)


def _stalled(status: JobStatus) -> bool:
    return any(c.type == "ProgressStalled" and c.status == "True" for c in status.conditions)


def _kind(status: JobStatus) -> str:
    """What the job does while its status is this."""
    if status.phase in ("Suspending", "Suspended"):
        return "suspended_seconds"
    attempt = status.attempts[-1] if status.attempts else None
    if attempt is None:
        return "queued_seconds"
    if status.phase == "Running":
        if _stalled(status):
            return "hung_seconds"
        return "rendezvous_seconds" if attempt.end_step is None else "productive_seconds"
    reason = next((c.reason for c in status.conditions if c.type == "Running"), "")
    if attempt.end_time or reason in _RESTARTING:
        return "restarting_seconds"
    if reason in _QUEUED:
        return "queued_seconds"
    return "scheduling_seconds" if reason in _SCHEDULING else "image_pull_seconds"
