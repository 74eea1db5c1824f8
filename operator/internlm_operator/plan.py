"""A plan: what to do about a job, and what it is decided on. `Draft` is a plan in the making."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from internlm_operator import failures, goodput, inplace, objects
from internlm_operator.api import KIND, ExcludedNode, JobStatus, Phase
from internlm_operator.failures import Pod
from internlm_operator.nodes import NodeHealth
from internlm_operator.objects import Object, Settings
from internlm_operator.report import Report
from internlm_operator.status import (
    current_attempt,
    dump_status,
    no_estimate,
    only_progress_changed,
    parse_status,
    progress_write_due,
    set_condition,
)
from internlm_operator.times import parse_time, seconds_since, stamp
from internlm_operator.waits import Refusal

# The kubelet kills at the end of the grace; if the pod is still there this much later, its node is gone.
OVERDUE_SECONDS = 30
# A worker whose peers are gone hangs in a collective and cannot save; this is for its last log lines.
CRASH_GRACE_SECONDS = 15
# Pods that one plan makes, and that it deletes: a look at a job of thousands stays short, and the next one goes on.
BURST = 16


@dataclass(frozen=True)
class Apply:
    """Make the object so, by server-side apply."""

    object: Object


@dataclass(frozen=True)
class Create:
    """Make the object unless one of this name exists: a pod never changes, least of all another attempt's.

    What refuses an optional one is told in the log, and stops nothing else.
    """

    object: Object
    optional: bool = False


@dataclass(frozen=True)
class Delete:
    """Delete this very object; `grace_seconds` None leaves its own grace, 0 does not wait for its node."""

    kind: str
    name: str
    uid: str
    grace_seconds: int | None = None


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event on the job."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


Action = Apply | Create | Delete | Event


@dataclass(frozen=True)
class Observed:
    """What there is besides the job itself."""

    settings: Settings
    pods: list[Pod] = field(default_factory=list)
    """Pods with the job's label, as the API gives them."""
    report: Report | None = None
    """The latest report on the job channel, if any came since the operator started."""
    report_time: datetime | None = None
    """When it came."""
    applied: str = ""
    """`objects.shared_digest` of the service and the ConfigMap as this process last applied them."""
    refused: Refusal | None = None
    """Why the job's objects could not be made the last time."""
    nodes: Mapping[str, NodeHealth] = field(default_factory=dict)
    """Nodes by their names; those that are not known are taken for good."""
    excluded: list[ExcludedNode] = field(default_factory=list)
    """Nodes that other jobs have found to be at fault."""
    agents: inplace.Agents = field(default_factory=dict)
    """What the agents of the workers reported last."""
    listening_since: datetime | None = None
    """When this process began to take reports; what came before, it did not hear."""


@dataclass(frozen=True)
class Plan:
    """What to do, in this order: write the status, carry out the actions, look again."""

    status: dict[str, Any] | None = None
    """The whole status to store; None if the stored one is right."""
    actions: list[Action] = field(default_factory=list)
    wake_after: float | None = None
    """Seconds after which time alone may change the plan."""
    important: bool = False
    """More than progress: not to be put off."""
    decisive: bool = False
    """It rests on pods that are not there: to be decided on what the API server says now, not on a cache."""


