"""Why a worker pod ended, and which of several ended pods is to blame.

Pods are dicts as the API gives them.  What is read here: the trainer's own termination message, the
container's exit code, the pod's DisruptionTarget condition, and that it is being deleted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from internlm_operator.times import parse_time

Pod = dict[str, Any]

CONTAINER = "trainer"
# What a restart would only meet again: a mistake in the job, and training that goes wrong on the same data.
FINAL = frozenset({"UserError", "Diverged"})
OUT_OF_MEMORY = "OutOfMemory"
LOST = "PodLost"
# What a pod's agent says of processes that do not go on.
HUNG = "Hung"
# A pod that the kubelet evicted for its own sake, and not for the node's.
OVER_LIMIT = "StorageLimitExceeded"
# What the kubelet says of such a pod (pkg/kubelet/eviction/helpers.go), and what of the job gives it more.
_LIMITS = (
    ('Usage of EmptyDir volume "shm" exceeds the limit', "spec.sharedMemory"),
    ("Usage of EmptyDir volume", "emptyDir.sizeLimit of this volume in spec.template"),
    ("ephemeral local storage usage exceeds the total limit", "limits.ephemeral-storage in spec.template"),
    ("exceeded its local ephemeral storage limit", "limits.ephemeral-storage in spec.template"),
)
MAX_MESSAGE = 1024

# What gloo, NCCL, TCPStore and torchrun say when the *other* side went away.
_PEER_LOST = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|reset by peer|closed by peer|broken pipe|socket closed"
    r"|remote (process|peer)|peer (was )?(lost|gone|exited|unreachable)|ncclRemoteError|DistNetworkError"
    r"|DistStoreError|failed to (connect|recv|send)|timed? ?out (waiting|after)|watchdog caught collective"
    r"|SIGTERM|Signal 15|heartbeat",
    re.IGNORECASE,
)
# torchrun's summary of the process that failed first.
_TORCHRUN_EXIT = re.compile(r"exitcode\s*:\s*(-?\d+)")
_TORCHRUN_RANK = re.compile(r"^\s*rank\s*:\s*(\d{1,9})\b", re.MULTILINE)
_TRAINERS_RANK = re.compile(r"rank (\d{1,9}): ")
# What an agent says of a rank that is where it should be, and would go on if the others did.
_WAITS = re.compile(r"rank \d{1,9} waits for the others")
_EXCEPTION_LINE = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit)\b.*$", re.MULTILINE)
_REASON = re.compile(r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")


@dataclass(frozen=True)
class Termination:
    """The trainer's termination message."""

    reason: str
    message: str
    step: int | None
    rank: int | None = None
    evidence: str = ""


@dataclass(frozen=True)
class Failure:
    """Why one pod is no longer a working part of the gang."""

    reason: str
    message: str
    pod: str
    index: int = 0
    node: str = ""
    exit_code: int | None = None
    signal: int | None = None
    time: datetime | None = None
    rank: int | None = None
    evidence: str = ""
    """What the trainer knows besides, such as where a hung rank was."""
    device: str = ""
    """The pod's devices that Kubernetes calls unhealthy, in words."""

    @property
    def peer_lost(self) -> bool:
        """It ended since another worker did: somebody else's failure is the cause."""
        return self.reason == "Error" and bool(_PEER_LOST.search(self.message))

    @property
    def follows(self) -> bool:
        """It lost its peers, or waited for them until it counted as hung: the cause is elsewhere, if it is known."""
        return self.peer_lost or (self.reason == HUNG and bool(_WAITS.match(self.message)))


def index_of(pod: Pod) -> int:
    """The worker's index, from its label."""
    text = (pod["metadata"].get("labels") or {}).get("training.internlm.io/replica-index", "")
    return int(text) if text.isdecimal() else -1


def trainer_state(pod: Pod) -> dict[str, Any]:
    """The `state` of the trainer's container: waiting, running or terminated; empty before there is one."""
    for status in (pod.get("status") or {}).get("containerStatuses") or []:
        if status.get("name") == CONTAINER:
            return status.get("state") or {}
    return {}


def is_terminating(pod: Pod) -> bool:
    return bool(pod["metadata"].get("deletionTimestamp"))


def is_over(pod: Pod) -> bool:
    """No container of the pod runs any more. The kubelet says so of each container before it does of the pod."""
    status = pod.get("status") or {}
    if status.get("phase") in ("Succeeded", "Failed"):
        return True
    containers = status.get("containerStatuses") or []
    return bool(containers) and all(
        "terminated" in (container.get("state") or {}) for container in containers
    )


