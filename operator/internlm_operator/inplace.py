"""Restarts in place: the pods stay, and their agents start the processes again from the last checkpoint.

That saves scheduling, images and volumes.  An attempt in place uses the pods of an earlier one, and its agents learn
of it by the answers to what they report; none of them waits for another, since the processes of an attempt meet at
a port of their own.  It is tried once: where it does not get going, or ends without a step, the gang is made anew.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from internlm_operator.api import Attempt
from internlm_operator.failures import CONTAINER, Failure, Pod, index_of, is_running, is_terminating
from internlm_operator.report import AgentReport
from internlm_operator.times import seconds_since, stamp

# Until all agents have started the processes of an attempt in place; they ask every few seconds.
READY_SECONDS = 60.0
# Whose processes run tells so every five seconds, and may take as long to be answered: by then an operator that has
# just taken over has heard of all agents.
HEARD_SECONDS = 15.0
# An agent whose processes have ended asks every second, and hears that the job is finished.
END_SECONDS = 10.0
NOT_READY = "InPlaceRestartFailed"


class Directive(NamedTuple):
    """What an agent is to do; the answer to its report."""

    attempt: int
    """The attempt whose processes it is to run."""
    finished: bool
    """Whether the job is over, so that nothing is to be waited for."""


def directive(status: Mapping[str, Any], report: AgentReport) -> Directive:
    """What the agent that reports so is to do, by the job's stored status."""
    wanted = attempt_of_pods(status, report.gang)
    return Directive(wanted or report.attempt, bool(status.get("completionTime")))


def attempt_of_pods(status: Mapping[str, Any], gang: int) -> int | None:
    """The current attempt, if it uses the pods that were made for attempt `gang`."""
    last = (status.get("attempts") or [{}])[-1]
    uses = gang == (last.get("gang") or last.get("number"))
    return int(last["number"]) if uses and not last.get("endTime") else None


class Agent(NamedTuple):
    """What a worker's agent reported last."""

    report: AgentReport
    since: datetime
    """When it first said so."""


Agents = Mapping[int, Agent]
"""By the workers' indices."""


def pods_of(attempt: Attempt) -> int:
    """Number of the attempt that this one's pods were made for."""
    return attempt.gang or attempt.number


def as_reported(pod: Pod, attempt: Attempt, agents: Agents) -> Pod:
    """The pod with its trainer ended as its agent says, where its container still waits for an attempt in place."""
    known = agents.get(index_of(pod))
    ended = known.report.ended if known else None
    if known is None or ended is None or known.report.attempt != attempt.number or not is_running(pod):
        return pod
    terminated = {
        "exitCode": ended.exit_code,
        "reason": "Error" if ended.exit_code else "Completed",
        "message": ended.message,
        "finishedAt": stamp(known.since),
    }
    # The rest stays: sidecars, and what the kubelet says of the trainer's devices.
    statuses = [
        {**status, "state": {"terminated": terminated}} if status["name"] == CONTAINER else status
        for status in pod["status"]["containerStatuses"]
    ]
    return {**pod, "status": {**pod["status"], "containerStatuses": statuses}}


def possible(attempt: Attempt, gang: list[Pod], nodes: int, heard: Collection[int]) -> bool:
    """Whether the pods of an attempt that failed are fit for another one; `heard`: whose agents are known."""
    if attempt.gang is not None and (attempt.end_step or 0) <= (attempt.start_step or 0):
        return False
    return len(gang) == nodes and all(
        is_running(pod) and not is_terminating(pod) and index_of(pod) in heard for pod in gang
    )


def expected(attempt: Attempt, gang: list[Pod], nodes: int, agents: Agents) -> bool:
    """Whether they are, but for agents that have not been heard yet."""
    unheard = bool(agents) and len(agents) < nodes
    return unheard and possible(attempt, gang, nodes, range(nodes))


def note_ready(attempt: Attempt, nodes: int, agents: Agents) -> None:
    """An attempt in place has begun when all agents have started it."""
    if attempt.gang is not None and not attempt.ready:
        there = [agent for agent in agents.values() if agent.report.attempt == attempt.number]
        attempt.ready = len(there) >= max(nodes, 1)


def ending(pods: list[Pod], agents: Agents, now: datetime) -> set[str]:
    """Uids of the pods of a finished job that end by themselves any moment, and stay for their logs."""
    return {
        pod["metadata"]["uid"]
        for pod in pods
        if (agent := agents.get(index_of(pod)))
        and agent.report.ended
        and (now - agent.since).total_seconds() < END_SECONDS
    }


def seconds_left(attempt: Attempt, listening_since: datetime | None, now: datetime) -> float | None:
    """Seconds for which an attempt in place may still wait for its agents, which tell nothing to an operator that is
    not there yet; None if it does not wait for any."""
    if attempt.gang is None or attempt.ready:
        return None
    waited = seconds_since(attempt.start_time, now) or 0.0
    if listening_since is not None:
        waited = min(waited, (now - listening_since).total_seconds())
    return READY_SECONDS - waited


def late(attempt: Attempt, gang: list[Pod], agents: Agents) -> Failure:
    """The failure of an attempt in place that has not begun in time."""
    missing = [
        pod
        for pod in gang
        if (agent := agents.get(index_of(pod))) is None or agent.report.attempt < attempt.number
    ]
    names = ", ".join(pod["metadata"]["name"] for pod in missing[:4])
    text = f"The processes of {names} did not start again within {READY_SECONDS:.0f} s."
    return Failure(NOT_READY, text, missing[0]["metadata"]["name"], index_of(missing[0]))
