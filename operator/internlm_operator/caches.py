"""What the controller remembers of objects, as small as its decisions need them: there may be tens of thousands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from internlm_operator.api import GROUP
from internlm_operator.objects import Object

_METADATA = (
    "name",
    "namespace",
    "uid",
    "resourceVersion",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
)
_STATUS = ("phase", "reason", "message")
_CONTAINERS = ("containerStatuses", "initContainerStatuses")
_CONTAINER = ("name", "state", "allocatedResourcesStatus")
_OWNER = ("kind", "uid", "controller")
# The conditions of a pod that `failures` and `waits` read, and what of them.
_CONDITIONS = ("DisruptionTarget", "PodScheduled")
_CONDITION = ("type", "status", "reason", "message")


class Pods:
    """The pods of one job."""

    def __init__(self) -> None:
        self._by_uid: dict[str, Object] = {}
        self._uids: dict[str, str] = {}

    def __iter__(self) -> Iterator[Object]:
        return iter(self._by_uid.values())

    def __len__(self) -> int:
        return len(self._by_uid)

    def put(self, pod: Object) -> bool:
        """Keep the pod unless a newer one is there; whether it tells anything new."""
        uid, name = pod["metadata"]["uid"], pod["metadata"]["name"]
        known = self._by_uid.get(uid)
        if known is not None and version(known) > version(pod):
            return False
        new = trim_pod(pod)
        self._by_uid[uid], self._uids[name] = new, uid
        return known is None or _told(known) != _told(new)

    def drop(self, pod: Object) -> bool:
        """Forget the pod; whether it was there."""
        uid, name = pod["metadata"]["uid"], pod["metadata"]["name"]
        if self._uids.get(name) == uid:
            del self._uids[name]
        return self._by_uid.pop(uid, None) is not None

    def find(self, name: str) -> Object | None:
        """The newest pod of this name."""
        return self._by_uid.get(self._uids.get(name, ""))


def version(resource: Object) -> int:
    """The resourceVersion, a number that grows (documented since Kubernetes 1.35)."""
    text = resource["metadata"].get("resourceVersion", "")
    return int(text) if text.isdecimal() else 0


def trim_job(job: Object) -> Object:
    """The job without what only other field managers need to know."""
    metadata = {key: value for key, value in job["metadata"].items() if key != "managedFields"}
    trimmed: Object = _interned({**job, "metadata": metadata})
    return trimmed


def trim_pod(pod: Object) -> Object:
    """What decisions need of a pod: a tenth of its size."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    labels = metadata.get("labels") or {}
    conditions = [c for c in status.get("conditions") or [] if c.get("type") in _CONDITIONS]
    trimmed: Object = _interned(
        {
            "metadata": _part(metadata, _METADATA)
            | {"labels": {key: value for key, value in labels.items() if key.startswith(GROUP)}}
            | {"ownerReferences": [_part(r, _OWNER) for r in metadata.get("ownerReferences") or []]},
            "spec": _part(pod.get("spec") or {}, ("nodeName",)),
            "status": _part(status, _STATUS)
            | {"conditions": [_part(condition, _CONDITION) for condition in conditions]}
            | {key: [_part(c, _CONTAINER) for c in status[key]] for key in _CONTAINERS if status.get(key)},
        }
    )
    return trimmed


def _part(content: Object, keys: tuple[str, ...]) -> Object:
    return {key: content[key] for key in keys if key in content}


def _told(pod: Object) -> Object:
    return {**pod, "metadata": {**pod["metadata"], "resourceVersion": ""}}


def _interned(value: Any) -> Any:
    """The same content; equal texts of all objects are one, which `json` sees to within one document only."""
    if isinstance(value, dict):
        return {sys.intern(key): _interned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_interned(item) for item in value]
    return sys.intern(value) if type(value) is str and len(value) < 128 else value
