"""What may happen to a job in the simulation: its cluster, its nodes and its training, but for the operator's own
steps and what people do to it."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from operator_world import World, make_report, message

from internlm_operator import failures, inplace
from internlm_operator.api import ExcludedNode
from internlm_operator.nodes import GONE, NodeHealth
from internlm_operator.times import stamp
from internlm_operator.waits import Refusal

REASONS = ("Error", "UserError", "DataError", "Diverged", "Stopped", "StorageUnreachable", "OutOfMemory")
WORDS = ("why", "Xid 79: GPU has fallen off the bus", "Connection closed by peer", "No space left on device")
HEALTHS = (NodeHealth(), NodeHealth(ready=False), NodeHealth(fault="taint bad"), GONE)
DISRUPTIONS = ("EvictionByEvictionAPI", "PreemptionByScheduler", "DeletionByTaintManager")
FOUND = json.dumps({"reason": "Completed", "results": [["perplexity", "byte_perplexity", 2.5]]})
REFUSALS = (
    None,
    Refusal(403, "exceeded quota"),
    Refusal(409, "exists", "Service"),
    Refusal(422, "ValidatingAdmissionPolicy 'night' denied request: no GPUs"),
    Refusal(400, 'admission webhook "night" denied the request: no GPUs'),
    Refusal(422, 'Pod "job-worker-0" is invalid: spec.volumes[0].name: Required value'),
    Refusal(400, "strict decoding error: unknown field"),
)


class Happenings(RuleBasedStateMachine):
    """Rules for all of it."""

    world: World
    starts: dict[int, int]
    """The steps that attempts began from, as far as they told."""

    def attempts(self) -> dict[int, dict[str, Any]]:
        """The attempts in the status by their numbers."""
        return {attempt["number"]: attempt for attempt in self.world.status.get("attempts") or []}

    def _pick(self, choice: int) -> str | None:
        names = sorted(self.world.pods)
        return names[choice % len(names)] if names else None

    @rule(choice=st.integers(0, 9))
    def a_worker_starts(self, choice: int) -> None:
        name = self._pick(choice)
        if name and not failures.is_over(self.world.pods[name]):
            self.world.run(failures.index_of(self.world.pods[name]))

    @rule()
    def all_workers_start(self) -> None:
        for pod in self.world.pods.values():
            if not failures.is_over(pod):
                self.world.run(failures.index_of(pod))

    @rule(
        choice=st.integers(0, 9),
        reason=st.sampled_from(REASONS),
        text=st.sampled_from(WORDS),
        step=st.integers(0, 400),
    )
    def a_worker_fails(self, choice: int, reason: str, text: str, step: int) -> None:
        name = self._pick(choice)
        if name and failures.is_running(self.world.pods[name]):
            self.world.end(failures.index_of(self.world.pods[name]), 1, message(reason, text, step))

    @rule(choice=st.integers(0, 9), code=st.sampled_from([1, 134, 137, 139]))
    def a_worker_crashes(self, choice: int, code: int) -> None:
        name = self._pick(choice)
        if name and failures.is_running(self.world.pods[name]):
            self.world.end(failures.index_of(self.world.pods[name]), code, "Segmentation fault")

    def _attempt_of(self, index: int) -> int:
        """The attempt whose processes a worker's agent runs, as the job channel tells it."""
        gang = int(self.world.attempt_of(index))
        return inplace.attempt_of_pods(self.world.status, gang) or gang

    @rule()
    def all_agents_report(self) -> None:
        for pod in self.world.pods.values():
            if failures.is_running(pod):
                index = failures.index_of(pod)
                self.world.agents_tell(self._attempt_of(index), index)

    @rule(choice=st.integers(0, 9), reason=st.sampled_from(REASONS), text=st.sampled_from(WORDS))
    def processes_end_and_the_pod_stays(self, choice: int, reason: str, text: str) -> None:
        name = self._pick(choice)
        if name and failures.is_running(self.world.pods[name]):
            index = failures.index_of(self.world.pods[name])
            self.world.agents_tell(self._attempt_of(index), index, ended=(1, message(reason, text)))

    @rule()
    def all_running_workers_complete(self) -> None:
        for pod in self.world.pods.values():
            if failures.is_running(pod):
                self.world.complete(failures.index_of(pod))

    @rule(choice=st.integers(0, 9))
    def a_pod_vanishes(self, choice: int) -> None:
        name = self._pick(choice)
        if name:
            self.world.pods.pop(name)

    @rule(choice=st.integers(0, 9))
    def a_pod_is_deleted(self, choice: int) -> None:
        name = self._pick(choice)
        if name:
            self.world.delete(name)

    @rule(choice=st.integers(0, 9), reason=st.sampled_from(DISRUPTIONS))
    def a_pod_is_taken_away(self, choice: int, reason: str) -> None:
        name = self._pick(choice)
        if name:
            condition = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": "why"}
            self.world.pods[name]["status"]["conditions"] = [condition]
            self.world.delete(name)

    @rule(
        end=st.sampled_from([(0, FOUND), (0, "?"), (1, message("Error", "why")), (65, message("UserError"))])
    )
    def an_evaluation_ends(self, end: tuple[int, str]) -> None:
        self.world.end_evaluation(*end)

    @rule()
    def evaluations_vanish(self) -> None:
        self.world.evaluations.clear()

    @rule(choice=st.integers(0, 3), health=st.sampled_from(HEALTHS))
    def a_node_changes(self, choice: int, health: NodeHealth) -> None:
        self.world.nodes[f"node-{choice}"] = health

    @rule(choice=st.integers(0, 9))
    def a_device_fails(self, choice: int) -> None:
        name = self._pick(choice)
        for container in self.world.pods[name]["status"].get("containerStatuses", []) if name else []:
            device = {"resourceID": "GPU-0", "health": "Unhealthy"}
            container["allocatedResourcesStatus"] = [{"name": "nvidia.com/gpu", "resources": [device]}]

    @rule(choice=st.integers(0, 9))
    def no_node_is_free(self, choice: int) -> None:
        name = self._pick(choice)
        if name and "nodeName" not in self.world.pods[name]["spec"]:
            blocked = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
            self.world.pods[name]["status"]["conditions"] = [blocked]

    @rule(choice=st.integers(0, 3), seconds=st.sampled_from([10, 3600]))
    def another_job_blames_a_node(self, choice: int, seconds: int) -> None:
        now = self.world.now
        entry = {"node": f"node-{choice}", "class": "Hardware", "since": stamp(now)}
        entry["until"] = stamp(now + timedelta(seconds=seconds))
        self.world.excluded = [ExcludedNode.model_validate(entry)]

    @rule()
    def the_kubelets_end_what_is_deleted(self) -> None:
        self.world.reap()

    @rule(seconds=st.sampled_from([1, 3, 20, 100, 4000, -30]))
    def time_passes(self, seconds: int) -> None:
        self.world.wait(seconds)

    @rule(
        attempt=st.integers(1, 4),
        start=st.integers(0, 100),
        step=st.integers(0, 400),
        checkpoint=st.none() | st.integers(0, 400),
        seconds=st.integers(0, 1000),
    )
    def a_report_comes(
        self, attempt: int, start: int, step: int, checkpoint: int | None, seconds: int
    ) -> None:
        found, start = None, self.starts.setdefault(attempt, start)
        if checkpoint is not None:
            found = {"step": checkpoint, "uri": "s3://b/c", "time": "2026-01-01T00:00:00Z"}
        times = {"loadSeconds": seconds, "checkpointStallSeconds": seconds // 2}
        self.world.tell(make_report(attempt, step, startStep=start, checkpoint=found, **times))

    @rule(back=st.integers(1, 100))
    def the_newest_checkpoint_proves_damaged(self, back: int) -> None:
        """An attempt begins from an earlier one, or afresh."""
        known, number = self.world.status.get("checkpoint"), max(self.attempts(), default=0)
        if known and number and number not in self.starts:
            start = max(0, known["step"] - back)
            self.a_report_comes(number, start, start, start or None, 0)

    @rule(refusal=st.sampled_from(REFUSALS))
    def the_server_refuses_pods_or_not(self, refusal: Refusal | None) -> None:
        self.world.refused = refusal
