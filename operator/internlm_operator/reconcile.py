"""The operator's decisions: `reconcile(job, observed, now) -> Plan`.

A pure function of what is there.  It does not ask which event came, keeps nothing between two calls, and gives
the same plan for the same arguments, so the operator may be killed between any two of its steps.

The shell writes `Plan.status` first, on the condition that the job is still the one that was looked at, and only
then carries out the actions in their order.  So an attempt is in the status before its first pod exists, and its
end is there before its first pod is deleted.

Conditions and their reasons. Queued, Starting and Running share one reason: at most one of them is true, and the
reason says which and why.

| condition       | true                                   | false                                             |
|-----------------|----------------------------------------|---------------------------------------------------|
| Queued          | WorkersPending, Unschedulable, SchedulingGated, PodsRefused, QuotaExceeded, NameTaken, NamespaceTerminating, PodSecurityViolated, PolicyDenied, InvalidTemplate | see below |
| Starting        | WorkersStarting, or the kubelet's reason (ImagePullBackOff...) | see below                 |
| Running         | WorkersRunning, InvalidSpec            | see below                                         |
| (none of these) |                                        | InvalidSpec, RestartingInPlace, WaitingToRestart, OldWorkersTerminating, Suspended, Finished |
| Restarting      | the failure's reason (Error, Evicted, PodLost...) | NotRestarting                          |
| Suspended       | SuspendRequested                       | Suspending, NotSuspended                          |
| CheckpointStale | SaveOverdue, SavesFail                 | Fresh, SettingUp, NotRunning                      |
| ProgressStalled | NoReport                               | Progressing, SettingUp, NotRunning                |
| Succeeded       | Completed                              | NotFinished, Failed                               |
| Failed          | InvalidTemplate, UserError, Diverged, OutOfMemory, NoProgress, RestartLimitExceeded, DeadlineExceeded | NotFinished, Completed |
"""  # noqa: E501

from __future__ import annotations

from datetime import datetime, timedelta

from internlm_operator import evaluation, failures, inplace, nodes, objects
from internlm_operator.api import MANAGER, Attempt, JobSpec, Phase
from internlm_operator.causes import cause_of
from internlm_operator.deadlines import deadline_sentence, is_late, late_start, wake_for_late_start
from internlm_operator.failures import Failure
from internlm_operator.finish import fail, note_resume, stay_finished, succeed, suspend
from internlm_operator.health import note_health
from internlm_operator.manifest import JobError, parse_job
from internlm_operator.objects import Object, worker_name
from internlm_operator.plan import BURST, CRASH_GRACE_SECONDS, Apply, Create, Draft, Observed, Plan, node_of
from internlm_operator.recovery import Verdict, could_save, decide, note_failure, restart_delay
from internlm_operator.status import (
    MAX_ATTEMPTS,
    condition,
    current_attempt,
    holds,
    is_finished,
    reset_budget,
    take_last_step,
    take_report,
)
from internlm_operator.times import parse_time, seconds_since, stamp
from internlm_operator.waits import INVALID_TEMPLATE, start_problem

# How long to wait for the worker that failed by itself, when all that is known is that another lost its peer.
SETTLE_SECONDS = 3
REFUSED_RETRY_SECONDS = 10
# How long a gang looks for nodes while some are left out, and what its attempt ends with then.
STUCK_SECONDS = 120
STUCK = "Unschedulable"
# Reasons of the condition Running that need nobody's help.
_NO_PROBLEMS = (
    *("WorkersPending", "WorkersStarting", "WorkersRunning"),
    *("WaitingToRestart", "OldWorkersTerminating", "Suspended"),
)


def reconcile(job: Object, observed: Observed, now: datetime) -> Plan:
    """What to do about `job` (an InternLMJob as the API gives it), seeing `observed`, at the time `now`."""
    if job["metadata"].get("deletionTimestamp"):
        return Plan()  # Kubernetes removes what the job owns
    if (job.get("spec") or {}).get("managedBy", MANAGER) != MANAGER:
        return Plan()  # the status, too, is the other controller's
    draft = Draft(job, observed, now)
    _adopt(draft)
    _note_progress(draft)
    evaluation.follow(draft)
    if is_finished(draft.status):
        return stay_finished(draft)
    try:
        spec = parse_job(job).spec
    except JobError as error:
        return _leave_alone(draft, "; ".join(error.sentences))
    draft.status.workers.desired = spec.nodes
    draft.status.layout = "zero {}/{}/{}".format(*spec.parallel.zero.degrees(spec.world_size))

    _end_if_changed(draft, spec)
    if draft.all_are(failures.has_succeeded, spec.nodes):
        return succeed(draft)
    if spec.suspend:
        return suspend(draft)
    note_resume(draft)
    if is_late(draft, spec):
        return fail(draft, "DeadlineExceeded", deadline_sentence(spec))

    if current_attempt(draft.status) is not None:
        failure = _failure(draft, spec) or late_start(draft, spec)
        if failure is not None and _too_early(draft, spec, failure):
            return draft.plan(draft.status.phase)
        if failure is not None:
            draft.rests_on_absence = failure.reason == failures.LOST
            verdict = _judge(draft, spec, failure)
            if verdict.action == "Fail":
                return fail(draft, verdict.reason, verdict.message)
            _say_restart(draft, failure)
            if verdict.action == "InPlaceRestart":
                _begin_attempt(draft, spec, inplace.pods_of(draft.status.attempts[-1]))
        else:
            _dissolve_if_stuck(draft)

    if current_attempt(draft.status) is None:
        waiting = _make_room(draft, spec)
        if waiting is not None:
            return waiting
        _begin_attempt(draft, spec)
        _share(draft)
    return _form_and_follow(draft, spec)


