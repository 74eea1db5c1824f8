"""Why a pod ended, read from what the API says of it, and who is to blame among several."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from operator_world import message

from internlm_operator.failures import Failure, failure_of, root_cause, termination

TORCHRUN_LOG = """\
E1123 torch/distributed/elastic/multiprocessing/api.py:984] failed (exitcode: -9) local_rank: 1 (pid: 42)
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
internlm_trainer.worker FAILED
------------------------------------------------------------
  exitcode  : -9 (pid: 42)
  traceback : Signal 9 (SIGKILL) received by PID 42
============================================================
"""
EXCEPTION_LOG = """\
Traceback (most recent call last):
  File "worker.py", line 1, in <module>
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
some more text
"""


def pod(phase: str = "Failed", terminated: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "metadata": {"name": "job-worker-3", "labels": {"training.internlm.io/replica-index": "3"}},
        "spec": {"nodeName": "gpu-17"},
        "status": {"phase": phase} | status,
    }
    if terminated is not None:
        found["status"]["containerStatuses"] = [{"name": "trainer", "state": {"terminated": terminated}}]
    return found


def ended(code: int = 1, text: str = "", reason: str = "Error") -> dict[str, Any]:
    return {"exitCode": code, "message": text, "reason": reason, "finishedAt": "2026-01-01T00:00:05Z"}


# As the kubelet of Kubernetes 1.37 says it (pkg/kubelet/eviction/helpers.go).
OVER_VOLUME = 'Usage of EmptyDir volume "cache" exceeds the limit "1Gi". '
OVER_SHM = 'Usage of EmptyDir volume "shm" exceeds the limit "64Gi". '
OVER_POD = "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. "
OVER_CONTAINER = 'Container trainer exceeded its local ephemeral storage limit "1Gi". '


def disruption(reason: str) -> dict[str, Any]:
    condition = {"type": "DisruptionTarget", "status": "True", "reason": reason, "message": "Taken away."}
    return {"conditions": [condition]}


@pytest.mark.parametrize(
    ("found", "reason", "said"),
    [
        (pod(terminated=ended(text=message("UserError", "no bucket"))), "UserError", "no bucket"),
        (pod(terminated=ended(text=message("Error", "full disk"))), "Error", "full disk"),
        (pod(terminated=ended(text=message("Diverged", "loss is NaN"))), "Diverged", "loss is NaN"),
        (pod(terminated=ended(1, message("Diverged", "loss is NaN")), **disruption("EvictionByEvictionAPI")),
         "Diverged", "loss is NaN"),
        (pod(terminated=ended(text=message("Stopped", "saved", 7))), "Stopped", "saved"),
        (pod(terminated=ended(137, reason="OOMKilled")), "OOMKilled", "more memory than its limit"),
        (pod(terminated=ended(139)), "Killed", "signal 11"),
        (pod(terminated=ended(1, TORCHRUN_LOG)), "Killed", "signal 9"),
        (pod(terminated=ended(1, EXCEPTION_LOG)), "Error", "CUDA out of memory"),
        (pod(terminated=ended(2, "usage: torchrun\nbad option --x")), "Error", "bad option --x"),
        (pod(terminated=ended(3)), "Error", "exit code 3"),
        (pod(terminated=ended(128, "no such file", "StartError")), "StartError", "no such file"),
        (pod(terminated=ended(1, message("Stopped", "saved")), **disruption("EvictionByEvictionAPI")),
         "EvictionByEvictionAPI", "Taken away."),
        (pod(reason="Evicted", message="The node was low on memory."), "Evicted", "low on memory"),
        (pod(reason="Evicted", message=OVER_VOLUME), "StorageLimitExceeded",
         OVER_VOLUME + "Write less there, or raise emptyDir.sizeLimit of this volume in spec.template."),
        (pod(reason="Evicted", message=OVER_SHM), "StorageLimitExceeded", "raise spec.sharedMemory."),
        (pod(reason="Evicted", message=OVER_POD), "StorageLimitExceeded", "limits.ephemeral-storage"),
        (pod(terminated=ended(137), reason="Evicted", message=OVER_CONTAINER), "StorageLimitExceeded",
         "limits.ephemeral-storage"),
        (pod(reason="UnexpectedAdmissionError", message="no GPU"), "UnexpectedAdmissionError", "no GPU"),
        (pod(initContainerStatuses=[{"name": "fetch",
                                     "state": {"terminated": {"exitCode": 4, "message": "404"}}}]),
         "InitContainerFailed", "fetch ended with exit code 4. 404"),
        (pod(), "PodFailed", "before its trainer ran"),
    ],
)  # fmt: skip
def test_the_reason_is_what_says_most(found: dict[str, Any], reason: str, said: str) -> None:
    failure = failure_of(found)
    assert failure is not None
    assert failure.reason == reason
    assert said in failure.message
    assert (failure.pod, failure.index, failure.node) == ("job-worker-3", 3, "gpu-17")


@pytest.mark.parametrize(
    "found", [pod("Running"), pod("Pending"), pod("Succeeded"), pod(terminated=ended(0))]
)
def test_a_pod_that_works_or_has_finished_well_is_no_failure(found: dict[str, Any]) -> None:
    assert failure_of(found) is None


def test_a_failed_trainer_counts_while_a_sidecar_still_runs() -> None:
    failure = failure_of(pod("Running", ended(1, message("Error", "x"))))
    assert failure is not None


@pytest.mark.parametrize(
    "text",
    ["", "no json", "[]", "3", '{"reason": 3}', '{"message": "x"}', "null", '{"reason": "x"', "\udcff" * 3],
)
def test_what_is_no_termination_message_is_taken_for_a_log(text: str) -> None:
    found = pod(terminated=ended(1, text))
    assert termination(found) is None
    assert failure_of(found) is not None


def test_a_reason_that_no_condition_may_have_becomes_error() -> None:
    failure = failure_of(pod(terminated=ended(text=message("has spaces", "x"))))
    assert failure is not None
    assert failure.reason == "Error"


def test_a_long_message_is_cut() -> None:
    failure = failure_of(pod(terminated=ended(text=message("Error", "x" * 4000))))
    assert failure is not None
    assert len(failure.message) == 1024


def at(second: int, reason: str = "Error", text: str = "its own mistake", index: int = 0) -> Failure:
    return Failure(reason, text, f"w-{index}", index, time=datetime(2026, 1, 1, 0, 0, second, tzinfo=UTC))


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ([], None),
        ([at(5), at(3)], at(3)),
        ([at(3), at(9, "UserError")], at(9, "UserError")),
        ([at(3, text="Connection closed by peer"), at(9, "Diverged")], at(9, "Diverged")),
        ([at(3, text="Connection closed by peer"), at(5)], at(5)),
        ([at(3, text="NCCL error: remote process exited or there was a network error"), at(5)], at(5)),
        ([at(3, text="Connection closed by peer"), at(4, text="Broken pipe")],
         at(3, text="Connection closed by peer")),
        ([at(3, text="Connection reset by peer"), Failure("PodLost", "vanished", "w-1", 1)],
         Failure("PodLost", "vanished", "w-1", 1)),
        ([at(3, index=2), at(3, index=1)], at(3, index=1)),
        ([at(3, "PodDeleted", "deleted"), at(4, text="Connection closed by peer")],
         at(3, "PodDeleted", "deleted")),
    ],
)  # fmt: skip
def test_the_root_cause_is_what_a_restart_would_meet_again_or_the_first_that_failed_by_itself(
    failures: list[Failure], cause: Failure | None
) -> None:
    assert root_cause(failures) == cause
    assert root_cause(reversed(failures)) == cause
