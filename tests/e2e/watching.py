"""What is seen of jobs from outside: each status when it came, and the step of each training process.

The steps are read from the processes' own heartbeat files, on the machine that all nodes share, so times are those
of one clock and do not depend on what the job reports, or to whom.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import urllib3
from kubernetes import client, config

from internlm_operator import api

LOOK_SECONDS = 0.1
REQUEST_SECONDS = 2.0


class Worker(NamedTuple):
    """A training process."""

    pid: int
    """As this machine numbers it."""
    job: str
    rank: int
    attempt: int
    heartbeat: Path


class Seen(NamedTuple):
    """A job's status as it came."""

    time: float
    status: dict[str, Any]


class Stepped(NamedTuple):
    """A step that no process had done before."""

    time: float
    step: int
    attempt: int


@dataclass
class History:
    """What was seen of one job."""

    statuses: list[Seen] = field(default_factory=list)
    steps: list[Stepped] = field(default_factory=list)
    first: dict[int, int] = field(default_factory=dict)
    """The lowest step that each attempt's rank 0 was seen at, once it trained."""

    @property
    def furthest(self) -> int:
        return self.steps[-1].step if self.steps else 0

    def longest_stand(self, begin: float, end: float) -> float:
        """Seconds between two new steps, at most, of a time that begins and ends in steady training."""
        times = [begin, *(seen.time for seen in self.steps if begin < seen.time < end), end]
        return max(later - earlier for earlier, later in pairwise(times))


class Watcher:
    """Watches all jobs of a namespace from threads of its own."""

    def __init__(self, kubeconfig: Path, namespace: str) -> None:
        self.namespace = namespace
        self.jobs: dict[str, History] = defaultdict(History)
        self._stop = threading.Event()
        settings = client.Configuration()
        config.load_kube_config(str(kubeconfig), client_configuration=settings)
        settings.retries = False  # the next look comes at once
        self._api = client.CustomObjectsApi(client.ApiClient(settings))
        self._workers: dict[int, Worker] = {}

    @contextmanager
    def running(self) -> Iterator[Watcher]:
        threads = [threading.Thread(target=self._run, args=[look]) for look in (self._statuses, self._steps)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _run(self, look: Any) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            look()

    def workers(self, job: str) -> dict[int, Worker]:
        """The training processes of a job's newest attempt, by rank."""
        found = [worker for worker in list(self._workers.values()) if worker.job == job]
        newest = max((worker.attempt for worker in found), default=0)
        return {worker.rank: worker for worker in found if worker.attempt == newest}

    # The API server's side

    def _statuses(self) -> None:
        place = (api.GROUP, api.VERSION, self.namespace, api.PLURAL)
        try:
            items = self._api.list_namespaced_custom_object(*place, _request_timeout=REQUEST_SECONDS)["items"]
        except (client.ApiException, urllib3.exceptions.HTTPError):
            return  # it may be one of the faults
        for job in items:
            seen, status = self.jobs[job["metadata"]["name"]].statuses, job.get("status") or {}
            if not seen or seen[-1].status != status:
                seen.append(Seen(time.time(), status))

    # The processes' side

    def _steps(self) -> None:
        there = set()
        for entry in os.scandir("/proc"):
            if entry.name.isdecimal():
                pid = int(entry.name)
                with suppress(OSError, ValueError, KeyError):
                    worker = self._workers.get(pid) or self._recognise(pid)
                    if worker is not None:
                        self._workers[pid] = worker
                        there.add(pid)
                        self._look_at(worker)
        for pid in set(self._workers) - there:
            del self._workers[pid]

    def _recognise(self, pid: int) -> Worker | None:
        folder = Path(f"/proc/{pid}")
        if b"internlm_trainer.worker" not in (folder / "cmdline").read_bytes().split(b"\0"):
            return None
        pairs = (item.partition("=") for item in (folder / "environ").read_text().split("\0"))
        values = {key: value for key, _, value in pairs}
        *_, namespace, _, job, _ = values["INTERNLM_REPORT_URL"].split("/")
        if namespace != self.namespace:
            return None
        rank = int(values["RANK"])
        heartbeat = Path(values["INTERNLM_HEARTBEAT_DIR"].lstrip("/"), f"rank-{rank}.json")
        return Worker(pid, job, rank, int(values["INTERNLM_ATTEMPT"]), folder / "root" / heartbeat)

    def _look_at(self, worker: Worker) -> None:
        beat = json.loads(worker.heartbeat.read_bytes())
        if beat["section"] in ("setup", "prepare"):
            return
        history, step = self.jobs[worker.job], int(beat["step"])
        if worker.rank == 0:
            history.first.setdefault(worker.attempt, step)
        if step > history.furthest:
            history.steps.append(Stepped(time.time(), step, worker.attempt))
