"""The class of a failure: a labelled table of pods as the API gives them, on nodes in some state."""

from __future__ import annotations

import json
from typing import Any

import pytest
from operator_world import message

from internlm_operator.causes import cause_of
from internlm_operator.failures import failure_of, lost, on_lost_node
from internlm_operator.nodes import GONE, NodeHealth

GOOD, NOT_READY = NodeHealth(), NodeHealth(ready=False)
FAULTY = NodeHealth(fault="condition GPUMissing is True")
TORCHRUN = (
    "ChildFailedError:\n  time      : now\n  rank      : 13 (local_rank: 5)\n  exitcode  : {} (pid: 4)\n"
)


def pod(code: int = 1, text: str = "", reason: str = "Error", **status: Any) -> dict[str, Any]:
    ended = {"exitCode": code, "message": text, "reason": reason, "finishedAt": "2026-01-01T00:00:05Z"}
    container = {"name": "trainer", "state": {"terminated": ended}} | status.pop("container", {})
    return {
        "metadata": {"name": "job-worker-1", "labels": {"training.internlm.io/replica-index": "1"}},
        "spec": {"nodeName": "gpu-17"},
        "status": {"phase": "Failed", "containerStatuses": [container]} | status,
    }


def said(reason: str, text: str = "why", code: int = 1) -> dict[str, Any]:
    return pod(code, message(reason, text))


def disrupted(reason: str, code: int = 75) -> dict[str, Any]:
    condition = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": "Taken away."}
    return pod(code, message("Stopped", "saved", 7), conditions=[condition])


def ended_by_kubelet(reason: str, text: str = "") -> dict[str, Any]:
    return {
        "metadata": {"name": "job-worker-1", "labels": {}},
        "spec": {"nodeName": "gpu-17"},
        "status": {"phase": "Failed", "reason": reason, "message": text},
    }


def deleted(code: int | None = None) -> dict[str, Any]:
    found = pod(code) if code is not None else ended_by_kubelet("") | {"status": {"phase": "Running"}}
    found["metadata"] |= {"deletionTimestamp": "2026-01-01T00:01:00Z", "deletionGracePeriodSeconds": 60}
    return found


def with_device(health: str) -> dict[str, Any]:
    resources = [{"resourceID": "GPU-0", "health": "Healthy"}, {"resourceID": "GPU-9", "health": health}]
    return pod(
        1,
        message("Error", "RuntimeError: CUDA error: an illegal memory access was encountered"),
        container={"allocatedResourcesStatus": [{"name": "nvidia.com/gpu", "resources": resources}]},
    )


