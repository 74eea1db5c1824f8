"""What the controller keeps in its memory, and for how long."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from kubernetes.aio import client, config
from operator_process import NAMESPACE, TIMEOUT, Here
from operator_world import SETTINGS, World, make_job, make_report

from internlm_operator import controller as shell
from internlm_operator.caches import Pods, trim_pod
from internlm_operator.controller import APPLY_AGAIN_SECONDS, Controller, Key
from internlm_operator.kube import Kube
from internlm_operator.report import AgentReport
from internlm_operator.workqueue import RetryError

KEY = ("default", "job")


def with_controller(script: Any, here: Here | None = None) -> None:
    """Run `script(controller)`; without `here` with one that reaches no API server: it must not need any."""

    async def main() -> None:
        settings = client.Configuration(host="http://127.0.0.1:9")
        if here is not None:
            await config.load_kube_config(str(here.operator.kubeconfig), client_configuration=settings)  # type: ignore[no-untyped-call]
        async with Kube(client.ApiClient(settings)) as kube:
            await script(Controller(kube, SETTINGS))

    asyncio.run(main())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_replica_that_comes_to_lead_has_heard_nothing_before() -> None:
    """Another one led, to whom the reports went: neither its silence nor its own old reports count."""

    async def script(controller: Controller) -> None:
        controller.on_job(None, make_job())
        controller.on_report(KEY, make_report())
        controller.on_agent(KEY, AgentReport(worker=0, gang=1, attempt=1))
        stop = asyncio.Event()
        stop.set()
        led = datetime.now(UTC)
        await controller.run(stop)
        observed = controller.observe(KEY)
        assert observed.report is None
        assert not observed.agents
        assert observed.listening_since is not None
        assert observed.listening_since >= led

    with_controller(script)


def running(number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A job that runs, of a name of its own, and its pods."""
    world = World()
    world.now = datetime.now(UTC)
    world.start()
    text = json.dumps([world.job, list(world.pods.values())])
    for own in ('job"', "job-uid", "job-worker", "pod-1", "pod-2"):
        text = text.replace(own, f"{own[:3]}{number}{own[3:]}")
    job, pods = json.loads(text)
    return job, pods


def test_who_comes_to_lead_turns_to_jobs_with_trouble_and_lets_those_that_run_wait_for_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shell, "RESYNC_RATE", 1e-6)
    looked: list[Key] = []
    asked: list[Key] = []

    async def script(controller: Controller) -> None:
        look = controller._reconcile

        async def noted(key: Key) -> float | None:
            looked.append(key)
            try:
                return await look(key)
            except RetryError:  # it asked the API server, which is not there
                asked.append(key)
                raise

        monkeypatch.setattr(controller, "_reconcile", noted)
        failed = {"terminated": {"exitCode": 1, "finishedAt": "2026-01-01T00:00:00Z"}}
        for number in range(50):
            job, pods = running(number)
            controller.on_job(None, job)
            for pod in pods:
                controller.on_pod(None, pod)
            if number == 30:
                ended = {"phase": "Failed", "containerStatuses": [{"name": "trainer", "state": failed}]}
                controller.on_pod("MODIFIED", pods[1] | {"status": ended})
        task = asyncio.create_task(controller.run(asyncio.Event()))
        await until(lambda: len(set(looked)) == 50)
        await until(lambda: ("default", "job30") in asked)
        assert set(asked) <= {("default", "job0"), ("default", "job30")}, "and the first in turn"
        _, pods = running(40)
        controller.on_pod("DELETED", pods[0])
        await until(lambda: ("default", "job40") in asked)
        task.cancel()

    with_controller(script)


@pytest.mark.cluster
def test_what_was_deleted_while_a_watch_was_cut_off_is_forgotten(here: Here) -> None:
    here.create("kept", nodes=1, managedBy="kueue.x-k8s.io/multikueue")
    kept = here.job("kept")
    gone = make_job() | {"status": {"phase": "Succeeded", "completionTime": "2026-01-01T00:00:00Z"}}
    gone["metadata"]["namespace"] = NAMESPACE
    labels = {"namespace": NAMESPACE, "labels": {"training.internlm.io/job-name": "kept"}}

    async def script(controller: Controller) -> None:
        task = asyncio.create_task(controller.run(asyncio.Event()))
        for job in (kept, gone, kept):
            controller.on_job(None, job)
        for name in ("there", "gone", "there"):
            controller.on_node(None, {"metadata": {"name": name}})
        key = (NAMESPACE, "kept")
        await until(lambda: not controller._sweeps)
        assert controller.observe(key).nodes.keys() == {"there"}
        await until(lambda: controller.jobs() == [controller._jobs[key]])
        controller.on_pod(None, pod("a", 1, **labels))
        controller.on_pod(None, pod("b", 1, **labels))
        controller.on_pod(None, pod("a", 1, **labels))
        await until(lambda: not controller.observe(key).pods)
        task.cancel()

    with_controller(script, here)
    here.delete("kept")


def pod(uid: str, version: int, phase: str = "Pending", **metadata: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "job-worker-0", "uid": uid, "resourceVersion": str(version)} | metadata,
        "spec": {"nodeName": "node-0", "containers": [{"name": "trainer"}]},
        "status": {"phase": phase, "podIP": "10.0.0.1"},
    }


def test_what_comes_late_changes_nothing_and_only_what_matters_is_news() -> None:
    pods = Pods()
    assert pods.put(pod("a", 5))
    assert not pods.put(pod("a", 4, "Running"))
    assert not pods.put(pod("a", 6, annotations={"by": "somebody"}))
    assert [p["status"]["phase"] for p in pods] == ["Pending"]
    assert pods.put(pod("a", 7, "Running"))
    assert not pods.put(pod("a", 6))
    assert pods.put(pod("b", 8))  # it took the name over; the first one's end is told later
    assert pods.drop(pod("a", 9))
    assert not pods.drop(pod("a", 9))
    assert pods.find("job-worker-0") == trim_pod(pod("b", 8))
    assert len(pods) == 1


@pytest.mark.parametrize(
    ("phase", "age", "again"),
    [("Running", 10, False), ("Running", APPLY_AGAIN_SECONDS, True), ("Starting", 10, True)],
)
def test_what_workers_share_is_applied_again_sooner_where_they_wait_for_it(
    phase: str, age: float, again: bool
) -> None:
    async def script(controller: Controller) -> None:
        controller.on_job("ADDED", make_job() | {"status": {"phase": phase}})
        controller._applied[KEY] = "digest", time.monotonic() - age
        with pytest.raises(RetryError):  # reading the job, which is due
            await controller._look(KEY)
        assert controller.observe(KEY).applied == ("" if again else "digest")

    with_controller(script)
