"""A cluster of one job, in memory and without time: what reconcile sees, and what its plans do to it.

It keeps the rules of the API server that reconcile relies on (names are unique, deletion takes a grace) and
breaks down at once where a plan breaks the operator's own.
"""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime, timedelta
from typing import Any

from internlm_operator import failures, objects
from internlm_operator.api import API_VERSION, KIND, ExcludedNode
from internlm_operator.inplace import Agent
from internlm_operator.merge import merge_patch
from internlm_operator.nodes import NodeHealth
from internlm_operator.plan import Action, Apply, Create, Delete, Event, Observed, Plan
from internlm_operator.reconcile import reconcile
from internlm_operator.report import AgentReport, Report
from internlm_operator.times import parse_time, stamp
from internlm_operator.waits import Refusal

SETTINGS = objects.Settings("trainer:1", "https://internlm-operator.system.svc:8443", "CA")
START = datetime(2026, 1, 1, tzinfo=UTC)

SPEC: dict[str, Any] = {
    "nodes": 2,
    "processesPerNode": 2,
    "model": {"layers": 2, "hiddenSize": 64, "heads": 4, "vocabSize": 512, "seqLen": 128},
    "data": {"tokenizer": "s3://b/t.model", "train": [{"path": "s3://b/train"}]},
    "training": {"steps": 400, "microBatchSize": 2},
    "checkpoint": {"path": "s3://b/checkpoints"},
}


