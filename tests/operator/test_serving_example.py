"""The example that serves a model is one that a real API server takes, with the strictest Pod Security."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from cluster.cluster import Cluster

EXAMPLE = Path("manifests/examples/serve-lmdeploy.yaml")
NAMESPACE = "serving"


def test_the_serving_example_is_admitted(control_plane: Cluster) -> None:
    levels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    metadata: dict[str, Any] = {"name": NAMESPACE, "labels": levels}
    control_plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})
    common = ("--dry-run=server", f"--namespace={NAMESPACE}", "--validate=strict", "--warnings-as-errors")
    made = control_plane.kubectl("apply", *common, f"--filename={EXAMPLE}", "--output=name")
    assert made.split() == [
        f"{kind}/internlm-7b"
        for kind in ("persistentvolumeclaim", "deployment.apps", "service", "networkpolicy.networking.k8s.io")
    ]
    claim, deployment, service, _ = yaml.safe_load_all(EXAMPLE.read_text())
    template = deployment["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    pod["metadata"] = {**template["metadata"], "name": "served"}
    found = json.loads(
        control_plane.kubectl("create", *common, "--filename=-", "--output=json", input=json.dumps(pod))
    )
    assert service["spec"]["selector"].items() <= found["metadata"]["labels"].items()
    ports = [port["name"] for one in found["spec"]["containers"] for port in one["ports"]]
    assert service["spec"]["ports"][0]["targetPort"] in ports
    claims = [
        one["persistentVolumeClaim"]["claimName"]
        for one in found["spec"]["volumes"]
        if one["name"] == "models"
    ]
    assert claims == [claim["metadata"]["name"]]
