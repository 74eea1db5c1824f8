"""What is done about a failure: restart, restart elsewhere, or the end; and what it costs of the budget.

The ladder, from what costs least: a gang that Kubernetes took away is made again and costs nothing of the budget;
the processes of a gang that failed start again in their pods; the gang is made again; it is made again away from the
node that is to blame; what a restart would meet again, and what has used up its budget, fails the job.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from internlm_operator import failures
from internlm_operator.api import (
    Attempt,
    ExcludedNode,
    FailureAction,
    FailureClass,
    JobStatus,
    LastFailure,
    RecentRestarts,
    RecoverySpec,
)
from internlm_operator.causes import Cause
from internlm_operator.failures import Failure
from internlm_operator.nodes import is_current
from internlm_operator.status import current_attempt
from internlm_operator.times import seconds_since, stamp

# Memory that lasted for this many steps was filled by chance, such as fragments, and not by the job's own size.
STEPS_THAT_FIT = 10
# A bucket of recent restarts spans this part of the window, so at most this many buckets (and one) are kept.
BUCKETS = 64
# Nodes that one job may have excluded at once.
MAX_EXCLUDED = 16
# Failures that are not the job's own: another gang, elsewhere or later, need not meet them.
CLUSTERS = frozenset({"Hardware", "Network", "Infrastructure", "Preemption"})
# Failures that may be the node's when they come back on it.
_NODE_MAY_BE_TO_BLAME = frozenset({"Infrastructure", "Network", "Unknown"})


@dataclass(frozen=True)
class Verdict:
    """What to do about a failure."""

    action: FailureAction
    reason: str = ""
    """Why the job fails, for the condition; empty where it goes on."""
    message: str = ""


def decide(
    status: JobStatus,
    recovery: RecoverySpec,
    failure: Failure,
    cause: Cause,
    now: datetime,
    *,
    in_place: bool = False,
) -> Verdict:
    """What to do about the failure of the current attempt; `in_place`: whether its pods are fit for another one."""
    attempt = current_attempt(status)
    assert attempt is not None
    if _would_fail_again(attempt, failure):
        return Verdict("Fail", failure.reason, failure.message)
    if cause.class_ == "Preemption":
        return Verdict("Reschedule")
    exhausted = _exhausted(status, recovery, attempt, cause.class_, now)
    if exhausted is not None:
        reason, sentence = exhausted
        return Verdict("Fail", reason, f"{failure.message} {sentence}")
    if _blames_node(status, recovery, failure, cause, now):
        return Verdict("GangRestartAvoidingNode")
    return Verdict("InPlaceRestart" if in_place else "GangRestart")


def _would_fail_again(attempt: Attempt, failure: Failure) -> bool:
    """Whether a restart would meet the same failure, so that only an edit of the job helps."""
    if failure.reason == failures.OUT_OF_MEMORY:
        return (attempt.end_step or 0) - (attempt.start_step or 0) < STEPS_THAT_FIT
    return failure.reason in failures.FINAL


def _exhausted(
    status: JobStatus, recovery: RecoverySpec, attempt: Attempt, class_: FailureClass, now: datetime
) -> tuple[str, str] | None:
    """(reason, sentence) where the budget is used up."""
    if attempt.checkpoint_step is not None and recovery.max_restarts:
        return None
    if restarts_in_window(status, recovery, now) >= recovery.max_restarts:
        return "RestartLimitExceeded", (
            f"The job was restarted {recovery.max_restarts} times within {recovery.window_seconds} seconds, "
            "which is all that recovery.maxRestarts allows."
        )
    fruitless = status.attempts_without_progress + 1
    if class_ not in CLUSTERS and fruitless >= recovery.max_attempts_without_progress:
        return "NoProgress", (
            f"{fruitless} attempts failed without a newer checkpoint, which is all that "
            "recovery.maxAttemptsWithoutProgress allows."
        )
    return None


def _blames_node(
    status: JobStatus, recovery: RecoverySpec, failure: Failure, cause: Cause, now: datetime
) -> bool:
    if not failure.node or not recovery.exclude_node_seconds:
        return False
    if cause.class_ == "Hardware":
        return True
    # What nobody can explain is the node's when it happens there again.
    before = [
        attempt
        for attempt in status.attempts[:-1]
        if attempt.node == failure.node and attempt.class_ in _NODE_MAY_BE_TO_BLAME
    ]
    ages = [seconds_since(attempt.end_time, now) for attempt in before]
    recent = any(age is not None and age < recovery.exclude_node_seconds for age in ages)
    return cause.class_ in _NODE_MAY_BE_TO_BLAME and recent


def note_failure(
    status: JobStatus,
    recovery: RecoverySpec,
    failure: Failure,
    cause: Cause,
    action: FailureAction,
    now: datetime,
) -> None:
    """Put the failure of the current attempt, and what is done about it, into the status; count a restart."""
    attempt = current_attempt(status)
    assert attempt is not None
    status.last_failure = LastFailure(
        attempt=attempt.number,
        class_=cause.class_,
        reason=failure.reason,
        message=failure.message,
        rank=failure.rank,
        pod=failure.pod,
        node=failure.node,
        exit_code=failure.exit_code,
        signal=failure.signal,
        evidence=cause.evidence,
        action=action,
        lost_steps=_lost_steps(status, attempt),
        time=stamp(failure.time or now),
    )
    attempt.reason, attempt.class_, attempt.node = failure.reason, cause.class_, failure.node
    attempt.end_time = stamp(now)
    if action == "GangRestartAvoidingNode":
        _exclude(status, recovery, failure.node, cause, now)
    if action != "Fail":
        _count_restart(status, recovery, attempt, cause.class_, now)


def _lost_steps(status: JobStatus, attempt: Attempt) -> int | None:
    """Steps since the newest checkpoint; the next attempt's first report may correct it."""
    if attempt.end_step is None:
        return None
    known = status.checkpoint.step if status.checkpoint else 0
    durable = max(attempt.start_step or 0, attempt.checkpoint_step or 0, known)
    return max(0, attempt.end_step - durable)