def is_running(pod: Pod) -> bool:
    return "running" in trainer_state(pod) and not is_over(pod)


def has_succeeded(pod: Pod) -> bool:
    """The trainer of this pod finished its work."""
    terminated = trainer_state(pod).get("terminated")
    if terminated is not None:
        return bool(terminated.get("exitCode") == 0)
    return (pod.get("status") or {}).get("phase") == "Succeeded"


def termination(pod: Pod) -> Termination | None:
    """The trainer's own word on its end; None if it left none, and the message is the log's tail."""
    text = (trainer_state(pod).get("terminated") or {}).get("message")
    if not text:
        return None
    try:
        content = json.loads(text)
    except ValueError:
        return None
    if not isinstance(content, dict) or not isinstance(content.get("reason"), str):
        return None
    message = shorten(content.get("message"))
    named = _TRAINERS_RANK.match(message)
    rank = _count(int(named[1])) if named else _count(content.get("rank"))
    evidence = shorten(content.get("evidence"))
    return Termination(_reason(content["reason"]), message, _count(content.get("step")), rank, evidence)


def _count(value: object) -> int | None:
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**53
    return value if fits and isinstance(value, int) else None


def unhealthy_devices(pod: Pod) -> str:
    """The pod's devices that Kubernetes calls unhealthy, in words (ResourceHealthStatus, KEP-4680)."""
    found = [
        f"{resource.get('name')} {device.get('resourceID')}"
        for container in (pod.get("status") or {}).get("containerStatuses") or []
        for resource in container.get("allocatedResourcesStatus") or []
        for device in resource.get("resources") or []
        if device.get("health") == "Unhealthy"
    ]
    return f"{', '.join(found[:4])}: Unhealthy" if found else ""


def failure_of(pod: Pod) -> Failure | None:
    """Why the pod is lost to the gang; None while it works and after it finished well."""
    if has_succeeded(pod):
        return None
    terminated = trainer_state(pod).get("terminated")
    if terminated is not None:
        return _ended_container(pod, terminated)
    if is_over(pod) or is_terminating(pod):
        return _ended_pod(pod)
    return None


def lost(name: str, index: int) -> Failure:
    """The failure of a pod that is simply not there any more."""
    return Failure(LOST, f"Pod {name} vanished: it was deleted, or its node was.", name, index)


def on_lost_node(pod: Pod) -> Failure:
    """The failure of a pod whose node was deleted: nobody else may ever say so of it."""
    return _failure(pod, "NodeLost", f"Node {(pod.get('spec') or {}).get('nodeName')} was deleted.")


def on_silent_node(pod: Pod) -> Failure:
    """The failure of a pod whose node does not answer, where others fail that depend on it."""
    return _failure(pod, "NodeLost", f"Node {(pod.get('spec') or {}).get('nodeName')} does not answer.")


def root_cause(failures: Iterable[Failure]) -> Failure | None:
    """The failure that the others follow from; None if there is none.

    What a restart would meet again comes first.  Then whoever failed of itself,
    earliest first; a worker that only lost its peer is the cause only if nobody else is.
    """
    return min(failures, key=_blame, default=None)


def _blame(failure: Failure) -> tuple[bool, bool, float, int]:
    when = failure.time.timestamp() if failure.time else float("inf")
    return failure.reason not in FINAL, failure.follows, when, failure.index


def _ended_container(pod: Pod, terminated: dict[str, Any]) -> Failure:
    code = terminated.get("exitCode")
    signal = code - 128 if isinstance(code, int) and 128 < code <= 192 else None
    time = parse_time(terminated.get("finishedAt"))
    word = termination(pod)
    outside = _disruption(pod)
    if word is not None and word.reason in FINAL:
        return _failure(pod, word.reason, word.message, code, None, time)
    if outside is not None:
        return _failure(pod, *outside, code, signal, time)
    if terminated.get("reason") == "OOMKilled":
        text = "The container used more memory than its limit and was killed."
        return _failure(pod, "OOMKilled", text, code, 9, time)
    if word is not None:
        return _failure(pod, word.reason, word.message or "The trainer gave no reason.", code, signal, time)
    if is_terminating(pod):
        return _failure(pod, *_deleted(pod), code, signal, time)
    text = terminated.get("message") or ""
    inner = _TORCHRUN_EXIT.search(text)
    if inner and int(inner[1]) < 0:
        signal = -int(inner[1])
    if signal is not None and terminated.get("reason") != "ContainerStatusUnknown":
        return _failure(
            pod, "Killed", f"A training process was ended by signal {signal}.", code, signal, time
        )
    reason = terminated.get("reason") or "Error"
    said = _last_words(text) or f"The container ended with exit code {code} and no message."
    return _failure(pod, reason, said, code, None, time)


