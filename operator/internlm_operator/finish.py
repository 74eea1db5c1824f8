"""How a job ends, what is left of it then, and how it is suspended and goes on."""

from __future__ import annotations

from internlm_operator import evaluation, failures, inplace
from internlm_operator.api import KIND, Phase
from internlm_operator.plan import CRASH_GRACE_SECONDS, Delete, Draft, Plan
from internlm_operator.status import (
    condition,
    current_attempt,
    final_failure,
    holds,
    reset_budget,
    what_is_saved,
)
from internlm_operator.times import seconds_since, stamp


def _finish(draft: Draft, reason: str) -> None:
    attempt = current_attempt(draft.status)
    if attempt is not None:
        attempt.end_time, attempt.reason = stamp(draft.now), reason
    draft.status.completion_time = draft.status.completion_time or stamp(draft.now)
    draft.stage(None, "Finished")
    draft.say("Restarting", False, "NotRestarting")
    draft.say("Suspended", False, "NotSuspended")


def succeed(draft: Draft) -> Plan:
    """All steps are done."""
    _finish(draft, "Completed")
    progress = draft.status.progress_text
    message = f"Training completed{f' at step {progress}' if progress else ''}."
    draft.say("Succeeded", True, "Completed", message)
    draft.say("Failed", False, "Completed")
    if not holds(draft.stored, "Succeeded"):
        draft.event("Normal", "Succeeded", message)
    return _clean_up(draft)


def fail(draft: Draft, reason: str, message: str) -> Plan:
    """It will not go on."""
    _finish(draft, reason)
    draft.say("Succeeded", False, "Failed")
    draft.say("Failed", True, reason, message)
    if not holds(draft.stored, "Failed"):
        draft.event("Warning", reason, message)
    return _clean_up(draft)


def stay_finished(draft: Draft) -> Plan:
    """A finished job is never started again, whatever somebody made of its status."""
    failure = final_failure(draft.status)
    return fail(draft, *failure) if failure else succeed(draft)


def _clean_up(draft: Draft) -> Plan:
    """A finished job keeps its ended pods for their logs, and nothing that runs, unless it asks for more or less."""
    spec = draft.job.get("spec") or {}  # which need not be valid
    ending = inplace.ending(draft.pods, draft.agents, draft.now)
    if ending:
        draft.wake(inplace.END_SECONDS)
    running = [
        pod for pod in draft.pods if not failures.is_over(pod) and pod["metadata"]["uid"] not in ending
    ]
    unwanted = {"All": draft.pods, "None": []}.get(str(spec.get("cleanPodPolicy", "Running")), running)
    verdict = condition(draft.status, "Failed")
    can_save = verdict is not None and verdict.reason == "DeadlineExceeded"
    draft.remove(unwanted, None if can_save else CRASH_GRACE_SECONDS)
    phase: Phase = "Succeeded" if holds(draft.status, "Succeeded") else "Failed"
    ttl = spec.get("ttlSecondsAfterFinished")
    age = seconds_since(draft.status.completion_time, draft.now)
    if isinstance(ttl, int) and age is not None:
        if age >= ttl and not evaluation.is_under_way(draft):
            draft.actions.append(Delete(KIND, draft.name, draft.job["metadata"]["uid"]))
        else:
            draft.wake(max(ttl - age, 1))
    return draft.plan(phase)


# Suspension


def suspend(draft: Draft) -> Plan:
    """Let the workers save and stop; once they are gone, the job is suspended."""
    attempt = current_attempt(draft.status)
    if attempt is not None:
        attempt.end_time, attempt.reason = stamp(draft.now), "Suspended"
        draft.event("Normal", "Suspending", "The workers save a checkpoint and stop, as spec.suspend asks.")
    draft.remove(draft.pods)
    draft.say("Restarting", False, "NotRestarting")
    _not_finished(draft)
    if draft.pods:
        draft.stage(None, "Suspended", "The workers save a checkpoint and stop.")
        draft.say("Suspended", False, "Suspending", f"Waiting for {len(draft.pods)} pods to end.")
        return draft.plan("Suspending")
    if not holds(draft.status, "Suspended"):
        draft.event("Normal", "Suspended", f"No worker is left. {what_is_saved(draft.status)}")
    draft.stage(None, "Suspended", "Set spec.suspend to false to go on.")
    draft.say("Suspended", True, "SuspendRequested", what_is_saved(draft.status))
    return draft.plan("Suspended")


def note_resume(draft: Draft) -> None:
    """The job is neither suspended nor finished, whatever it was before."""
    if holds(draft.status, "Suspended"):
        draft.event("Normal", "Resumed", "The job goes on from its last checkpoint.")
        reset_budget(draft.status)
    draft.say("Suspended", False, "NotSuspended")
    _not_finished(draft)


def _not_finished(draft: Draft) -> None:
    draft.status.completion_time = ""
    draft.say("Succeeded", False, "NotFinished")
    draft.say("Failed", False, "NotFinished")
    if condition(draft.status, "Restarting") is None:
        draft.say("Restarting", False, "NotRestarting")