class Draft:
    """A plan in the making."""

    def __init__(self, job: Object, observed: Observed, now: datetime) -> None:
        self.job, self.observed, self.now = job, observed, now
        self.name: str = job["metadata"]["name"]
        self.generation: int = job["metadata"].get("generation") or 0
        self.stored = parse_status(job.get("status"))
        self.status: JobStatus = parse_status(job.get("status"))
        # Only of the pods that the last attempt uses: an agent of another gang has nothing to say any more.
        gang = inplace.pods_of(self.status.attempts[-1]) if self.status.attempts else None
        self.agents = {i: agent for i, agent in observed.agents.items() if agent.report.gang == gang}
        self.actions: list[Action] = []
        self.wake_after: float | None = None
        self.urgent = False
        self.rests_on_absence = False
        self._gangs: dict[str | None, list[Pod]] = {}
        # A pod that only carries our label is not ours, and neither is one of a deleted job of this name.
        ours = [pod for pod in observed.pods if owner_of(pod) == job["metadata"]["uid"]]
        self.pods = sorted((pod for pod in ours if not objects.evaluates(pod)), key=failures.index_of)
        self.evaluations = [pod for pod in ours if objects.evaluates(pod)]

    def gang(self) -> list[Pod]:
        """The current attempt's pods."""
        attempt = current_attempt(self.status)
        number = str(inplace.pods_of(attempt)) if attempt else None
        if number not in self._gangs:
            self._gangs[number] = [pod for pod in self.pods if self.attempt_of(pod) == number]
        return self._gangs[number]

    @staticmethod
    def attempt_of(pod: Pod) -> str:
        """What the pod's label says."""
        return str((pod["metadata"].get("labels") or {}).get(objects.ATTEMPT_LABEL, ""))

    def others(self) -> list[Pod]:
        """Pods that must be gone before the current attempt's are made."""
        gang = {pod["metadata"]["uid"] for pod in self.gang()}
        return [pod for pod in self.pods if pod["metadata"]["uid"] not in gang]

    def missing(self, workers: int) -> list[int]:
        """Which of the current attempt's workers have no pod."""
        there = {failures.index_of(pod) for pod in self.gang()}
        return [index for index in range(workers) if index not in there]

    def all_are(self, test: Callable[[Pod], bool], workers: int) -> bool:
        """Whether all workers of the current attempt have pods, which pass the test."""
        gang = self.gang()
        return 0 < len(gang) == workers and all(map(test, gang))

    def say(self, type: str, value: bool, reason: str, message: str = "") -> None:
        set_condition(self.status, type, value, reason, message, self.generation, self.now)

    def stage(
        self, name: Literal["Queued", "Starting", "Running"] | None, reason: str, message: str = ""
    ) -> None:
        """At most one of Queued, Starting and Running is true, and all three say why."""
        for type in ("Queued", "Starting", "Running"):
            self.say(type, type == name, reason, message)
        if name != "Running":
            self.say("CheckpointStale", False, "NotRunning")
            self.say("ProgressStalled", False, "NotRunning")

    def event(self, type: Literal["Normal", "Warning"], reason: str, message: str) -> None:
        self.actions.append(Event(type, reason, message))

    def wake(self, seconds: float) -> None:
        seconds = max(seconds, 0.1)
        self.wake_after = seconds if self.wake_after is None else min(self.wake_after, seconds)

    def go_on(self) -> None:
        """Look again at once: this plan does a part of what there is to do."""
        self.wake_after = 0.0

    def remove(self, pods: list[Pod], grace_seconds: int | None = None) -> None:
        """Delete pods, and take those out of the way whose node does not answer any more."""
        unwanted = [pod for pod in pods if not self._may_end_by_itself(pod, grace_seconds)]
        for pod in unwanted[:BURST]:
            metadata = pod["metadata"]
            since = seconds_since(metadata.get("deletionTimestamp"), self.now) or 0.0
            hopeless = since >= OVERDUE_SECONDS or self.health(node_of(pod)).gone
            self.actions.append(
                Delete("Pod", metadata["name"], metadata["uid"], 0 if hopeless else grace_seconds)
            )
        if len(unwanted) > BURST:
            self.go_on()

    def _may_end_by_itself(self, pod: Pod, grace_seconds: int | None) -> bool:
        """Whether a pod was told to end, in no longer than it is to have, and its node may still do it in time."""
        metadata = pod["metadata"]
        since = seconds_since(metadata.get("deletionTimestamp"), self.now)
        if since is None:
            return False
        grace = metadata.get("deletionGracePeriodSeconds")
        if grace == 0:
            return True  # only a finalizer, which is somebody else's, holds it now
        if grace_seconds is not None and grace_seconds < (grace or 0):
            return False
        if since >= OVERDUE_SECONDS or self.health(node_of(pod)).gone:
            return False
        self.wake(OVERDUE_SECONDS - since)
        return True

    def health(self, node: str) -> NodeHealth:
        return self.observed.nodes.get(node, NodeHealth())

    def on_silent_nodes(self, pods: list[Pod]) -> list[Pod]:
        """Those whose node does not answer, as far as they are not over."""
        return [pod for pod in pods if not self.health(node_of(pod)).ready and not failures.is_over(pod)]

    def plan(self, phase: Phase) -> Plan:
        status = self.status
        status.phase = phase
        if phase != "Running":
            no_estimate(status)
        status.observed_generation = self.generation
        status.start_time = status.start_time or stamp(self.now)
        status.selector = f"{objects.JOB_LABEL}={self.name}"
        status.workers.ready = sum(map(failures.is_running, self.gang()))
        new = dump_status(status)
        if new == self.job.get("status"):
            return Plan(None, self.actions, self.wake_after, bool(self.actions))
        important = self.urgent or bool(self.actions) or not only_progress_changed(self.stored, status)
        due = progress_write_due(self.stored, self.now)
        if not important and due > 0:
            self.wake(due)
            return Plan(None, self.actions, self.wake_after, False)
        created = parse_time(self.job["metadata"].get("creationTimestamp")) or parse_time(status.start_time)
        status.goodput = goodput.advance(self.stored, status, created or self.now, self.now)
        return Plan(dump_status(status), self.actions, self.wake_after, important, self.rests_on_absence)


def node_of(pod: Pod) -> str:
    return (pod.get("spec") or {}).get("nodeName") or ""


def owner_of(pod: Pod) -> str | None:
    references = pod["metadata"].get("ownerReferences") or []
    return next((r["uid"] for r in references if r.get("controller") and r.get("kind") == KIND), None)
