"""Merging of plain Kubernetes objects: a pod with the user's template, a status with the stored one."""

from __future__ import annotations

from typing import Any

# Lists of a PodSpec that merge item by item, and the key that says which items are the same:
# the patchMergeKey of https://github.com/kubernetes/api/blob/master/core/v1/types.go
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "imagePullSecrets": "name",
    "hostAliases": "ip",
    "resourceClaims": "name",
    "schedulingGates": "name",
    "topologySpreadConstraints": "topologyKey",
}
# Kubernetes would replace these whole; a job that tolerates one more taint does not mean to lose the others.
APPENDED = frozenset({"tolerations"})


def strategic_merge(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """`base` with `patch` merged over it, as `kubectl patch --type strategic` does for a PodSpec.

    Objects merge key by key, a null removes its key, the lists of MERGE_KEYS merge item by item (an item with
    `$patch: delete` is removed), tolerations are appended, and anything else replaces what was there.
    """
    merged = dict(base)
    for key, value in patch.items():
        old = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            merged[key] = strategic_merge(old if isinstance(old, dict) else {}, value)
        elif isinstance(value, list) and key in MERGE_KEYS:
            merged[key] = _merge_items(old if isinstance(old, list) else [], value, MERGE_KEYS[key])
        elif isinstance(value, list) and key in APPENDED and isinstance(old, list):
            merged[key] = old + [item for item in value if item not in old]
        else:
            merged[key] = value
    return merged


def _merge_items(base: list[Any], patch: list[Any], key: str) -> list[Any]:
    merged = list(base)
    for item in patch:
        if not isinstance(item, dict):
            merged.append(item)
            continue
        same = (i for i, old in enumerate(merged) if isinstance(old, dict) and old.get(key) == item.get(key))
        at = next(same, None)
        if item.get("$patch") == "delete":
            if at is not None:
                del merged[at]
        elif at is None:
            merged.append(strategic_merge({}, item))
        else:
            merged[at] = strategic_merge(merged[at], item)
    return merged


def merge_patch(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The JSON merge patch (RFC 7386) that makes `new` of `old`; empty if they are the same."""
    patch: dict[str, Any] = dict.fromkeys(old.keys() - new.keys())
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            inner = merge_patch(before, value)
            if inner:
                patch[key] = inner
        elif key not in old or value != before:
            patch[key] = value
    return patch
