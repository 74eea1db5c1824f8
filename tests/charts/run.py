"""A whole run of an operator that the chart installed, on an API server without nodes: the test is the kubelet."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from cluster.cluster import Cluster
from cluster.controlplane import AUDITED_NAMESPACES, wait_until
from internlm_operator import api, crd, tls
from internlm_operator.objects import ATTEMPT_LABEL, JOB_LABEL, audience, report_path
from ports import free_port

[NAMESPACE] = AUDITED_NAMESPACES
JOB = "run"
SPEC: dict[str, Any] = {
    "nodes": 2,
    "model": {"layers": 2, "hiddenSize": 64, "heads": 4, "vocabSize": 512, "seqLen": 128},
    "data": {"tokenizer": "s3://b/t.model", "train": [{"path": "s3://b/train"}]},
    "training": {"steps": 400, "microBatchSize": 2},
    "checkpoint": {"path": "s3://b/checkpoints"},
    "recovery": {"podDisruptionBudget": True},
    "ttlSecondsAfterFinished": 0,
    "template": {"spec": {"schedulerName": "nobody"}},
}
TIMEOUT = 60


class Run:
    """The operator's process with the chart's account, roles and arguments, in a namespace of its own."""

    def __init__(
        self, cluster: Cluster, roles: list[dict[str, Any]], arguments: list[str], folder: Path
    ) -> None:
        self.cluster, self.roles = cluster, roles
        self.port, self.health = free_port(), free_port()
        # This machine's ports in the place of the container's, and less patience than in production.
        self.arguments = [*arguments, f"--channel-port={self.port}", f"--liveness={self.health}"]
        self.arguments += ["--lease-seconds=3", "--certificate-check-seconds=1"]
        self.log, self.kubeconfig = folder / "operator.log", folder / "kubeconfig"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        kubectl = self.cluster.kubectl
        kubectl("apply", "--filename=manifests/crd.yaml")
        kubectl("wait", "--for=condition=Established", f"crd/{crd.CRD_NAME}", "--timeout=30s")
        kubectl("create", "namespace", NAMESPACE)
        self.cluster.apply(*self.roles)
        account = ("get", "serviceaccount", "default", "--ignore-not-found", "--output=name")
        wait_until(lambda: self.kubectl(*account), "the default service account", TIMEOUT)
        admin = yaml.safe_load(self.cluster.kubeconfig.read_text())
        token = self.kubectl("create", "token", "internlm-operator").strip()
        admin["users"] = [{"name": user["name"], "user": {"token": token}} for user in admin["users"]]
        self.kubeconfig.write_text(yaml.safe_dump(admin))
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        command = [sys.executable, "-c", "from internlm_operator.cli import main; main()", *self.arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment | {"KUBECONFIG": str(self.kubeconfig)}, stdout=log, stderr=log
            )
        return self

    def __exit__(
        self, type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=TIMEOUT)
        self.cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
        roles = {"apiVersion": "v1", "kind": "List", "items": self.roles}
        self.cluster.kubectl("delete", "--filename=-", "--ignore-not-found", input=json.dumps(roles))

    def everything(self) -> None:
        """A job from its creation over a report, a failure and a restart to its end and deletion, and a rotation."""
        self.apply({"apiVersion": api.API_VERSION, "kind": api.KIND, "metadata": {"name": JOB}, "spec": SPEC})
        pods = self.gang(1)
        for pod in pods:
            self.start(pod)
        self.wait(lambda: self.job()["status"]["phase"] == "Running", "the job to run")
        report = {"attempt": 1, "step": 5, "totalSteps": 400}
        assert self.report(pods[0], report) == 200
        # A pod that the operator's cache does not have among this job's is asked for.
        container = {"name": "other", "image": "other:1"}
        other = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "other"}}
        self.apply(other | {"spec": {"schedulerName": "nobody", "containers": [container]}})
        assert self.report("other", report) == 403
        self.end(pods[1], 137)
        for pod in self.gang(2):
            self.start(pod)
            self.end(pod, 0)
        self.wait(lambda: not self.kubectl("get", "ilj", JOB, "--ignore-not-found"), "the job to be deleted")
        self.rotate()

    def rotate(self) -> None:
        """Let the authority grow old: the operator makes its successor."""
        name = "internlm-operator-channel"
        old = tls.new_authority(datetime.now(UTC) - timedelta(days=tls.AUTHORITY_DAYS - 30))
        data = {"tls.crt": old.certificate_pem, "tls.key": old.key_pem, "ca.crt": old.certificate_pem}
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "type": "kubernetes.io/tls",
                "metadata": {"name": name},
                "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
            }
        )

        def renewed() -> bool:
            secret = json.loads(self.kubectl("get", "secret", name, "--output=json"))
            return "successor.crt" in secret["data"]

        self.wait(renewed, "the authority's successor")

    # The administrator and the kubelet

    def kubectl(self, *arguments: str, manifest: object = None) -> str:
        text = None if manifest is None else json.dumps(manifest)
        return self.cluster.kubectl(f"--namespace={NAMESPACE}", *arguments, input=text)

    def apply(self, manifest: dict[str, Any]) -> None:
        self.kubectl("apply", "--filename=-", manifest=manifest)

    def job(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.kubectl("get", "ilj", JOB, "--output=json"))
        return found

    def wait(self, condition: Callable[[], object], what: str) -> None:
        try:
            wait_until(condition, what, TIMEOUT)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.log.read_text()[-3000:]}") from error

    def gang(self, attempt: int) -> list[str]:
        """Names of the attempt's pods, once they are there; those of earlier ones end as by their kubelet."""
        found: dict[str, str] = {}

        def formed() -> bool:
            pods = json.loads(self.kubectl("get", "pods", f"--selector={JOB_LABEL}={JOB}", "--output=json"))[
                "items"
            ]
            found.clear()
            found.update({pod["metadata"]["name"]: pod["metadata"]["labels"][ATTEMPT_LABEL] for pod in pods})
            for pod in pods:
                if "deletionTimestamp" in pod["metadata"]:
                    self.kubectl("delete", "pod", pod["metadata"]["name"], "--force", "--grace-period=0")
            return list(found.values()) == [str(attempt)] * SPEC["nodes"]

        self.wait(formed, f"attempt {attempt}")
        return sorted(found)

    def start(self, pod: str) -> None:
        target = {"apiVersion": "v1", "kind": "Node", "name": "fake"}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod}, "target": target}
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/binding"
        self.kubectl("create", f"--raw={path}", "--filename=-", manifest=binding)
        self._set(pod, "Running", {"running": {"startedAt": "2026-01-01T00:00:00Z"}})

    def end(self, pod: str, code: int) -> None:
        state = {
            "exitCode": code,
            "reason": "Error" if code else "Completed",
            "finishedAt": "2026-01-01T00:00:01Z",
        }
        self._set(pod, "Failed" if code else "Succeeded", {"terminated": state})

    def _set(self, pod: str, phase: str, state: dict[str, Any]) -> None:
        container = {"name": "trainer", "image": "x", "imageID": "x", "ready": False, "restartCount": 0}
        patch = json.dumps({"status": {"phase": phase, "containerStatuses": [container | {"state": state}]}})
        self.kubectl("patch", "pod", pod, "--subresource=status", "--type=merge", "--patch", patch)

    # The trainer

    def report(self, pod: str, content: dict[str, Any]) -> int:
        """The channel's answer to a report with the pod's token, by the name of the chart's Service."""
        uid = self.kubectl("get", "pod", pod, "--output=jsonpath={.metadata.uid}")
        bound = ("--bound-object-kind=Pod", f"--bound-object-name={pod}", f"--bound-object-uid={uid}")
        token = self.kubectl(
            "create", "token", "default", f"--audience={audience(NAMESPACE, JOB)}", *bound
        ).strip()
        data = json.loads(self.kubectl("get", "configmap", f"{JOB}-config", "--output=json"))["data"]
        context = ssl.create_default_context(cadata=data["ca.crt"])
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=30, context=context)
        connection.sock = context.wrap_socket(
            socket.create_connection(("127.0.0.1", self.port), timeout=30),
            server_hostname=f"internlm-operator.{NAMESPACE}.svc",
        )
        try:
            headers = {"Authorization": f"Bearer {token}"}
            connection.request("POST", report_path(NAMESPACE, JOB), json.dumps(content), headers)
            return connection.getresponse().status
        finally:
            connection.close()
