"""Every fault on a real cluster of two nodes: the job goes on by itself, says what happened, ends the same to the bit.

Not part of the default run, as it takes half an hour: `make faults`, or `pytest -m faults`.  With
INTERNLM_RECOVERY_TIMES it writes the times there, as a page.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cluster.cluster import Cluster
from cluster.controlplane import wait_until
from e2e.chain import Jobs
from e2e.faults import (
    EVERY_STEPS,
    FULL_MEMORY,
    IN_PROCESSES,
    RECOVERY_SECONDS,
    STEPS,
    Fault,
    Hurt,
    Ward,
    manifest,
)
from e2e.misfortune import Operators, expire_token, share_clock
from e2e.recovery_times import PASSED, Run, page
from e2e.watching import Watcher

pytestmark = [pytest.mark.faults, pytest.mark.cluster, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
OUTAGE_SECONDS = 30
SKEW_SECONDS = 60
BEGUN = time.time()


@pytest.fixture(scope="module")
def ward(jobs: Jobs) -> Iterator[Ward]:
    """The jobs to be hurt, beside an uninterrupted one that comes first."""
    with Watcher(jobs.cluster.kubeconfig, jobs.namespace).running() as watcher:
        found = Ward(jobs, watcher)
        jobs.apply(manifest(jobs, "whole"))
        found.until("whole", lambda: found.status("whole").get("phase") == "Succeeded", "its end", 900)
        yield found


def this_run() -> Run:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    info = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    processor = info[1] if info else platform.machine()
    return Run(
        datetime.now(UTC).date().isoformat(),
        commit.stdout.strip(),
        f"{os.cpu_count()} cores ({processor}), {memory:.0f} GiB, which all nodes share",
        f"2 workers with 2 processes each, on the CPU; {STEPS} steps, a checkpoint every {EVERY_STEPS}",
    )


@pytest.fixture(autouse=True)
def in_time(request: pytest.FixtureRequest) -> None:
    """INTERNLM_FAULT_MINUTES: after so long no further fault begins, and the page says which ones are missing."""
    minutes = float(os.environ.get("INTERNLM_FAULT_MINUTES", "inf"))
    if time.time() - BEGUN > 60 * minutes and "all_jobs" not in request.node.name:
        pytest.skip(f"no time is left of INTERNLM_FAULT_MINUTES={minutes:g}")


@pytest.fixture
def operators(cluster: Cluster, operator: str) -> Operators:
    found = Operators(cluster, operator)
    found.wait_ready()
    return found


# In the training processes


def check(found: Hurt, fault: Fault, pod: str, rank: int) -> None:
    """The status names the failure, whose it is, and what was done."""
    [failure] = found.failures
    assert (failure["reason"], failure["class"]) == (fault.reason, fault.class_), failure
    assert failure["action"] == fault.action, failure
    assert failure.get("signal") == fault.signal, failure
    if fault.class_ != "Preemption":  # there, all ranks stop together
        assert (failure["pod"], failure.get("rank")) == (pod, rank), failure
    said = f"{failure['message']}; {failure['evidence']}"
    assert re.search(fault.text.replace("RANK", str(rank)), said), failure
    # Who is told to stop, saves.
    assert failure["lostSteps"] == 0 or fault.class_ != "Preemption", failure


@pytest.mark.parametrize("worker", [1, 0])
@pytest.mark.parametrize("fault", [*IN_PROCESSES, FULL_MEMORY], ids=lambda fault: fault.name)
def test_a_process_is_hurt(ward: Ward, fault: Fault, worker: int) -> None:
    name, ranks = ward.patient(), []
    pods, hung = ward.pods(name), ward.status(name)["goodput"]["hungSeconds"]
    found = ward.hurt(name, lambda: ranks.append(ward.strike(name, fault, worker)))
    check(found, fault, f"{name}-worker-{worker}", ranks[0])
    assert (ward.pods(name) == pods) == (fault.action == "InPlaceRestart")
    assert (found.status["goodput"]["hungSeconds"] > hung) == (fault.reason == "Hung")
    ward.note(fault.name, f"worker {worker}", found)


# In the cluster


def test_a_worker_is_evicted(ward: Ward, cluster: Cluster) -> None:
    name = ward.patient()
    pod = f"{name}-worker-1"
    place = {"name": pod, "namespace": ward.jobs.namespace}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": place}
    url = f"/api/v1/namespaces/{ward.jobs.namespace}/pods/{pod}/eviction"
    found = ward.hurt(
        name, lambda: cluster.kubectl("create", f"--raw={url}", "-f=-", input=json.dumps(eviction))
    )
    [failure] = found.failures
    assert (failure["class"], failure["action"]) == ("Preemption", "Reschedule"), failure
    assert (failure["pod"], failure["lostSteps"]) == (pod, 0), failure
    ward.note("eviction", "worker 1", found)


def test_a_node_is_drained(ward: Ward, cluster: Cluster) -> None:
    name = ward.patient()
    node = ward.node_of(name, 1)
    there = [f"{name}-worker-{worker}" for worker in (0, 1) if ward.node_of(name, worker) == node]
    options = ("--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=120s")
    try:
        found = ward.hurt(name, lambda: cluster.kubectl("drain", node, *options))
        assert {ward.node_of(name, worker) for worker in (0, 1)} == set(cluster.nodes) - {node}
    finally:
        cluster.kubectl("uncordon", node)
    [failure] = found.failures
    assert (failure["class"], failure["action"]) == ("Preemption", "Reschedule"), failure
    assert failure["pod"] in there, failure
    assert (failure["node"], failure["lostSteps"]) == (node, 0), failure
    ward.note("drain", "node of worker 1", found, "the gang goes to the other node")


@pytest.mark.parametrize(
    ("fault", "harm", "mend"),
    [
        ("node death", Cluster.kill_node, Cluster.start_node),
        ("node partition", Cluster.partition_node, Cluster.heal_node),
        ("kubelet death", Cluster.stop_kubelet, Cluster.start_kubelet),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_node_is_lost(ward: Ward, cluster: Cluster, fault: str, harm: object, mend: object) -> None:
    name = apart(ward)
    node = ward.node_of(name, 1)
    try:
        found = ward.hurt(name, lambda: harm(cluster, node))  # type: ignore[operator]
        assert {ward.node_of(name, worker) for worker in (0, 1)} == set(cluster.nodes) - {node}
    finally:
        mend(cluster, node)  # type: ignore[operator]
        cluster.wait_node(node)
    # Worker 0 may lose its peer before anybody knows of the node.
    failure = found.failures[-1]
    assert (failure["class"], failure["node"]) == ("Infrastructure", node), found.failures
    assert failure["pod"] == f"{name}-worker-1", failure
    ward.note(fault, "node of worker 1", found, "the gang goes to the other node")


def apart(ward: Ward) -> str:
    """A job with a worker on each node, which trains on until Kubernetes gives up one of them."""
    name = ward.patient(seconds=60)
    if ward.node_of(name, 0) == ward.node_of(name, 1):
        ward.hurt(name, lambda: ward.jobs.kubectl("delete", "pod", f"{name}-worker-1", "--wait=false"))
        ward.steady(name)
    assert ward.node_of(name, 0) != ward.node_of(name, 1)
    return name


def test_a_kubelet_starts_again(ward: Ward, cluster: Cluster) -> None:
    name = ward.patient(seconds=40)
    node = ward.node_of(name, 1)
    with ward.unharmed(name, "kubelet away for 15 s", "node of worker 1"):
        cluster.stop_kubelet(node)
        time.sleep(15)
        cluster.start_kubelet(node)


@pytest.mark.parametrize("seconds", [0, OUTAGE_SECONDS])
def test_the_api_server_is_away(ward: Ward, cluster: Cluster, seconds: int) -> None:
    name = ward.patient(seconds=seconds + 30)
    fault = f"API server away for {seconds} s" if seconds else "API server restarts"
    with ward.unharmed(name, fault, "control plane"):
        cluster.stop_apiserver()
        time.sleep(seconds)
        cluster.start_apiserver()


def test_the_object_store_is_away(ward: Ward, cluster: Cluster) -> None:
    name = ward.patient(seconds=OUTAGE_SECONDS + 30)
    with ward.unharmed(name, f"object store away for {OUTAGE_SECONDS} s", "MinIO"):
        cluster.stop_s3()
        time.sleep(OUTAGE_SECONDS)
        known = ward.status(name)["checkpoint"]["step"]
        cluster.start_s3()
    newer = lambda: ward.status(name)["checkpoint"]["step"] > known  # noqa: E731
    ward.until(name, newer, "a checkpoint after it", 120)


# The operator


def test_the_leader_is_killed_while_a_job_is_pending_and_starting(ward: Ward, operators: Operators) -> None:
    ward.finish()
    cluster = operators.cluster
    cluster.kubectl("cordon", *cluster.nodes)
    try:
        name = ward.admit()
        ward.until(name, lambda: ward.status(name).get("phase") == "Pending", "Pending", 60)
        pending = operators.kill_leader()
        ward.until(name, lambda: len(ward.pods(name)) == 2, "both pods", 60)
        pods = ward.pods(name)
    finally:
        cluster.kubectl("uncordon", *cluster.nodes)
    ward.until(name, lambda: ward.status(name).get("phase") == "Starting", "Starting", 60)
    starting = operators.kill_leader()
    ward.steady(name)
    assert ward.pods(name) == pods
    assert ward.status(name)["restarts"] == 0
    ward.check(name)
    for phase, seconds in (("Pending", pending), ("Starting", starting)):
        ward.note_leader(f"leader killed, {phase}", seconds)


def test_the_leader_is_killed_while_a_job_runs(ward: Ward, operators: Operators) -> None:
    name = ward.patient(seconds=40)
    with ward.unharmed(name, "leader killed, Running", "operator"):
        operators.kill_leader()


def test_the_leader_is_killed_while_a_job_restarts(ward: Ward, operators: Operators) -> None:
    name = ward.patient()

    def act() -> None:
        os.kill(ward.watcher.workers(name)[3].pid, signal.SIGKILL)
        ward.until(name, lambda: ward.status(name)["phase"] == "Restarting", "Restarting", 30)
        operators.kill_leader()

    found = ward.hurt(name, act)
    assert [failure["signal"] for failure in found.failures[:1]] == [9]
    ward.note("leader killed, Restarting after SIGKILL", "operator", found)


def test_the_leader_is_killed_while_a_job_is_suspended_and_resumed(ward: Ward, operators: Operators) -> None:
    name = ward.patient(seconds=20)
    restarts = ward.status(name)["restarts"]
    ward.suspend(name, True)
    ward.until(name, lambda: ward.status(name)["phase"] == "Suspending", "Suspending", 30)
    suspending = operators.kill_leader()
    ward.until(name, lambda: ward.status(name)["phase"] == "Suspended", "Suspended", 120)
    assert not ward.pods(name)
    operators.wait_ready()
    ward.suspend(name, False)
    ward.until(name, lambda: ward.status(name)["phase"] in ("Pending", "Starting"), "its resumption", 30)
    resumed = operators.kill_leader()
    ward.steady(name)
    ward.until(name, lambda: "startStep" in ward.status(name)["attempts"][-1], "its first report", 60)
    status = ward.status(name)
    assert status["restarts"] == restarts
    *_, before, now = status["attempts"]
    assert before["reason"] == "Suspended", status
    assert now["startStep"] >= before["endStep"], status
    ward.check(name)
    for phase, seconds in (("Suspending", suspending), ("resumed", resumed)):
        ward.note_leader(f"leader killed, {phase}", seconds)


def test_a_job_ends_while_no_operator_leads(ward: Ward, operators: Operators) -> None:
    name = ward.patient()
    pods, restarts = ward.pods(name), ward.status(name)["restarts"]
    ward.until(name, lambda: ward.seconds_left(name) < 3, "its last seconds", RECOVERY_SECONDS)
    seconds = operators.kill_leader()
    assert {pod["status"]["phase"] for pod in ward.jobs.objects("pods", name)} == {"Succeeded"}
    ward.finish()
    status = ward.status(name)
    assert (status["restarts"], status["attempts"][-1]["reason"]) == (restarts, "Completed"), status
    assert ward.pods(name) == pods
    ward.check(name)
    ward.note_leader("leader killed, the job ends", seconds)


def test_both_replicas_are_killed(ward: Ward, operators: Operators) -> None:
    operators.renew()
    name = ward.patient(seconds=60)
    with ward.unharmed(name, "both replicas killed", "operator"):
        operators.kill_all()
    operators.wait_ready()


def test_a_token_has_expired(ward: Ward, cluster: Cluster, operators: Operators) -> None:
    name = ward.patient(seconds=100)
    with ward.unharmed(name, "expired tokens", "both workers", "until the kubelet has renewed them"):
        for worker in (0, 1):
            expire_token(cluster, ward.pod(name, worker))
        place = f"--namespace={operators.namespace}"
        refused = lambda: "the token has expired" in cluster.kubectl("logs", operators.leader, place)  # noqa: E731
        wait_until(refused, "a report to be refused", 30)


def test_clocks_disagree_by_a_minute(ward: Ward, operators: Operators) -> None:
    ward.finish()
    share_clock(ward.jobs.cluster, ward.jobs.namespace)
    operators.shift_clock(SKEW_SECONDS)
    try:
        name = ward.admit(clock=-SKEW_SECONDS)
        for fault in (fault for fault in IN_PROCESSES if fault.name in ("SIGKILL", "SIGTERM")):
            ward.steady(name)
            ranks: list[int] = []
            found = ward.hurt(name, lambda: ranks.append(ward.strike(name, fault, 1)))  # noqa: B023
            check(found, fault, f"{name}-worker-1", ranks[0])
            note = "the operator's clock a minute ahead, the workers' a minute behind"
            ward.note(f"{fault.name} while clocks disagree", "worker 1", found, note)
        ward.finish()
    finally:
        operators.shift_clock(0)


def test_all_jobs_end_with_the_weights_of_the_one_that_nothing_happened_to(
    ward: Ward, request: pytest.FixtureRequest
) -> None:
    ward.finish()
    hurt, whole = ward.compare()
    assert hurt == dict.fromkeys(hurt, whole)
    if file := os.environ.get("INTERNLM_RECOVERY_TIMES"):
        passed = request.session.stash[PASSED]
        here = [item for item in request.session.items if item.path == request.path and item != request.node]
        missing = [sentence(item.name) for item in here if item.nodeid not in passed]
        Path(file).write_text(page(this_run(), ward.cases, missing))


def sentence(name: str) -> str:
    return name.removeprefix("test_").replace("_", " ")
