"""Which nodes are healthy, and which ones a gang keeps off."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from internlm_operator.api import ExcludedNode
from internlm_operator.nodes import GONE, NodeHealth, Signs, health_of, keep_off, left_out, parse_signs
from internlm_operator.times import stamp

SIGNS = parse_signs(["GPUMissing=True", "AcceleratedHardwareReady=False"], ["example.com/bad"], ["gpu=bad"])
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def node(
    conditions: dict[str, str] | None = None,
    taints: tuple[str, ...] = (),
    labels: dict[str, str] | None = None,
) -> dict[str, Any]:
    return {
        "metadata": {"name": "n", "labels": labels or {}},
        "spec": {"taints": [{"key": key, "effect": "NoSchedule"} for key in taints]},
        "status": {"conditions": [{"type": t, "status": s} for t, s in (conditions or {}).items()]},
    }


@pytest.mark.parametrize(
    ("found", "health"),
    [
        ({"metadata": {"name": "n"}}, NodeHealth()),
        (node({"Ready": "True", "GPUMissing": "False", "MemoryPressure": "True"}), NodeHealth()),
        (node({"Ready": "False"}), NodeHealth(ready=False)),
        (node({"Ready": "Unknown"}), NodeHealth(ready=False)),
        (node({"Ready": "True"}, ("node.kubernetes.io/unreachable",)), NodeHealth(ready=False)),
        (node({"GPUMissing": "True"}), NodeHealth(fault="condition GPUMissing is True")),
        (
            node({"AcceleratedHardwareReady": "False"}),
            NodeHealth(fault="condition AcceleratedHardwareReady is False"),
        ),
        (node(taints=("example.com/bad",)), NodeHealth(fault="taint example.com/bad")),
        (node(labels={"gpu": "bad"}), NodeHealth(fault="label gpu=bad")),
        (node(labels={"gpu": "good"}, taints=("example.com/other",)), NodeHealth()),
    ],
)
def test_health_is_read_from_conditions_taints_and_labels(found: dict[str, Any], health: NodeHealth) -> None:
    assert health_of(found, SIGNS) == health


def test_without_signs_a_node_is_only_ready_or_not() -> None:
    assert health_of(node({"GPUMissing": "True", "Ready": "True"}), Signs()) == NodeHealth()


@pytest.mark.parametrize("text", ["GPUMissing", "=True", ""])
def test_a_sign_that_is_no_pair_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="TYPE=STATUS"):
        parse_signs([text], [], [])


def entry(name: str, class_: str = "Hardware", age: int = 10, lasts: int = 60) -> ExcludedNode:
    since = NOW - timedelta(seconds=age)
    return ExcludedNode.model_validate(
        {
            "node": name,
            "class": class_,
            "since": stamp(since),
            "until": stamp(since + timedelta(seconds=lasts)),
        }
    )


@pytest.mark.parametrize(
    ("own", "others", "nodes", "most", "expected"),
    [
        ([], [], {}, 5, []),
        ([entry("a", "Unknown")], [], {}, 5, ["a"]),
        ([], [entry("a")], {}, 5, ["a"]),
        ([], [entry("a", "Unknown"), entry("b", "Infrastructure")], {}, 5, []),
        ([entry("a", age=60)], [], {}, 5, []),
        ([entry("a"), entry("b", age=20)], [entry("a")], {}, 5, ["b", "a"]),
        ([entry("a"), entry("b", age=20)], [], {}, 1, ["b"]),
        ([entry("a")], [], {"z": NodeHealth(fault="x"), "y": GONE, "x": NodeHealth()}, 5, ["z", "a"]),
        ([entry("a")], [], {}, 0, []),
    ],
)
def test_nodes_are_left_out_until_they_expire_within_a_cap_and_for_all_jobs_if_their_hardware_failed(
    own: list[ExcludedNode],
    others: list[ExcludedNode],
    nodes: dict[str, NodeHealth],
    most: int,
    expected: list[str],
) -> None:
    assert left_out(own, others, nodes, most, NOW) == expected


def field(name: str) -> dict[str, Any]:
    return {"key": "metadata.name", "operator": "NotIn", "values": [name]}


def required(*terms: dict[str, Any]) -> dict[str, Any]:
    return {
        "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [*terms]}}
    }


EXPRESSION = {"key": "zone", "operator": "In", "values": ["a"]}


@pytest.mark.parametrize(
    ("affinity", "names", "expected"),
    [
        (None, [], {}),
        (None, ["a", "b"], required({"matchFields": [field("a"), field("b")]})),
        ({"podAffinity": {}}, ["a"], {"podAffinity": {}} | required({"matchFields": [field("a")]})),
        (
            required({"matchExpressions": [EXPRESSION]}, {"matchFields": [field("z")]}),
            ["a"],
            required(
                {"matchExpressions": [EXPRESSION], "matchFields": [field("a")]},
                {"matchFields": [field("z"), field("a")]},
            ),
        ),
    ],
)
def test_a_pod_is_kept_off_nodes_whatever_affinity_it_has(
    affinity: dict[str, Any] | None, names: list[str], expected: dict[str, Any]
) -> None:
    assert keep_off(affinity, names) == expected
