"""Who reaches a job's workers, and whom they reach: the NetworkPolicy, evaluated on connections that a run makes."""

from __future__ import annotations

from typing import Any

import pytest
from operator_world import SETTINGS, make_job

from internlm_operator import objects

OPERATOR = {"app.kubernetes.io/name": "internlm-operator"}
PROMETHEUS = {"app.kubernetes.io/name": "prometheus"}
ANY_NAMESPACE: dict[str, Any] = {"namespaceSelector": {}}
RULES = {
    "ingress": [
        {"from": [ANY_NAMESPACE | {"podSelector": {"matchLabels": PROMETHEUS}}], "ports": [{"port": 9464}]}
    ],
    "egress": [
        {"to": [ANY_NAMESPACE | {"podSelector": {"matchLabels": OPERATOR}}], "ports": [{"port": 8443}]},
        {"ports": [{"port": 53, "protocol": "UDP"}]},
    ],
}


def worker_labels(job_name: str) -> dict[str, str]:
    return {objects.JOB_LABEL: job_name}


def allows(policy: dict[str, Any], direction: str, peer: dict[str, str], own: bool, port: int) -> bool:
    """Whether the policy lets this peer in or out, as the API's reference says; `own`: of the job's namespace."""
    for rule in policy["spec"][direction]:
        ports = rule.get("ports")
        if ports and port not in {p["port"] for p in ports}:
            continue
        peers = rule.get("from" if direction == "ingress" else "to")
        if not peers:
            return True
        for selector in peers:
            labels = selector["podSelector"].get("matchLabels", {})
            if labels.items() <= peer.items() and (own or "namespaceSelector" in selector):
                return True
    return False


@pytest.mark.parametrize(
    ("direction", "peer", "own", "port", "allowed"),
    [
        ("ingress", worker_labels("job"), True, 29500, True),
        ("egress", worker_labels("job"), True, 41234, True),
        ("ingress", worker_labels("other"), True, 29500, False),
        ("egress", worker_labels("other"), True, 29500, False),
        ("ingress", worker_labels("job"), False, 29500, False),
        ("ingress", PROMETHEUS, False, 9464, True),
        ("ingress", PROMETHEUS, False, 29500, False),
        ("egress", OPERATOR, False, 8443, True),
        ("egress", OPERATOR, False, 8080, False),
        ("egress", {"k8s-app": "kube-dns"}, False, 53, True),
        ("egress", {}, True, 443, False),
    ],
)
def test_a_worker_reaches_its_gang_and_what_the_rules_name(
    direction: str, peer: dict[str, str], own: bool, port: int, allowed: bool
) -> None:
    policy = objects.network_policy(make_job(), RULES)
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert allows(policy, direction, peer, own, port) is allowed


def test_a_policy_is_made_only_when_the_operator_was_given_rules() -> None:
    def kinds(rules: dict[str, Any] | None) -> list[str]:
        settings = objects.Settings(SETTINGS.trainer_image, SETTINGS.channel_url, SETTINGS.channel_ca, rules)
        return [o["kind"] for o in objects.shared_objects(make_job(), settings)]

    assert kinds(None) == ["Service", "ConfigMap"]
    assert kinds({}) == ["Service", "ConfigMap", "NetworkPolicy"]