# A description that says nothing to this operator


def _leave_alone(draft: Draft, sentence: str) -> Plan:
    """Begin and restart nothing until the description is edited, as one that another version of the operator took
    may have to be; workers that run go on, and `suspend` still ends them."""
    desired = draft.status.workers.desired
    if draft.all_are(failures.has_succeeded, desired):
        return succeed(draft)
    if (draft.job.get("spec") or {}).get("suspend") is True:
        return suspend(draft)
    said = condition(draft.status, "Running")
    if said is None or said.reason != "InvalidSpec":
        draft.event("Warning", "InvalidSpec", sentence)
    note_resume(draft)
    if draft.all_are(failures.is_running, desired):
        draft.stage("Running", "InvalidSpec", f"The workers run, and would not be restarted: {sentence}")
        return draft.plan("Running")
    draft.stage(None, "InvalidSpec", sentence)
    return draft.plan("Restarting" if holds(draft.status, "Restarting") else "Pending")


# What is known of the training itself


def _adopt(draft: Draft) -> None:
    """Go on with the gang that is there where the status, which somebody emptied, does not know of it."""
    numbers = [int(label) for pod in draft.pods if (label := draft.attempt_of(pod)).isdecimal()]
    if numbers and not draft.status.attempts:
        draft.status.attempts = [Attempt(number=max(numbers), start_time=stamp(draft.now))]


def _note_progress(draft: Draft) -> None:
    """Reports and last words of the last attempt; what another attempt reports is over."""
    status, observed = draft.status, draft.observed
    if not status.attempts:
        return
    last = status.attempts[-1]
    stored = last.end_step or 0
    inplace.note_ready(last, status.workers.desired, draft.agents)
    report = observed.report
    if report is not None and observed.report_time is not None and report.attempt == last.number:
        take_report(status, report, observed.report_time)
    for pod in draft.pods:
        word = failures.termination(pod)
        of_last = pod["metadata"]["labels"].get(objects.ATTEMPT_LABEL) == str(inplace.pods_of(last))
        if of_last and word is not None and word.reason in ("Completed", "Stopped") and word.step is not None:
            take_last_step(status, word.step)
            # The pod goes soon, and its message with it.
            draft.urgent |= word.step > stored


# Failure and restart


def _end_if_changed(draft: Draft, spec: JobSpec) -> None:
    """End an attempt made of another spec: the job was suspended, edited and resumed while nobody looked."""
    attempt = current_attempt(draft.status)
    if attempt is None or attempt.spec_digest in ("", objects.spec_digest(spec)):
        return
    attempt.end_time, attempt.reason = stamp(draft.now), "SpecChanged"
    reset_budget(draft.status)
    draft.event("Normal", "SpecChanged", "The workers stop; new ones go on as the edited spec says.")


def _failure(draft: Draft, spec: JobSpec) -> Failure | None:
    """What ended the current attempt; None while it has every worker it should have."""
    attempt, gang = current_attempt(draft.status), draft.gang()
    if attempt is not None:
        gang = [inplace.as_reported(pod, attempt, draft.agents) for pod in gang]
    found = [failure for pod in gang if (failure := failures.failure_of(pod)) is not None]
    silent = draft.on_silent_nodes(gang)
    found += [failures.on_lost_node(pod) for pod in silent if draft.health(node_of(pod)).gone]
    left = inplace.seconds_left(attempt, draft.observed.listening_since, draft.now) if attempt else None
    if attempt is not None and attempt.formed:
        if left is not None and left <= 0:
            found.append(inplace.late(attempt, gang, draft.agents))
        found += [failures.lost(worker_name(draft.name, index), index) for index in draft.missing(spec.nodes)]
    cause = failures.root_cause(found)
    waits = cause.follows if cause is not None else left is not None
    if waits:
        # Kubernetes says so of a node before it gives up the pods there: whoever needs them waits in vain.
        cause = next(map(failures.on_silent_node, silent), cause)
    return cause