CASES = [
    # A mistake of the user's, whatever the node looks like
    ("UserError", said("UserError", "checkpoint.path: no bucket"), GOOD),
    ("UserError", said("UserError", "checkpoint.path: no bucket"), FAULTY),
    ("UserError", said("Diverged", "loss is NaN"), GOOD),
    # Data
    ("DataError", said("DataError", "s3://b/a.bin, line 3: not a tokenized sample"), GOOD),
    # Memory, of the GPU and of the host
    ("OutOfMemory", said("OutOfMemory", "memory is full"), GOOD),
    ("OutOfMemory", pod(137, reason="OOMKilled"), GOOD),
    ("OutOfMemory", pod(1, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"), GOOD),
    ("OutOfMemory", said("Error", "RuntimeError: DefaultCPUAllocator: can't allocate memory"), GOOD),
    # Storage beyond the pod's own limit
    (
        "OutOfMemory",
        ended_by_kubelet("Evicted", 'Usage of EmptyDir volume "a" exceeds the limit "1Gi". '),
        GOOD,
    ),
    # Hardware: by Kubernetes' word, by a sign on the node, by the driver's words
    ("Hardware", with_device("Unhealthy"), GOOD),
    ("Hardware", pod(134), FAULTY),
    ("Hardware", disrupted("DeletionByTaintManager"), FAULTY),
    ("Hardware", said("Error", "NVRM: Xid (PCI:0000:64:00): 79, GPU has fallen off the bus"), GOOD),
    ("Hardware", said("Error", "Xid 94: contained ECC error"), GOOD),
    ("Hardware", said("Error", "RuntimeError: CUDA error: uncorrectable ECC error encountered"), GOOD),
    ("Hardware", said("Error", "CUDA error: uncorrectable NVLink error detected"), GOOD),
    ("Hardware", pod(128, "nvidia-container-cli: initialization error: nvml error", "StartError"), GOOD),
    ("Hardware", said("Error", "RuntimeError: No CUDA-capable device is detected"), GOOD),
    # Kubernetes took it away, and the trainer was told
    ("Preemption", disrupted("EvictionByEvictionAPI"), GOOD),
    ("Preemption", disrupted("PreemptionByScheduler"), GOOD),
    ("Preemption", disrupted("TerminationByKubelet"), GOOD),
    ("Preemption", disrupted("DeletionByTaintManager"), GOOD),
    ("Preemption", ended_by_kubelet("Evicted", "The node was low on resource: memory."), GOOD),
    ("Preemption", ended_by_kubelet("Terminated", "Pod was terminated in response to shutdown."), GOOD),
    ("Preemption", deleted(), GOOD),
    ("Preemption", deleted(143), GOOD),
    ("Preemption", said("Stopped", "stopped after step 7, which is saved", 75), GOOD),
    # The cluster
    ("Infrastructure", disrupted("DeletionByTaintManager"), NOT_READY),
    ("Infrastructure", pod(137), NOT_READY),
    ("Infrastructure", pod(1, "RuntimeError: anything"), GONE),
    ("Infrastructure", pod(137, reason="ContainerStatusUnknown"), GOOD),
    ("Infrastructure", pod(128, "exec: no such file", "StartError"), GOOD),
    ("Infrastructure", ended_by_kubelet("UnexpectedAdmissionError", "no device"), GOOD),
    ("Infrastructure", ended_by_kubelet("OutOfnvidia.com/gpu", "8 requested"), GOOD),
    ("Infrastructure", ended_by_kubelet("NodeLost"), GOOD),
    ("Infrastructure", said("StorageUnreachable", "s3://b does not answer"), GOOD),
    ("Infrastructure", said("Error", "OSError: [Errno 28] No space left on device: '/tmp/x'"), GOOD),
    ("Infrastructure", pod(143), GOOD),
    # The network: nobody else failed by itself
    ("Network", said("Error", "RuntimeError: Connection closed by peer [10.0.0.7]:40112"), GOOD),
    ("Network", said("Error", "DistBackendError: NCCL error: remote process exited or network error"), GOOD),
    ("Network", said("Error", "gaierror: [Errno -3] Temporary failure in name resolution"), GOOD),
    ("Network", pod(1, "RuntimeError: Watchdog caught collective operation timeout"), GOOD),
    # Whatever has no explanation
    ("Unknown", with_device("Unknown"), GOOD),
    ("Unknown", pod(139), GOOD),
    ("Unknown", pod(134), GOOD),
    ("Unknown", pod(137), GOOD),
    ("Unknown", pod(1, TORCHRUN.format(-9)), GOOD),
    ("Unknown", pod(3), GOOD),
    ("Unknown", said("Error", "ZeroDivisionError: division by zero"), GOOD),
    ("Unknown", said("Error", "CUDA error: an illegal memory access was encountered"), GOOD),
    ("Unknown", said("Error", "NVRM: Xid (PCI:0000:79:00): 13, Graphics Exception"), GOOD),
]


@pytest.mark.parametrize(("class_", "found", "node"), CASES)
def test_every_labelled_failure_gets_its_class_and_says_what_it_rests_on(
    class_: str, found: dict[str, Any], node: NodeHealth
) -> None:
    failure = failure_of(found)
    assert failure is not None
    cause = cause_of(failure, node)
    assert (cause.class_, bool(cause.evidence)) == (class_, True), cause


def test_a_pod_that_vanished_and_one_on_a_deleted_node_are_the_clusters_failure() -> None:
    assert cause_of(lost("job-worker-1", 1)).class_ == "Infrastructure"
    assert cause_of(on_lost_node(pod()), GONE).class_ == "Infrastructure"


@pytest.mark.parametrize(
    ("class_", "evidence", "found", "node"),
    [
        ("Hardware", "nvidia.com/gpu GPU-9: Unhealthy", with_device("Unhealthy"), GOOD),
        ("Hardware", "node gpu-17: condition GPUMissing is True", pod(134), FAULTY),
        ("Unknown", "signal 11", pod(139), GOOD),
        ("Infrastructure", "node gpu-17 is not ready", pod(137), NOT_READY),
    ],
)
def test_the_evidence_is_a_fact_that_somebody_can_look_up(
    class_: str, evidence: str, found: dict[str, Any], node: NodeHealth
) -> None:
    failure = failure_of(found)
    assert failure is not None
    cause = cause_of(failure, node)
    assert (cause.class_, cause.evidence) == (class_, evidence)


@pytest.mark.parametrize(
    ("text", "rank"),
    [
        ('{"reason": "Error", "message": "x", "rank": 12}', 12),
        ('{"reason": "Error", "message": "x"}', None),
        ('{"reason": "Error", "message": "x", "rank": -1}', None),
        ('{"reason": "Error", "message": "x", "rank": true}', None),
        (TORCHRUN.format(1), 13),
        ("rank 3 said something", None),
        (message("Error", "rank 3: ZeroDivisionError: x"), 3),
    ],
)
def test_the_rank_is_the_trainers_word_or_torchruns(text: str, rank: int | None) -> None:
    failure = failure_of(pod(1, text))
    assert failure is not None
    assert failure.rank == rank


def test_what_the_trainer_knows_of_a_hung_rank_comes_first_in_the_evidence() -> None:
    told = {"reason": "Hung", "message": "rank 3 hangs", "rank": 3, "evidence": "in all_reduce, model.py:7"}
    failure = failure_of(pod(1, json.dumps(told)))
    assert failure is not None
    assert (failure.rank, cause_of(failure).evidence) == (3, "in all_reduce, model.py:7; exit code 1")
