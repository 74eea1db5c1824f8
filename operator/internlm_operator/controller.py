"""The shell around `reconcile`: it gathers what there is, asks for a plan and carries it out.

Watch events only fill caches and wake a job's key; a cache may be behind, so a plan that rests on pods which are not
there is made again on what the API server says at that moment before it is carried out, and so is the first one of a
replica that has come to lead that does anything.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import random
import time
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import replace
from datetime import datetime
from typing import Any

from internlm_operator import metrics
from internlm_operator.api import KIND, ExcludedNode
from internlm_operator.caches import Pods, trim_job, version
from internlm_operator.executor import Executor, RefusedError, last_attempt
from internlm_operator.failures import is_over
from internlm_operator.inplace import Agent, Directive, attempt_of_pods, directive
from internlm_operator.kube import ApiError, Kube
from internlm_operator.limits import Buckets
from internlm_operator.merge import merge_patch
from internlm_operator.nodes import GONE, NodeHealth, health_of, shared
from internlm_operator.objects import (
    CHECKPOINT_ANNOTATION,
    JOB_LABEL,
    Object,
    Settings,
    shared_digest,
)
from internlm_operator.plan import Action, Apply, Create, Event, Observed, Plan, node_of
from internlm_operator.reconcile import reconcile
from internlm_operator.report import MAX_REQUEST, AgentReport, Report
from internlm_operator.status import parse_status
from internlm_operator.waits import Refusal
from internlm_operator.workqueue import RetryError, WorkQueue

Key = tuple[str, str]
"""(namespace, name) of a job."""

WORKERS = 8
# What the workers of a running job share is applied again this often, with one of its readings.
APPLY_AGAIN_SECONDS = 900.0
# A watch that was cut off may have lost events; every job is read anew this often, and one that is finished so often.
RESYNC_SECONDS, FINISHED_RESYNC_SECONDS = 300.0, 3600.0
# But no more of them a second than this.
RESYNC_RATE = 10.0
# Objects a second that the list certainly brings with which a watch begins.
LIST_RATE = 500.0
# Deleted nodes that are remembered, until no pod is said to be on them any more.
MAX_GONE_NODES = 1000
# Looks at one job for its reports, a second.
LOOKS_RATE, LOOKS_BURST = 1.0, 5.0
# Status writes of all jobs that carry only progress, a second; what matters is never held back.
PROGRESS_WRITES_RATE = 50.0

logger = logging.getLogger(__name__)


class Controller:
    """Keeps every job's objects and status as `reconcile` wants them."""

    def __init__(self, kube: Kube, settings: Settings) -> None:
        self._kube = kube
        self._executor = Executor(kube)
        self._settings = settings
        self._jobs: dict[Key, Object] = {}
        self._pods: dict[Key, Pods] = defaultdict(Pods)
        self._nodes: dict[str, NodeHealth] = {}
        self._excluded: dict[Key, list[ExcludedNode]] = {}
        self._reports: dict[Key, tuple[Report, datetime]] = {}
        self._agents: dict[Key, dict[int, Agent]] = defaultdict(dict)
        self._applied: dict[Key, tuple[str, float]] = {}
        self._refused: dict[Key, Refusal] = {}
        # When each job is to be read anew; 0, as for those that are not here: with the next look.
        self._due: dict[Key, float] = {}
        # Those that another replica worked on, and that were not read since.
        self._unread: set[Key] = set()
        self._meanwhile: dict[Key, dict[str, bool]] = {}
        self._told: dict[str, set[Hashable]] = defaultdict(set)
        self._sweeps: set[str] = set()
        self._looks: Buckets[Key] = Buckets(LOOKS_RATE, LOOKS_BURST)
        self._progress_writes: Buckets[None] = Buckets(PROGRESS_WRITES_RATE, PROGRESS_WRITES_RATE)
        self._listening_since = self._kube.now()
        self._queue = WorkQueue(self._reconcile)

    async def run(self, stop: asyncio.Event) -> None:
        """Lead: work on jobs until `stop` or until cancelled."""
        # Another replica may have led since: what was heard, applied, refused or read before says nothing now.
        memories: list[dict[Key, Any]] = [self._reports, self._agents, self._applied, self._refused]
        for memory in memories:
            memory.clear()
        self._unread.clear()
        self._listening_since = self._kube.now()
        self._queue = WorkQueue(self._reconcile)
        for key, job in sorted(self._jobs.items(), key=lambda item: _phase(item[1]) == "Running"):
            if self._due.get(key) != 0.0:
                self._put_off(key, job)
            self._queue.add(key)
        await self._queue.run(WORKERS, stop)

    def _put_off(self, key: Key, job: Object) -> None:
        """Let a job that is there already wait for its turn to be read: the watch has told of it and its pods.

        Reading and applying all jobs when a replica comes to lead took minutes, in which nobody saw failures.
        Until its turn a job's plan is made on what the watch tells, and carried out only if it does nothing but
        write the status, for the resourceVersion that is known; what the workers share is taken for applied.
        """
        if _is_finished(job):
            wait = random.uniform(0.0, FINISHED_RESYNC_SECONDS)  # noqa: S311
        else:
            wait = len(self._unread) / RESYNC_RATE
            self._unread.add(key)
        self._due[key] = time.monotonic() + wait

    # What the watches and the job channel tell

    def on_job(self, type: str | None, job: Object) -> None:
        """A watch event of a job; `type` None for one of an initial list."""
        key = _key(job, job["metadata"]["name"])
        known = self._jobs.get(key)
        if type == "DELETED":
            if known is None or known["metadata"]["uid"] == job["metadata"]["uid"]:
                self._told["jobs"].discard(key)
                self._forget(key)
        else:
            self._note_told("jobs", type, key)
            if type == "ADDED" and known is None and not job.get("status"):
                # A job that is born before our eyes has nothing yet that would have to be read.
                self._due[key] = time.monotonic() + self._seconds_between_readings(job)
            found = type is None and known is None and bool(job.get("status"))
            if found:
                self._put_off(key, job)
            # What this process wrote itself is known already.
            if self._keep_job(key, job) is not known:
                self._queue.add(key, after=self._list_seconds() if found else 0.0)

    def on_pod(self, type: str | None, pod: Object) -> None:
        """A watch event of a pod with the job's label."""
        key = _key(pod, (pod["metadata"].get("labels") or {}).get(JOB_LABEL, ""))
        uid, pods = pod["metadata"]["uid"], self._pods[key]
        if type == "DELETED":
            self._told["pods"].discard(uid)
            news = pods.drop(pod)
        else:
            self._note_told("pods", type, uid)
            news = pods.put(pod)
        if key in self._meanwhile:
            self._meanwhile[key][uid] = type != "DELETED"
        if not pods:
            del self._pods[key]
        if news and key in self._jobs:
            # A list brings a gang's pods one by one: until all are told, others seem to be missing.
            rest_follows = type is None and key in self._unread and not is_over(pod)
            self._queue.add(key, after=self._list_seconds() if rest_follows else 0.0)

    def on_node(self, type: str | None, node: Object) -> None:
        """A watch event of a node."""
        name = node["metadata"]["name"]
        if type != "DELETED":
            self._note_told("nodes", type, name)
            self._nodes[name] = health_of(node, self._settings.node_signs)
            return
        self._told["nodes"].discard(name)
        self._nodes[name] = GONE
        gone = [name for name, health in self._nodes.items() if health.gone]
        for oldest in gone[:-MAX_GONE_NODES]:
            del self._nodes[oldest]
        for key, pods in self._pods.items():
            if key in self._jobs and any(node_of(pod) == name for pod in pods):
                self._queue.add(key)

    def on_agent(self, key: Key, report: AgentReport) -> Directive:
        """What a worker's agent tells, as the job channel accepted it; the answer."""
        agents = self._agents[key]
        known = agents.get(report.worker)
        if known is None or (known.report != report and known.report.gang <= report.gang):
            agents[report.worker] = Agent(report, self._kube.now())
            self._queue.add(key)
        return directive(_status_of(self._jobs.get(key)), report)

    def attempt_of_pod(self, key: Key, gang: int) -> int:
        """The attempt that a pod belongs to now, which was made for attempt `gang`."""
        return attempt_of_pods(_status_of(self._jobs.get(key)), gang) or gang

    def checkpoint_request(self, key: Key) -> str:
        """The name of the checkpoint that is asked for and not there yet; empty for none."""
        job = self._jobs.get(key) or {}
        asked = (job.get("metadata", {}).get("annotations") or {}).get(CHECKPOINT_ANNOTATION, "")
        done = _status_of(job).get("checkpointRequest", "")
        return "" if asked == done else str(asked)[:MAX_REQUEST]

    def on_report(self, key: Key, report: Report) -> None:
        """A report that the job channel accepted."""
        self._reports[key] = (report, self._kube.now())
        now = time.monotonic()
        # Of many reports of one job, one look a second at the newest is enough.
        free = self._looks.take(key, now)
        self._queue.add(key, after=0.0 if free else self._looks.wait(key, now))

    def trust(self, bundle: str) -> None:
        """Tell the workers of all jobs to trust these authorities on the job channel from now on."""
        self._settings = replace(self._settings, channel_ca=bundle)
        for key in self._jobs:
            self._queue.add(key)

    def jobs(self) -> list[Object]:
        """All jobs, as last seen."""
        return list(self._jobs.values())

    def job_uid(self, key: Key) -> str | None:
        """The job's uid; None for a job that is not known (yet)."""
        job = self._jobs.get(key)
        return job["metadata"]["uid"] if job else None

    def last_report(self, key: Key) -> Report | None:
        """The newest report that this process took."""
        return self._reports[key][0] if key in self._reports else None

    def current_attempt(self, key: Key) -> int | None:
        """Number of the job's last attempt, 0 before the first; None for a job that is not known (yet)."""
        job = self._jobs.get(key)
        return None if job is None else last_attempt(job)

    def find_pod(self, key: Key, name: str) -> Object | None:
        """The job's pod of this name, if the cache has it."""
        return self._pods[key].find(name) if key in self._pods else None

    # Work on one job

    async def _reconcile(self, key: Key) -> float | None:
        begun, result = time.monotonic(), "error"
        try:
            after = await self._look(key)
            result = "done"
            return after
        finally:
            metrics.RECONCILE.labels(result).observe(time.monotonic() - begun)

    async def _look(self, key: Key) -> float | None:
        """One look: decide, and carry it out; the seconds until the next one."""
        # Whether pods are there, as the watch told it during this look: answers to it may be older.
        self._meanwhile[key] = {}
        try:
            return await self._decide(key)
        except ApiError as error:
            if error.code == 409:
                self._due.pop(key, None)
            raise RetryError(str(error)) from error
        finally:
            del self._meanwhile[key]

    async def _decide(self, key: Key) -> float | None:
        job = self._jobs.get(key)
        if job is None:
            return None
        live = time.monotonic() >= self._due.get(key, 0.0)
        _, applied_at = self._applied.get(key, ("", 0.0))
        waits = _phase(job) != "Running"
        if live and (waits or time.monotonic() - applied_at >= APPLY_AGAIN_SECONDS):
            # Somebody may have deleted or changed what the workers wait for, or will when they start again.
            self._applied.pop(key, None)
        if live:
            job = await self._read(key)
        plan = reconcile(job, self.observe(key), self._kube.now()) if job else Plan()
        if not live and (plan.decisive or (plan.actions and key in self._unread)):
            job = await self._read(key)
            plan = reconcile(job, self.observe(key), self._kube.now()) if job else Plan()
        if job is None:
            return None
        now = time.monotonic()
        if plan.status is not None and not plan.important and not self._progress_writes.take(None, now):
            return self._progress_writes.wait(None, now) + random.uniform(0.0, 1.0)  # noqa: S311
        if await self._carry_out(key, job, plan):
            return 0.0
        if plan.important and plan.status is not None:
            self._queue.add(key)
        wait = max(0.0, self._due.get(key, 0.0) - time.monotonic())
        return wait if plan.wake_after is None else min(wait, plan.wake_after)

    def _seconds_between_readings(self, job: Object) -> float:
        seconds = FINISHED_RESYNC_SECONDS if _is_finished(job) else RESYNC_SECONDS
        return max(seconds, len(self._jobs) / RESYNC_RATE)

    async def _read(self, key: Key) -> Object | None:
        """Fetch the job and its pods into the caches; None if the job is gone."""
        namespace, name = key
        job = await self._kube.get(KIND, namespace, name)
        if job is None:
            self._forget(key)
            return None
        found = Pods()
        async for pod in self._kube.pods_of(namespace, name):
            found.put(pod)
        told = self._meanwhile[key]
        for pod in list(found):
            if not told.get(pod["metadata"]["uid"], True):
                found.drop(pod)
        for pod in self._pods.pop(key, ()):
            if told.get(pod["metadata"]["uid"]):
                found.put(pod)
        if found:
            self._pods[key] = found
        self._due[key] = time.monotonic() + self._seconds_between_readings(job)
        self._unread.discard(key)
        return self._keep_job(key, job)

    def observe(self, key: Key) -> Observed:
        """What is known of a job besides itself."""
        report, report_time = self._reports.get(key, (None, None))
        applied = self._applied.get(key, ("", 0.0))[0]
        if key in self._unread:
            applied = shared_digest(self._jobs[key], self._settings)
        return Observed(
            settings=self._settings,
            pods=list(self._pods.get(key, ())),
            report=report,
            report_time=report_time,
            applied=applied,
            refused=self._refused.get(key),
            agents=dict(self._agents.get(key, {})),
            nodes=self._nodes,
            excluded=[entry for other, found in self._excluded.items() if other != key for entry in found],
            listening_since=self._listening_since,
        )

    async def _carry_out(self, key: Key, job: Object, plan: Plan) -> bool:
        """Write the status, then do the actions; True if the outcome should be looked at right away."""
        if plan.status is not None:
            old = _status_of(job)
            patch = merge_patch(old, plan.status)
            if patch:
                job = self._keep_job(key, await self._kube.patch_status(job, patch))
                metrics.note_transition(old, _status_of(job), self._kube.now())
        complete = True
        try:
            for kind, actions in itertools.groupby(plan.actions, _step):
                together = list(actions)
                keep = functools.partial(self._keep_pod, key)
                complete &= await self._executor.carry_out(job, together, keep)
                if any(isinstance(action, Apply) for action in together):
                    self._applied[key] = shared_digest(job, self._settings), time.monotonic()
                if kind is Create:
                    self._refused.pop(key, None)
        except RefusedError as error:
            known, reason = self._refused.get(key), error.refusal.reason
            about = {"job": "/".join(key), "attempt": last_attempt(job), "reason": reason}
            logger.warning("%s", error.refusal.message, extra=about)
            if _phase(job) == "Running":
                # Its workers have what they share; it is applied again with the next turn, not at every look.
                self._applied[key] = shared_digest(job, self._settings), time.monotonic()
                return False
            self._refused[key] = error.refusal
            return known != error.refusal
        return not complete

    # Caches

    def _keep_pod(self, key: Key, type: str, pod: Object) -> None:
        """Note an answer of the API server, which may be older than what the watch told."""
        if type == "DELETED":
            self._pods[key].drop(pod)
        elif self._meanwhile[key].get(pod["metadata"]["uid"], True):
            self._pods[key].put(pod)

    def _keep_job(self, key: Key, job: Object) -> Object:
        """Cache the job unless a newer version is there; returns what the cache has then."""
        known = self._jobs.get(key)
        same = known is not None and known["metadata"]["uid"] == job["metadata"]["uid"]
        if known is not None and same and version(known) >= version(job):
            return known
        if not same:
            self._reports.pop(key, None)
            self._agents.pop(key, None)
            self._applied.pop(key, None)
            self._refused.pop(key, None)
        job = trim_job(job)
        self._jobs[key] = job
        self._keep_excluded(key, job)
        return job

    def _keep_excluded(self, key: Key, job: Object) -> None:
        """What this job says against nodes, for the others; it is in its status, and so outlives the operator."""
        self._excluded.pop(key, None)
        if _status_of(job).get("excludedNodes"):
            found = [entry for entry in parse_status(job["status"]).excluded_nodes if shared(entry)]
            self._excluded[key] = found

    def _forget(self, key: Key) -> None:
        self._unread.discard(key)
        caches: list[dict[Key, Any]] = [
            self._jobs,
            self._pods,
            self._reports,
            self._agents,
            self._applied,
            self._refused,
            self._due,
            self._excluded,
        ]
        for cache in caches:
            cache.pop(key, None)

    def _list_seconds(self) -> float:
        """Until a list that has just begun to come is there as a whole."""
        return 1.0 + sum(map(len, self._told.values())) / LIST_RATE

    def _note_told(self, kind: str, type: str | None, name: Hashable) -> None:
        """Notice when a watch begins anew, with a list: what was deleted meanwhile is not in it, and no event tells."""
        if type is None and name in self._told[kind] and kind not in self._sweeps:
            self._sweeps.add(kind)
            asyncio.get_running_loop().call_later(self._list_seconds(), self._sweep, kind)
            self._told[kind] = set()
        self._told[kind].add(name)

    def _sweep(self, kind: str) -> None:
        """See after what the list with which the watch of this kind began anew has not brought."""
        self._sweeps.discard(kind)
        told = self._told[kind]
        if kind == "nodes":
            # One that is not known is taken for good, so that no harm is done if it comes yet.
            self._nodes = {
                name: health for name, health in self._nodes.items() if health.gone or name in told
            }
            return
        if kind == "jobs":
            doubtful = [key for key in self._jobs if key not in told]
        else:
            doubtful = [
                key for key, pods in self._pods.items() if any(p["metadata"]["uid"] not in told for p in pods)
            ]
        for key in doubtful:
            if key in self._jobs:
                self._due[key] = 0.0
                self._queue.add(key)
            else:
                del self._pods[key]


def _key(resource: Object, job_name: str) -> Key:
    return resource["metadata"]["namespace"], job_name


def _step(action: Action) -> type[Action]:
    """Actions of one step that follow each other are done at once; the Events of a beginning need not come first."""
    return Apply if isinstance(action, Event) else type(action)


def _status_of(job: Object | None) -> Object:
    return (job or {}).get("status") or {}


def _phase(job: Object) -> str:
    return str(_status_of(job).get("phase"))


def _is_finished(job: Object) -> bool:
    return bool(_status_of(job).get("completionTime"))