def _ended_pod(pod: Pod) -> Failure:
    """The end of a pod whose trainer left no exit code: it never started, or still has its grace."""
    outside = _disruption(pod)
    if outside is not None:
        return _failure(pod, *outside)
    if is_terminating(pod):
        return _failure(pod, *_deleted(pod))
    status = pod.get("status") or {}
    for container in status.get("initContainerStatuses") or []:
        ended = (container.get("state") or {}).get("terminated") or {}
        if ended.get("exitCode"):
            said = _last_words(ended.get("message") or "")
            text = f"Init container {container.get('name')} ended with exit code {ended['exitCode']}. {said}"
            return _failure(pod, "InitContainerFailed", text, ended["exitCode"])
    reason = status.get("reason") or "PodFailed"
    return _failure(pod, reason, status.get("message") or "The pod failed before its trainer ran.")


def _disruption(pod: Pod) -> tuple[str, str] | None:
    """(reason, message) where Kubernetes itself took the pod away."""
    found = _taken_away(pod.get("status") or {})
    more = next((what for words, what in _LIMITS if found and words in found[1]), None)
    return (OVER_LIMIT, f"{found[1].strip()} Write less there, or raise {more}.") if found and more else found


def _taken_away(status: dict[str, Any]) -> tuple[str, str] | None:
    for condition in status.get("conditions") or []:
        if condition.get("type") == "DisruptionTarget" and condition.get("status") == "True":
            text = condition.get("message") or status.get("message") or "Kubernetes took the pod away."
            return condition.get("reason") or "Evicted", text
    if status.get("phase") == "Failed" and status.get("reason"):
        return status["reason"], status.get("message") or f"The pod was ended: {status['reason']}."
    return None


def _deleted(pod: Pod) -> tuple[str, str]:
    return "PodDeleted", f"Pod {pod['metadata']['name']} was deleted."


def _failure(
    pod: Pod,
    reason: str,
    message: str,
    exit_code: int | None = None,
    signal: int | None = None,
    time: datetime | None = None,
) -> Failure:
    metadata, word = pod["metadata"], termination(pod)
    if time is None and is_terminating(pod):
        # The timestamp is when the grace ends; the deletion was asked for that much earlier.
        ends = parse_time(metadata["deletionTimestamp"])
        grace = timedelta(seconds=metadata.get("deletionGracePeriodSeconds") or 0)
        time = ends - grace if ends else None
    return Failure(
        _reason(reason),
        shorten(message),
        metadata["name"],
        index_of(pod),
        (pod.get("spec") or {}).get("nodeName") or "",
        exit_code if isinstance(exit_code, int) else None,
        signal,
        time,
        _rank(pod, word),
        word.evidence if word is not None else "",
        unhealthy_devices(pod),
    )


def _rank(pod: Pod, word: Termination | None) -> int | None:
    """The rank that failed first in this pod, as the trainer or else torchrun says."""
    if word is not None:
        return word.rank
    text = (trainer_state(pod).get("terminated") or {}).get("message") or ""
    found = _TORCHRUN_RANK.search(text)
    return int(found[1]) if found else None


def _last_words(text: str) -> str:
    """The line of a log's tail that says most: the last exception, else the last line."""
    exceptions = [line for line in _EXCEPTION_LINE.findall(text) if "ChildFailedError" not in line]
    lines = [line.strip() for line in text.splitlines() if line.strip(" =-")]
    return (exceptions or lines or [""])[-1].strip()


def _reason(text: str) -> str:
    """`text` where it may stand as a condition's reason, also the kubelet's `OutOfnvidia.com/gpu`."""
    text = re.sub("[-./]", "_", text)
    return text if len(text) <= 128 and _REASON.match(text) else "Error"


def shorten(message: object) -> str:
    """One line of no more than MAX_MESSAGE characters that any JSON can hold."""
    text = " ".join(str(message or "").encode(errors="replace").decode().split())  # JSON may hold half a pair
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 3] + "..."
