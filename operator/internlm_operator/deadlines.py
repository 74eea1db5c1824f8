"""How long a job may take: `activeDeadlineSeconds` as a whole, `startupDeadlineSeconds` until its workers run."""

from __future__ import annotations

from internlm_operator import failures
from internlm_operator.api import JobSpec
from internlm_operator.failures import Failure
from internlm_operator.plan import Draft
from internlm_operator.status import condition
from internlm_operator.times import seconds_since
from internlm_operator.waits import start_problem


def is_late(draft: Draft, spec: JobSpec) -> bool:
    """Whether `activeDeadlineSeconds` are over."""
    # It became false when the job was taken, and again whenever it was resumed.
    suspended = condition(draft.status, "Suspended")
    age = seconds_since(suspended.last_transition_time, draft.now) if suspended else None
    if spec.active_deadline_seconds is None or age is None:
        return False
    if age < spec.active_deadline_seconds:
        draft.wake(spec.active_deadline_seconds - age)
        return False
    return True


def deadline_sentence(spec: JobSpec) -> str:
    return (
        f"The job has not finished within {spec.active_deadline_seconds} seconds, which is all that "
        "activeDeadlineSeconds allows; its workers save a checkpoint and stop."
    )


def late_start(draft: Draft, spec: JobSpec) -> Failure | None:
    """The worker that does not run though `startupDeadlineSeconds` are over."""
    starting = condition(draft.status, "Starting")
    if spec.startup_deadline_seconds is None or starting is None or starting.status != "True":
        return None
    age = seconds_since(starting.last_transition_time, draft.now) or 0.0
    late = next((pod for pod in draft.gang() if not failures.is_running(pod)), None)
    if late is None or age < spec.startup_deadline_seconds:
        return None
    name, node = late["metadata"]["name"], (late.get("spec") or {}).get("nodeName") or ""
    _, why = start_problem(late) or ("", f"{name}: its containers do not start.")
    allowed = f"{spec.startup_deadline_seconds} seconds, which is all that startupDeadlineSeconds allows"
    message = f"The worker does not run after {allowed}. {why}"
    return Failure("StartupDeadlineExceeded", message, name, failures.index_of(late), node)


def wake_for_late_start(draft: Draft, spec: JobSpec) -> None:
    """Look again when the workers, which are starting, should run."""
    starting = condition(draft.status, "Starting")
    if spec.startup_deadline_seconds is not None and starting is not None and starting.status == "True":
        age = seconds_since(starting.last_transition_time, draft.now) or 0.0
        draft.wake(spec.startup_deadline_seconds - age)