def _too_early(draft: Draft, spec: JobSpec, failure: Failure) -> bool:
    """Whether to wait a moment before a failure is judged: for the worker that failed by itself, whose status may
    still be on the way, or for agents that an operator which has just taken over has not heard yet."""
    attempt, gang = current_attempt(draft.status), draft.gang()
    assert attempt is not None
    age = (draft.now - failure.time).total_seconds() if failure.time else None
    wait = SETTLE_SECONDS if failure.follows and any(map(failures.is_running, gang)) else 0.0
    if inplace.expected(attempt, gang, spec.nodes, draft.agents):
        wait = inplace.HEARD_SECONDS
    if age is None or not 0 <= age < wait:
        return False
    draft.wake(wait - age)
    return True


def _judge(draft: Draft, spec: JobSpec, failure: Failure) -> Verdict:
    """Decide what to do about the failure of the current attempt, which is over."""
    cause = cause_of(failure, draft.health(failure.node))
    attempt, gang = current_attempt(draft.status), draft.gang()
    assert attempt is not None
    stay = not draft.on_silent_nodes(gang) and inplace.possible(attempt, gang, spec.nodes, draft.agents)
    verdict = decide(draft.status, spec.recovery, failure, cause, draft.now, in_place=stay)
    note_failure(draft.status, spec.recovery, failure, cause, verdict.action, draft.now)
    if verdict.action == "GangRestartAvoidingNode":
        until = draft.status.excluded_nodes[-1].until
        message = f"Node {failure.node} gets no worker until {until}: {cause.class_}: {cause.evidence}"
        draft.event("Warning", "NodeExcluded", message)
    return verdict


def _say_restart(draft: Draft, failure: Failure) -> None:
    message = f"Worker {failure.index}: {failure.message}"
    draft.say("Restarting", True, failure.reason, message)
    draft.event("Warning", "Restarting", message)


def _make_room(draft: Draft, spec: JobSpec) -> Plan | None:
    """Remove what is left of earlier attempts, and wait; None once the next one may begin."""
    attempts = draft.status.attempts
    planned = not attempts or could_save(attempts[-1])
    draft.remove(draft.pods, None if planned else CRASH_GRACE_SECONDS)
    phase: Phase = "Restarting" if holds(draft.status, "Restarting") else "Pending"
    if draft.pods:
        draft.stage(None, "OldWorkersTerminating", f"Waiting for {len(draft.pods)} pods to end.")
        return draft.plan(phase)
    ended = parse_time(attempts[-1].end_time) if attempts else None
    wait = (ended + restart_delay(attempts, spec.recovery) - draft.now) if ended else timedelta()
    if wait > timedelta():
        draft.stage(None, "WaitingToRestart", "The last attempts did no step; waiting before the next.")
        draft.wake(wait.total_seconds())
        return draft.plan(phase)
    return None


# A gang's life


def _begin_attempt(draft: Draft, spec: JobSpec, gang: int | None = None) -> None:
    """`gang`: the attempt whose pods it uses, instead of new ones."""
    attempts = draft.status.attempts
    draft.rests_on_absence |= gang is None and bool(attempts)
    number = attempts[-1].number + 1 if attempts else 1
    excluded = _excluded_nodes(draft) if gang is None else attempts[-1].excluded_nodes
    new = Attempt(
        number=number,
        start_time=stamp(draft.now),
        spec_digest=objects.spec_digest(spec),
        excluded_nodes=excluded,
        gang=gang,
        formed=gang is not None,
    )
    draft.status.attempts = [*attempts, new][-MAX_ATTEMPTS:]
    away = f", away from {', '.join(excluded)}" if excluded else ""
    workers = f"{spec.nodes} workers{away}" if gang is None else f"the {spec.nodes} workers that are there"
    draft.event("Normal", "AttemptStarted", f"Attempt {number} starts with {workers}.")


def _excluded_nodes(draft: Draft) -> list[str]:
    """Nodes that a new gang must not use; those under suspicion only if the last one found others."""
    observed, status = draft.observed, draft.status
    most = nodes.cap(observed.nodes, observed.settings.max_excluded_percent)
    stuck = bool(status.attempts) and status.attempts[-1].reason == STUCK
    own, others = ([], []) if stuck else (status.excluded_nodes, observed.excluded)
    return nodes.left_out(own, others, observed.nodes, most, draft.now)