def _exclude(status: JobStatus, recovery: RecoverySpec, node: str, cause: Cause, now: datetime) -> None:
    kept = [entry for entry in status.excluded_nodes if entry.node != node and is_current(entry, now)]
    new = ExcludedNode(
        node=node,
        class_=cause.class_,
        evidence=cause.evidence,
        since=stamp(now),
        until=stamp(now + timedelta(seconds=recovery.exclude_node_seconds)),
    )
    status.excluded_nodes = [*kept, new][-MAX_EXCLUDED:]


# The budget


def _count_restart(
    status: JobStatus, recovery: RecoverySpec, attempt: Attempt, class_: FailureClass, now: datetime
) -> None:
    """Count a restart. Those close to each other expire together, at most window / BUCKETS early."""
    status.restarts += 1
    status.recent_restarts = _recent(status, recovery, now)
    if class_ == "Preemption" or attempt.checkpoint_step is not None:
        return
    if class_ not in CLUSTERS:
        status.attempts_without_progress += 1
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


def could_save(attempt: Attempt) -> bool:
    """Whether the attempt was ended from outside, so that its workers had the time to save: nothing in it broke."""
    return attempt.class_ in (None, "Preemption")


def restart_delay(attempts: list[Attempt], recovery: RecoverySpec) -> timedelta:
    """How long after the last attempt's end the next one may start.

    Nothing after an attempt that trained, or that a person stopped; after 2, 3, 4... in a row that ended without a
    step, the backoff, doubled each time, so that an outage does not use up the restarts at once, and a gang that
    Kubernetes takes away again and again leaves it alone.
    """
    fruitless = 0
    for attempt in reversed(attempts):
        trained = (attempt.end_step or 0) > (attempt.start_step or 0)
        if trained or not attempt.end_time or attempt.class_ is None:
            break
        fruitless += 1
    if fruitless < 2:
        return timedelta()
    seconds = recovery.backoff_seconds * 2.0 ** min(fruitless - 2, 32)
    return timedelta(seconds=min(seconds, recovery.max_backoff_seconds))