def make_job(**spec: Any) -> dict[str, Any]:
    """A job as the API gives it, with these fields of its spec changed."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": "job",
            "namespace": "default",
            "uid": "job-uid",
            "generation": 1,
            "resourceVersion": "1",
            "creationTimestamp": stamp(START),
        },
        "spec": copy.deepcopy(SPEC) | spec,
    }


def make_report(attempt: int = 1, step: int = 120, **fields: Any) -> Report:
    content = {
        "attempt": attempt,
        "step": step,
        "totalSteps": 400,
        "tokens": step * 4096,
        "loss": 3.0,
    } | fields
    return Report.model_validate_json(json.dumps(content))


def message(reason: str, text: str = "", step: int | None = None) -> str:
    return json.dumps({"reason": reason, "message": text, "step": step})


class World:
    """The job, its pods, and a scripted kubelet."""

    def __init__(self, **spec: Any) -> None:
        self.now = START
        self.job = make_job(**spec)
        self.pods: dict[str, dict[str, Any]] = {}
        self.evaluations: dict[str, dict[str, Any]] = {}
        self.events: list[Event] = []
        self.deleted_job = False
        self.report: tuple[Report, datetime] | None = None
        self.applied = ""
        self.refused: Refusal | None = None
        self.nodes: dict[str, NodeHealth] = {}
        self.excluded: list[ExcludedNode] = []
        self.agents: dict[int, Agent] = {}
        self.listening_since: datetime | None = None
        self._uids = 0

    # What reconcile sees and does

    @property
    def status(self) -> dict[str, Any]:
        return self.job.get("status") or {}

    @property
    def phase(self) -> str:
        return str(self.status.get("phase"))

    def condition(self, type: str) -> dict[str, Any]:
        return next(c for c in self.status["conditions"] if c["type"] == type)

    def observed(self) -> Observed:
        report, time = self.report or (None, None)
        pods = copy.deepcopy([*self.pods.values(), *self.evaluations.values()])
        nodes, excluded = dict(self.nodes), copy.deepcopy(self.excluded)
        return Observed(
            SETTINGS,
            pods,
            report,
            time,
            self.applied,
            self.refused,
            nodes,
            excluded,
            dict(self.agents),
            self.listening_since,
        )

    def plan(self) -> Plan:
        job, observed = copy.deepcopy(self.job), self.observed()
        plan = reconcile(job, observed, self.now)
        assert (job, observed) == (self.job, self.observed()), "reconcile changed its arguments"
        assert plan == reconcile(job, observed, self.now), "reconcile is not a function of its arguments"
        return plan

    def step(self, actions: int | None = None) -> Plan:
        """Reconcile once; with `actions`, the operator dies after so many (-1: before the status)."""
        plan = self.plan()
        self.carry_out(plan, actions)
        return plan

    def settle(self) -> Plan:
        """Reconcile until nothing changes; time stands still."""
        for _ in range(50):
            plan = self.step()
            if plan.status is None and not plan.actions:
                return plan
        raise AssertionError(f"does not come to rest: {plan}")

    def carry_out(self, plan: Plan, actions: int | None = None, seen: dict[str, Any] | None = None) -> None:
        """`seen`: the job that the plan was made for, which may have been edited since."""
        if actions == -1:
            return
        if plan.status is not None:
            patch = merge_patch(self.status, plan.status)
            self.job["status"] = apply_merge_patch(self.status, patch)
            assert self.job["status"] == plan.status
            self._touch()
            seen = self.job
        for action in plan.actions[:actions]:
            self.do(action, seen or self.job)

    def do(self, action: Action, job: dict[str, Any]) -> None:
        match action:
            case Apply(manifest):
                assert manifest in objects.shared_objects(job, SETTINGS)
                self.applied = objects.shared_digest(job, SETTINGS)
            case Create(manifest, optional=True):
                if self.refused is None:
                    self._create_evaluation(copy.deepcopy(manifest))
            case Create(manifest):
                if self.refused is None:
                    self._create(copy.deepcopy(manifest))
            case Delete(kind, name, uid, grace):
                if kind == KIND:
                    self.deleted_job, self.pods, self.evaluations = True, {}, {}
                else:
                    self.delete(name, uid, grace)
            case Event():
                self.events.append(action)

    def _create(self, pod: dict[str, Any]) -> None:
        name, labels = pod["metadata"]["name"], pod["metadata"]["labels"]
        if name in self.pods:
            return
        attempts = {p["metadata"]["labels"][objects.ATTEMPT_LABEL] for p in self.pods.values()}
        assert attempts <= {labels[objects.ATTEMPT_LABEL]}, "two attempts' pods at once"
        current = self.status["attempts"][-1]
        assert labels[objects.ATTEMPT_LABEL] == str(current["number"]), (
            "a pod of an attempt that is not recorded"
        )
        assert not current.get("endTime"), "a pod of an attempt that is over"
        self._uids += 1
        pod["metadata"]["uid"] = f"pod-{self._uids}"
        pod["status"] = {"phase": "Pending"}
        self.pods[name] = pod

    def _create_evaluation(self, pod: dict[str, Any]) -> None:
        name, state = pod["metadata"]["name"], self.status["evaluation"]
        if name in self.evaluations:
            return
        assert pod["metadata"]["labels"][objects.EVALUATION_LABEL] == str(state["step"]), "a try not recorded"
        assert all(map(failures.is_over, self.evaluations.values())), "two evaluations at once"
        self._uids += 1
        pod["metadata"]["uid"] = f"pod-{self._uids}"
        pod["status"] = {"phase": "Pending"}
        self.evaluations[name] = pod

    def end_evaluation(self, code: int, text: str, reason: str = "") -> None:
        """The evaluation under way ends so."""
        for pod in self.evaluations.values():
            if not failures.is_over(pod):
                state = {"terminated": {"exitCode": code, "message": text, "finishedAt": stamp(self.now)}}
                phase = "Failed" if code else "Succeeded"
                pod["status"] = {"phase": phase, "containerStatuses": [{"name": "trainer", "state": state}]}
                pod["status"] |= {"reason": reason} if reason else {}

    def delete(self, name: str, uid: str | None = None, grace: int | None = None) -> None:
        self.evaluations.pop(name, None)  # its node answers at once
        pod = self.pods.get(name)
        if pod is None or (uid is not None and pod["metadata"]["uid"] != uid):
            return
        seconds = pod["spec"]["terminationGracePeriodSeconds"] if grace is None else grace
        if seconds == 0 or "nodeName" not in pod["spec"]:
            del self.pods[name]
        elif "deletionTimestamp" not in pod["metadata"]:
            pod["metadata"]["deletionTimestamp"] = stamp(self.now + timedelta(seconds=seconds))
            pod["metadata"]["deletionGracePeriodSeconds"] = seconds
        elif (sooner := pod["metadata"]["deletionGracePeriodSeconds"] - seconds) > 0:
            ends = parse_time(pod["metadata"]["deletionTimestamp"])
            assert ends is not None
            pod["metadata"]["deletionTimestamp"] = stamp(ends - timedelta(seconds=sooner))
            pod["metadata"]["deletionGracePeriodSeconds"] = seconds

    # The scripted scheduler and kubelet

    def pod(self, index: int) -> dict[str, Any]:
        return self.pods[f"job-worker-{index}"]

    def wait(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)

    def schedule(self, index: int) -> None:
        self.pod(index)["spec"]["nodeName"] = f"node-{index}"

    def set_state(self, index: int, phase: str, **state: Any) -> None:
        self.schedule(index)
        self.pod(index)["status"] |= {
            "phase": phase,
            "containerStatuses": [{"name": "trainer", "state": state}],
        }

    def run(self, *indices: int) -> None:
        for index in indices:
            self.set_state(index, "Running", running={"startedAt": stamp(self.now)})

    def end(self, index: int, code: int = 0, text: str = "", reason: str = "") -> None:
        ended = {"exitCode": code, "message": text, "finishedAt": stamp(self.now)}
        ended["reason"] = reason or ("Error" if code else "Completed")
        self.set_state(index, "Failed" if code else "Succeeded", terminated=ended)

    def complete(self, *indices: int, step: int = 400) -> None:
        for index in indices:
            self.end(index, 0, message("Completed", "done", step))

    def agents_tell(self, attempt: int, *indices: int, ended: tuple[int, str] | None = None) -> None:
        """Agents report that the processes of an attempt run, or have ended with (exit code, message)."""
        for index in indices:
            end = {"exitCode": ended[0], "message": ended[1]} if ended else None
            content = {"worker": index, "gang": int(self.attempt_of(index)), "attempt": attempt, "ended": end}
            self.agents[index] = Agent(AgentReport.model_validate_json(json.dumps(content)), self.now)

    def vanish(self, index: int) -> None:
        del self.pods[f"job-worker-{index}"]

    def reap(self) -> None:
        """The kubelet ends the pods that are being deleted."""
        for name, pod in list(self.pods.items()):
            if pod["metadata"].get("deletionTimestamp"):
                del self.pods[name]

    def tell(self, report: Report) -> None:
        self.report = (report, self.now)

    def edit(self, **spec: Any) -> None:
        self.job["spec"] |= spec
        self.job["metadata"]["generation"] += 1
        self._touch()

    def edit_status(self, status: dict[str, Any]) -> None:
        """As a hand does it."""
        self.job["status"] = status
        self._touch()

    def _touch(self) -> None:
        metadata = self.job["metadata"]
        metadata["resourceVersion"] = str(int(metadata["resourceVersion"]) + 1)

    # Short ways to a state

    def start(self) -> None:
        """To a gang that runs."""
        self.settle()
        self.run(*range(self.job["spec"]["nodes"]))
        self.settle()

    def attempt_of(self, index: int) -> str:
        return str(self.pod(index)["metadata"]["labels"][objects.ATTEMPT_LABEL])

    def overdue(self, name: str) -> bool:
        ends = parse_time(self.pods[name]["metadata"].get("deletionTimestamp"))
        return ends is not None and ends < self.now


def apply_merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7386, as the API server does it."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = apply_merge_patch(result.get(key), value)
    return result
