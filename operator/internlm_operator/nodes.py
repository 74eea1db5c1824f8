"""What the operator knows of nodes: their health as others tell it, and which ones get no worker for a while.

There is no agent on the nodes.  Whoever watches hardware there (a cloud's own monitor, node-problem-detector,
a device plugin) tells it by a condition, a taint or a label of the node, and `Signs` says which of them mean
that a worker must not run there.  Nodes are only read: workers are kept off by their own node affinity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from internlm_operator.api import ExcludedNode
from internlm_operator.times import parse_time

# Of a node that does not answer; the first two are put on by Kubernetes, the third by a person.
_LOST_TAINTS = (
    "node.kubernetes.io/unreachable",
    "node.kubernetes.io/not-ready",
    "node.kubernetes.io/out-of-service",
)


@dataclass(frozen=True)
class Signs:
    """What says that a node's hardware failed."""

    conditions: frozenset[tuple[str, str]] = frozenset()
    """(type, status) of conditions."""
    taints: frozenset[str] = frozenset()
    """Keys of taints."""
    labels: frozenset[tuple[str, str]] = frozenset()
    """(key, value) of labels."""


@dataclass(frozen=True)
class NodeHealth:
    """A node, as far as it matters here."""

    ready: bool = True
    """Its kubelet answers."""
    fault: str = ""
    """The sign of failed hardware, in words."""
    gone: bool = False
    """The node was deleted: nothing runs there, and nobody will say so of its pods."""


GONE = NodeHealth(ready=False, gone=True)


def health_of(node: Mapping[str, Any], signs: Signs) -> NodeHealth:
    """The health of a node, given as the API gives it."""
    taints = {taint.get("key", "") for taint in (node.get("spec") or {}).get("taints") or []}
    conditions = {
        (condition.get("type", ""), condition.get("status", ""))
        for condition in (node.get("status") or {}).get("conditions") or []
    }
    labels = set((node["metadata"].get("labels") or {}).items())
    faults = [f"condition {type} is {status}" for type, status in sorted(conditions & signs.conditions)]
    faults += [f"taint {key}" for key in sorted(taints & signs.taints)]
    faults += [f"label {key}={value}" for key, value in sorted(labels & signs.labels)]
    ready = not taints.intersection(_LOST_TAINTS) and not any(
        type == "Ready" and status != "True" for type, status in conditions
    )
    return NodeHealth(ready, "; ".join(faults[:4]))


def parse_signs(conditions: Iterable[str], taints: Iterable[str], labels: Iterable[str]) -> Signs:
    """Signs from `TYPE=STATUS`, `KEY` and `KEY=VALUE`.

    Raises ValueError for one that is not of this form.
    """
    return Signs(
        frozenset(_pair(text, "TYPE=STATUS") for text in conditions),
        frozenset(taints),
        frozenset(_pair(text, "KEY=VALUE") for text in labels),
    )


def _pair(text: str, form: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ValueError(f"{text!r} is not of the form {form}")
    return key, value


def is_current(entry: ExcludedNode, now: datetime) -> bool:
    until = parse_time(entry.until)
    return until is not None and now < until


def shared(entry: ExcludedNode) -> bool:
    """Whether it keeps other jobs away, too: what a job alone says against a node may be the job's own fault."""
    return entry.class_ == "Hardware"


def cap(nodes: Mapping[str, NodeHealth], percent: int) -> int:
    """How many nodes may be left out at once: this share of those that are there, but one at least; 0: none."""
    known = sum(not health.gone for health in nodes.values())
    return max(1, known * percent // 100) if percent else 0


def left_out(
    own: Iterable[ExcludedNode],
    others: Iterable[ExcludedNode],
    nodes: Mapping[str, NodeHealth],
    most: int,
    now: datetime,
) -> list[str]:
    """Names of the nodes that a new gang must not use, at most `most`.

    Nodes with a sign of failed hardware come first, then those that were to blame, the earliest first: where
    every node seems to fail, the nodes are not the cause, and the job must not run out of them.
    """
    faulty = sorted(name for name, health in nodes.items() if health.fault and not health.gone)
    entries = [entry for entry in (*own, *filter(shared, others)) if is_current(entry, now)]
    entries.sort(key=lambda entry: (entry.since, entry.node))
    return list(dict.fromkeys([*faulty, *(entry.node for entry in entries)]))[:most]


def keep_off(affinity: Any, names: Iterable[str]) -> dict[str, Any]:
    """A pod's `affinity` that also keeps it off the nodes of these names."""
    # By name, not by a label: `matchFields` takes exactly one value a requirement.
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in names]
    merged: dict[str, Any] = dict(affinity or {})
    if not fields:
        return merged
    node = dict(merged.get("nodeAffinity") or {})
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    terms = (node.get(required) or {}).get("nodeSelectorTerms") or [{}]  # one of the terms must hold
    node[required] = {
        "nodeSelectorTerms": [
            term | {"matchFields": [*(term.get("matchFields") or []), *fields]} for term in terms
        ]
    }
    return merged | {"nodeAffinity": node}
