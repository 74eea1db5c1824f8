"""What the controller keeps in its memory, and for how long."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from kubernetes.aio import client
from operator_world import SETTINGS, make_job, make_report

from internlm_operator.caches import Pods, trim_pod
from internlm_operator.controller import APPLY_AGAIN_SECONDS, Controller
from internlm_operator.kube import Kube
from internlm_operator.report import AgentReport
from internlm_operator.workqueue import RetryError

KEY = ("default", "job")


def with_controller(script: Any) -> None:
    """Run `script(controller)` with one that reaches no API server: it must not need any."""

    async def main() -> None:
        async with Kube(client.ApiClient(client.Configuration(host="http://127.0.0.1:9"))) as kube:
            await script(Controller(kube, SETTINGS))

    asyncio.run(main())


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
        controller.on_job(None, make_job() | {"status": {"phase": phase}})
        controller._applied[KEY] = "digest", time.monotonic() - age
        with pytest.raises(RetryError):  # reading the job, which is due
            await controller._look(KEY)
        assert controller.observe(KEY).applied == ("" if again else "digest")

    with_controller(script)