def _dissolve_if_stuck(draft: Draft) -> None:
    """End an attempt that finds no node while some are left out: a node under suspicion is better than none, one
    with a sign of failed hardware is not."""
    attempt = current_attempt(draft.status)
    suspects = [name for name in attempt.excluded_nodes if not draft.health(name).fault] if attempt else []
    if attempt is None or not suspects:
        return
    if not any((start_problem(pod) or ("",))[0] == "Unschedulable" for pod in draft.gang()):
        return
    age = seconds_since(attempt.start_time, draft.now) or 0.0
    if age < STUCK_SECONDS:
        draft.wake(STUCK_SECONDS - age)
        return
    attempt.end_time, attempt.reason = stamp(draft.now), STUCK
    text = f"There are no nodes but {', '.join(suspects)}: the next attempt may use them."
    draft.event("Warning", "NodesReadmitted", text)


def _share(draft: Draft) -> None:
    """Apply what the workers share, whatever somebody made of it since the last time."""
    draft.actions += map(Apply, objects.shared_objects(draft.job, draft.observed.settings))


def _form_and_follow(draft: Draft, spec: JobSpec) -> Plan:
    """Make the pods that the current attempt lacks, then say how far their start is."""
    attempt = current_attempt(draft.status)
    assert attempt is not None
    wanted = objects.shared_digest(draft.job, draft.observed.settings)
    if wanted != draft.observed.applied and not any(isinstance(action, Apply) for action in draft.actions):
        _share(draft)

    draft.status.pod_disruption_budget |= spec.recovery.pod_disruption_budget

    gang, others = draft.gang(), draft.others()
    draft.remove(others)
    missing = draft.missing(spec.nodes)
    refused = draft.observed.refused
    if missing and refused is not None and refused.reason == INVALID_TEMPLATE and not _ever_formed(draft):
        return fail(draft, refused.reason, refused.sentence)
    if missing and not others and not attempt.formed:
        settings = draft.observed.settings
        draft.actions += [
            Create(
                objects.worker_pod(draft.job, spec, attempt.number, index, settings, attempt.excluded_nodes)
            )
            for index in missing[:BURST]
        ]
        if len(missing) > BURST and refused is None:
            draft.go_on()
    attempt.formed = attempt.formed or not missing

    started = [pod for pod in gang if failures.is_running(pod) or failures.has_succeeded(pod)]
    if len(started) == spec.nodes:
        left = inplace.seconds_left(attempt, draft.observed.listening_since, draft.now)
        if left is None:
            return _run(draft, spec)
        draft.wake(left)
        draft.stage(None, "RestartingInPlace", "The workers stay and start their processes again.")
        return draft.plan("Restarting")
    return _wait_for_start(draft, spec, missing)


def _ever_formed(draft: Draft) -> bool:
    """Whether the job's pods could be made once: where they cannot now, that may pass, as an upgrade of the cluster's
    does, and a job of months waits for it."""
    return any(attempt.formed for attempt in draft.status.attempts)


def _run(draft: Draft, spec: JobSpec) -> Plan:
    if not holds(draft.status, "Running"):
        draft.event("Normal", "Running", f"All {spec.nodes} workers run.")
    draft.stage("Running", "WorkersRunning", f"All {spec.nodes} workers run.")
    draft.say("Restarting", False, "NotRestarting")
    note_health(draft, spec)
    return draft.plan("Running")


def _wait_for_start(draft: Draft, spec: JobSpec, missing: list[int]) -> Plan:
    gang, refused = draft.gang(), draft.observed.refused
    problem = next((p for pod in gang if (p := start_problem(pod)) is not None), None)
    scheduled = [pod for pod in gang if (pod.get("spec") or {}).get("nodeName")]
    all_scheduled = len(scheduled) == spec.nodes
    count = f"of {spec.nodes} workers"
    if missing and refused is not None:
        problem = refused.reason, refused.sentence
        draft.wake(REFUSED_RETRY_SECONDS)
    if problem is not None:
        _tell_problem(draft, *problem)
        reason, message = problem
    elif all_scheduled:
        reason, message = "WorkersStarting", f"{sum(map(failures.is_running, gang))} {count} run."
    else:
        reason, message = "WorkersPending", f"{len(scheduled)} {count} have a node."
    draft.stage("Starting" if all_scheduled else "Queued", reason, message)
    wake_for_late_start(draft, spec)
    if holds(draft.status, "Restarting"):
        return draft.plan("Restarting")
    return draft.plan("Starting" if all_scheduled else "Pending")


def _tell_problem(draft: Draft, reason: str, message: str) -> None:
    """An Event of what keeps the workers from starting, if nothing did before."""
    old = condition(draft.stored, "Running")
    if old is None or old.reason in _NO_PROBLEMS:
        draft.event("Warning", reason, message)
