"""The chart's roles are what a run needs, no less and no more: the API server's audit log says what was called."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from charts.chart import pod_template, render
from charts.run import NAMESPACE, Run
from cluster.cluster import Cluster

pytestmark = pytest.mark.cluster

ACCOUNT = f"system:serviceaccount:{NAMESPACE}:internlm-operator"
ROLES = ("ServiceAccount", "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding")


class Right(NamedTuple):
    """What a rule gives, or a request used; an empty namespace is all of them, an empty name any."""

    namespace: str
    group: str
    resource: str
    name: str
    verb: str

    def covers(self, used: Right) -> bool:
        same = (self.group, self.resource, self.verb) == (used.group, used.resource, used.verb)
        return same and self.namespace in ("", used.namespace) and self.name in ("", used.name)


# Looked for by the admission plugin OwnerReferencesPermissionEnforcement, which this API server runs: without it, the
# operator's pods were refused. It is no request, and so in no log.
UNASKED = Right(NAMESPACE, "training.internlm.io", "internlmjobs/finalizers", "", "update")


def given(objects: list[dict[str, Any]]) -> Iterator[Right]:
    """The rights of the roles that are bound to the operator's account."""
    bound = {
        (o["roleRef"]["kind"], o["roleRef"]["name"]) for o in objects if o["kind"].endswith("RoleBinding")
    }
    for role in objects:
        if (role["kind"], role["metadata"]["name"]) not in bound:
            continue
        for rule in role["rules"]:
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    for name in rule.get("resourceNames", [""]):
                        for verb in rule["verbs"]:
                            yield Right(role["metadata"].get("namespace", ""), group, resource, name, verb)


def used(log: Path) -> Iterator[tuple[Right, int]]:
    """(what was asked, HTTP code) of each request of the operator's that is about a resource."""
    for line in log.read_text().splitlines():
        event = json.loads(line)
        if event["user"]["username"] != ACCOUNT or "resource" not in event.get("objectRef", {}):
            continue
        about, code = event["objectRef"], event["responseStatus"]["code"]
        resource = "/".join(filter(None, (about["resource"], about.get("subresource"))))
        right = Right(
            about.get("namespace", ""),
            about.get("apiGroup", ""),
            resource,
            about.get("name", ""),
            event["verb"],
        )
        yield right, code
        if (right.verb, code) == ("patch", 201):  # a server-side apply that creates needs both
            yield right._replace(verb="create", name=""), code


def test_a_run_uses_every_right_of_the_chart_and_needs_no_other(
    control_plane: Cluster, helm: str, tmp_path: Path
) -> None:
    made = render(helm, f"--set=watchNamespaces={{{NAMESPACE}}}", namespace=NAMESPACE)
    roles = [o for o in made if o["kind"] in ROLES]
    [container] = pod_template(made)["spec"]["containers"]
    with Run(control_plane, roles, container["args"], tmp_path) as run:
        run.everything()
    asked = list(used(control_plane.control_plane.audit_log))
    refused = sorted({right for right, code in asked if code == 403})
    assert not refused, "the chart gives too little"
    rights = set(given(roles))
    assert rights
    unused = {right for right in rights if not any(right.covers(one) for one, _ in asked)}
    assert unused == {UNASKED}, "the chart gives more than a run uses"
    # The other way, without the API server's word for it.
    assert not [one for one, _ in asked if not any(right.covers(one) for right in rights)]
