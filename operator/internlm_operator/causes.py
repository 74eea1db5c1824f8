"""What kind of failure ended a worker: rules, tried in their order; the first that holds decides.

The idea of classes by rules over exit code, signal, Kubernetes' own words and the log's last line is that of
DLRover's node diagnosis (https://github.com/intelligent-machine-learning/dlrover) and of Kubernetes' pod failure
policy (https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from internlm_operator.api import FailureClass
from internlm_operator.failures import OVER_LIMIT, Failure
from internlm_operator.nodes import NodeHealth

# Reasons that say it all, whoever gave them.
_BY_REASON: dict[str, FailureClass] = {
    "UserError": "UserError",
    "Diverged": "UserError",
    "DataError": "DataError",
    "OutOfMemory": "OutOfMemory",
    "OOMKilled": "OutOfMemory",
    OVER_LIMIT: "OutOfMemory",
    # The trainer was told to stop, and could save.
    "Stopped": "Preemption",
    "PodDeleted": "Preemption",
    "PreemptionByScheduler": "Preemption",
    "EvictionByEvictionAPI": "Preemption",
    "TerminationByKubelet": "Preemption",
    "Evicted": "Preemption",
    "Preempted": "Preemption",
    "Preempting": "Preemption",
    "Terminated": "Preemption",
    "NodeShutdown": "Preemption",
}
# Kubernetes' words for a pod that never ran, or whose node went away.
_CLUSTERS = frozenset(
    {
        "PodLost",
        "NodeLost",
        "PodFailed",
        "StorageUnreachable",
        "UnexpectedAdmissionError",
        "NodeAffinity",
        "StartError",
        "ContainerCannotRun",
        "ContainerStatusUnknown",
        "CreateContainerError",
        "CreateContainerConfigError",
        "ImagePullBackOff",
        "ErrImagePull",
        "StartupDeadlineExceeded",
        "DeletionByPodGC",
        "InPlaceRestartFailed",
        "Shutdown",
    }
)
# NVIDIA's Xid and CUDA's words for a card that failed, and not a program on it:
# https://docs.nvidia.com/deploy/xid-errors
_HARDWARE = re.compile(
    r"\bXid\b(?:\s*\(PCI:[0-9a-f:.]+\))?\W{0,3}(?:48|62|64|74|79|94|95|119|120|140|143|14[4-9]|150)\b"
    r"|uncorrectable (NVLink|ECC)|ECC error|fallen off the bus|GPU is lost|GPU requires reset|NVLink error"
    r"|CUDA error: unknown error|no CUDA-capable device|CUDA driver initialization failed"
    r"|system not yet initialized|nvidia-container-cli: (initialization|device) error"
    r"|NVML: (Unknown Error|GPU is lost)",
    re.IGNORECASE,
)
_MEMORY = re.compile(
    r"CUDA out of memory|OutOfMemoryError|Cannot allocate memory|can't allocate memory|std::bad_alloc",
    re.IGNORECASE,
)
_INFRASTRUCTURE = re.compile(
    r"could not be saved|No space left on device|Read-only file system|Stale file handle|Input/output error"
    r"|Too many open files",
    re.IGNORECASE,
)
_NETWORK = re.compile(
    r"name resolution|Name or service not known|No route to host|Network is unreachable|ncclRemoteError"
    r"|NET/(IB|Socket)|ibv_|NCCL error: (remote|system|network)",
    re.IGNORECASE,
)
_STOP_SIGNALS = (2, 15)


@dataclass(frozen=True)
class Cause:
    """The class of a failure, and what it rests on."""

    class_: FailureClass
    evidence: str


@dataclass(frozen=True)
class _Case:
    failure: Failure
    node: NodeHealth


_Rule = Callable[[_Case], Cause | None]


def cause_of(failure: Failure, node: NodeHealth | None = None) -> Cause:
    """The class of `failure`; `node` is the health of its node, None where it is not known."""
    case = _Case(failure, node or NodeHealth())
    found = next((cause for rule in _RULES if (cause := rule(case)) is not None), None)
    found = found or Cause("Unknown", _exit_words(failure))
    return Cause(found.class_, "; ".join(filter(None, (failure.evidence, found.evidence))))


def _by_reason(case: _Case) -> Cause | None:
    class_ = _BY_REASON.get(case.failure.reason)
    return None if class_ is None else Cause(class_, f"reason {case.failure.reason}")


def _by_device(case: _Case) -> Cause | None:
    return Cause("Hardware", case.failure.device) if case.failure.device else None


def _by_node_sign(case: _Case) -> Cause | None:
    fault = case.node.fault
    return Cause("Hardware", f"node {case.failure.node}: {fault}") if fault else None


def _by_text(pattern: re.Pattern[str], class_: FailureClass) -> _Rule:
    def rule(case: _Case) -> Cause | None:
        found = pattern.search(case.failure.message)
        return Cause(class_, f"message says {found[0]!r}") if found else None

    return rule


def _by_lost_node(case: _Case) -> Cause | None:
    if case.node.gone:
        return Cause("Infrastructure", f"node {case.failure.node} was deleted")
    if not case.node.ready:
        return Cause("Infrastructure", f"node {case.failure.node} is not ready")
    return None


def _by_taint_manager(case: _Case) -> Cause | None:
    # The node answers: somebody tainted it, as for maintenance, and the trainer got its SIGTERM.
    found = case.failure.reason == "DeletionByTaintManager"
    return Cause("Preemption", "reason DeletionByTaintManager") if found else None


def _by_cluster(case: _Case) -> Cause | None:
    reason = case.failure.reason
    found = reason in _CLUSTERS or reason.startswith("OutOf")  # the kubelet's OutOfcpu, OutOfnvidia.com/gpu
    return Cause("Infrastructure", f"reason {reason}") if found else None


def _by_lost_peer(case: _Case) -> Cause | None:
    # Only where no other worker failed by itself: `root_cause` prefers one that did.
    return Cause("Network", "it lost its peers, and none of them failed") if case.failure.peer_lost else None


def _by_stop_signal(case: _Case) -> Cause | None:
    found = case.failure.signal in _STOP_SIGNALS
    return Cause("Infrastructure", f"{_exit_words(case.failure)}, sent from outside") if found else None


_RULES: tuple[_Rule, ...] = (
    _by_reason,
    _by_device,
    _by_node_sign,
    _by_text(_HARDWARE, "Hardware"),
    _by_text(_MEMORY, "OutOfMemory"),
    _by_lost_node,
    _by_taint_manager,
    _by_cluster,
    _by_text(_INFRASTRUCTURE, "Infrastructure"),
    _by_text(_NETWORK, "Network"),
    _by_lost_peer,
    _by_stop_signal,
)


def _exit_words(failure: Failure) -> str:
    if failure.signal is not None:
        return f"signal {failure.signal}"
    return "no exit code" if failure.exit_code is None else f"exit code {failure.exit_code}"
