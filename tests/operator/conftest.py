"""Makes the helpers beside the tests importable, and installs an operator for those that need one running."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import config

from cluster.cluster import Cluster
from cluster.controlplane import wait_until
from internlm_operator import crd

sys.path.insert(0, str(Path(__file__).parent))

from operator_process import NAMESPACE, Here, Process

ROOT = Path(__file__).resolve().parents[2]


def installed_rules(*roles: str) -> list[dict[str, Any]]:
    """The access rules of these roles of the plain installation, which is made from the chart."""
    objects = yaml.safe_load_all((ROOT / "manifests" / "install.yaml").read_text())
    found = {o["metadata"]["name"]: o["rules"] for o in objects if o["kind"] in ("ClusterRole", "Role")}
    return [rule for role in roles for rule in found[f"internlm-operator-{role}"]]


@pytest.fixture(scope="session")
def here(control_plane: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    control_plane.kubectl("apply", "--filename=manifests/crd.yaml")
    control_plane.kubectl("wait", "--for=condition=Established", f"crd/{crd.CRD_NAME}", "--timeout=30s")
    subject = {"kind": "ServiceAccount", "name": "operator", "namespace": NAMESPACE}
    rbac = {"apiVersion": "rbac.authorization.k8s.io/v1"}

    def role(name: str, rules: list[Any], kind: str, where: dict[str, str]) -> list[dict[str, Any]]:
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name}
        return [
            rbac | {"kind": kind, "metadata": {"name": name, **where}, "rules": rules},
            rbac
            | {"kind": f"{kind}Binding", "metadata": {"name": name, **where}, "roleRef": reference}
            | {"subjects": [subject]},
        ]

    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    control_plane.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": restricted}},
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "operator", "namespace": NAMESPACE},
        },
        *role(f"{NAMESPACE}-jobs", installed_rules("jobs", "tokens"), "ClusterRole", {}),
        *role("own", installed_rules("certificate"), "Role", {"namespace": NAMESPACE}),
    )
    folder = tmp_path_factory.mktemp("operator")
    admin = yaml.safe_load(control_plane.kubeconfig.read_text())
    token = control_plane.kubectl("create", "token", "operator", f"--namespace={NAMESPACE}").strip()
    admin["users"] = [{"name": user["name"], "user": {"token": token}} for user in admin["users"]]
    (folder / "kubeconfig").write_text(yaml.safe_dump(admin))
    operator = Process(folder, folder / "kubeconfig")
    default = (
        "get",
        "serviceaccount",
        "default",
        f"--namespace={NAMESPACE}",
        "--ignore-not-found",
        "--output=name",
    )
    wait_until(lambda: control_plane.kubectl(*default), "the default service account", 60)
    # The API server learns of new roles a moment after they were made; an operator without rights ends.
    able = ("auth", "can-i", f"--namespace={NAMESPACE}", f"--as=system:serviceaccount:{NAMESPACE}:operator")
    for right in (("list", "internlmjobs.training.internlm.io"), ("create", "secrets")):
        wait_until(lambda: "yes" in control_plane.kubectl(*able, *right, check=False), " ".join(right), 30)  # noqa: B023
    operator.start()
    with config.new_client_from_config(str(control_plane.kubeconfig)) as connection:
        yield Here(connection, operator)
    code, log = operator.stop(), operator.log.read_text()
    control_plane.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
    assert code == 0, log[-3000:]
    assert "Traceback" not in log, log
    assert "cannot" not in log.lower().replace("cannot be", ""), "a right is missing"
