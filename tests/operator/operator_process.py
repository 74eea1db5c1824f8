"""The operator's process, and a namespace in which a test is the administrator and the kubelet."""

from __future__ import annotations

import copy
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kubernetes import client
from operator_world import SPEC, make_report

from cluster.controlplane import wait_until
from internlm_operator import api, objects
from ports import free_port

NAMESPACE = "operator-test"
TIMEOUT = 60


class Process:
    """`internlm-operator run`, as the service account `operator`."""

    def __init__(self, folder: Path, kubeconfig: Path, lease_seconds: int = 3) -> None:
        self.log = folder / "operator.log"
        self.kubeconfig = kubeconfig
        self.lease_seconds = lease_seconds
        self.port, self.health = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
        command = [sys.executable, "-c", "from internlm_operator.cli import main; main()", "run"]
        command += [
            f"--namespace={NAMESPACE}",
            "--trainer-image=trainer:1",
            f"--service-namespace={NAMESPACE}",
        ]
        command += ["--node-condition=GPUMissing=True"]
        command += [f"--channel-port={self.port}", f"--liveness={self.health}"]
        command += [f"--lease-seconds={self.lease_seconds}", "--certificate-check-seconds=1"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment | {"KUBECONFIG": str(self.kubeconfig)}, stdout=log, stderr=log
            )
        wait_until(lambda: self.get("/readyz") == 200, "the operator to be ready", TIMEOUT)

    def get(self, path: str) -> int:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        connection = http.client.HTTPConnection("127.0.0.1", self.health, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """All samples: `name{label="value",...}` with its value."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.health}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    @property
    def leads(self) -> bool:
        return self.metrics().get("internlm_operator_leader") == 1

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=TIMEOUT)


class Here:
    """The namespace, seen by its administrator, who is the kubelet too."""

    def __init__(self, connection: client.ApiClient, operator: Process) -> None:
        self.core = client.CoreV1Api(connection)
        self.custom = client.CustomObjectsApi(connection)
        self.operator = operator

    def create(self, name: str, **spec: Any) -> None:
        template = {"spec": {"schedulerName": "nobody"}}
        body = {
            "apiVersion": api.API_VERSION,
            "kind": api.KIND,
            "metadata": {"name": name},
            "spec": copy.deepcopy(SPEC) | {"template": template} | spec,
        }
        self.custom.create_namespaced_custom_object(api.GROUP, api.VERSION, NAMESPACE, api.PLURAL, body)

    def job(self, name: str) -> dict[str, Any]:
        found = self.custom.get_namespaced_custom_object(api.GROUP, api.VERSION, NAMESPACE, api.PLURAL, name)
        assert isinstance(found, dict)
        return found

    def status(self, name: str) -> dict[str, Any]:
        return self.job(name).get("status") or {}

    def condition(self, name: str, type: str) -> dict[str, Any]:
        conditions = self.status(name).get("conditions") or []
        return next((condition for condition in conditions if condition["type"] == type), {})

    def edit(self, name: str, **spec: Any) -> None:
        self.custom.patch_namespaced_custom_object(
            api.GROUP, api.VERSION, NAMESPACE, api.PLURAL, name, {"spec": spec}
        )

    def delete(self, name: str) -> None:
        self.custom.delete_namespaced_custom_object(api.GROUP, api.VERSION, NAMESPACE, api.PLURAL, name)

    def wait_phase(self, name: str, phase: str) -> dict[str, Any]:
        self.wait(lambda: self.status(name).get("phase") == phase, f"{name} to be {phase}", name)
        return self.status(name)

    def wait(self, condition: Callable[[], object], what: str, name: str) -> None:
        try:
            wait_until(condition, what, TIMEOUT, interval=0.1)
        except TimeoutError as error:
            tail = self.operator.log.read_text()[-3000:]
            raise AssertionError(f"{error}\n{json.dumps(self.status(name), indent=1)}\n{tail}") from error

    def pods(self, name: str) -> dict[str, Any]:
        selector = f"{objects.JOB_LABEL}={name}"
        found = self.core.list_namespaced_pod(NAMESPACE, label_selector=selector).items
        return {pod.metadata.name: pod for pod in found}

    def kept_off(self, name: str) -> list[str]:
        """Nodes that the job's worker 0 may not use."""
        spec = self.core.read_namespaced_pod(f"{name}-worker-0", NAMESPACE).spec
        if spec.affinity is None:
            return []
        required = spec.affinity.node_affinity.required_during_scheduling_ignored_during_execution
        fields = required.node_selector_terms[0].match_fields
        return [node for field in fields for node in field.values]

    def wait_gang(self, name: str, attempt: int, nodes: int = 2) -> list[str]:
        def formed() -> bool:
            pods = self.pods(name).values()
            labels = [pod.metadata.labels[objects.ATTEMPT_LABEL] for pod in pods]
            return labels == [str(attempt)] * nodes

        self.wait(formed, f"attempt {attempt} of {name}", name)
        return sorted(self.pods(name))

    def run(self, *pods: str) -> None:
        for pod in pods:
            binding = {
                "metadata": {"name": pod},
                "target": {"apiVersion": "v1", "kind": "Node", "name": "fake"},
            }
            try:
                self.core.create_namespaced_pod_binding(pod, NAMESPACE, binding, _preload_content=False)
            except client.ApiException as error:
                if error.status != 409:  # bound already
                    raise
            self._set(pod, "Running", {"running": {"startedAt": "2026-01-01T00:00:00Z"}})

    def end(self, pod: str, code: int, text: str = "") -> None:
        state = {"exitCode": code, "reason": "Completed" if code == 0 else "Error", "message": text}
        state["finishedAt"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._set(pod, "Failed" if code else "Succeeded", {"terminated": state})

    def _set(self, pod: str, phase: str, state: dict[str, Any]) -> None:
        container = {"name": "trainer", "image": "x", "imageID": "x", "ready": False, "restartCount": 0}
        status = {"phase": phase, "containerStatuses": [container | {"state": state}]}
        self.core.patch_namespaced_pod_status(pod, NAMESPACE, {"status": status})

    def reap(self, name: str) -> None:
        """End the pods that are being deleted, as their kubelet would."""
        for pod in self.pods(name).values():
            if not pod.metadata.deletion_timestamp:
                continue
            try:
                self.core.delete_namespaced_pod(pod.metadata.name, NAMESPACE, grace_period_seconds=0)
            except client.ApiException as error:
                if error.status != 404:  # gone since it was listed
                    raise

    def wait_reaped(self, name: str, attempt: int) -> None:
        """Reap until no pod of this attempt is left."""

        def gone() -> bool:
            self.reap(name)
            pods = self.pods(name).values()
            return all(pod.metadata.labels[objects.ATTEMPT_LABEL] != str(attempt) for pod in pods)

        self.wait(gone, f"attempt {attempt} of {name} to be gone", name)

    def start(self, name: str, **spec: Any) -> list[str]:
        self.create(name, **spec)
        pods = self.wait_gang(name, 1, spec.get("nodes", 2))
        self.run(*pods)
        self.wait_phase(name, "Running")
        return pods

    def events(self, name: str) -> dict[str, str]:
        found = self.core.list_namespaced_event(NAMESPACE, field_selector=f"involvedObject.name={name}").items
        return {event.reason: event.message for event in found}

    # The trainer's side of the job channel

    def token(self, pod: str, audience: str, bound: bool = True) -> str:
        reference = None
        if bound:
            uid = self.core.read_namespaced_pod(pod, NAMESPACE).metadata.uid
            reference = client.V1BoundObjectReference(api_version="v1", kind="Pod", name=pod, uid=uid)
        spec = client.V1TokenRequestSpec(audiences=[audience], bound_object_ref=reference)
        request = client.AuthenticationV1TokenRequest(spec=spec)
        answer = self.core.create_namespaced_service_account_token("default", NAMESPACE, request)
        return str(answer.status.token)

    def send(
        self, name: str, body: bytes, token: str | None, to: Process | None = None, path: str = ""
    ) -> tuple[int, dict[str, Any]]:
        """POST to a replica's channel as a pod would: by the service's name, trusting what the ConfigMap says."""
        port = (to or self.operator).port
        data = self.core.read_namespaced_config_map(f"{name}-config", NAMESPACE).data
        context = ssl.create_default_context(cadata=data["ca.crt"])
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, context=context)
        connection.sock = context.wrap_socket(
            socket.create_connection(("127.0.0.1", port), timeout=30),
            server_hostname=f"internlm-operator.{NAMESPACE}.svc",
        )
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        try:
            connection.request("POST", path or objects.report_path(NAMESPACE, name), body, headers)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def report(
        self, name: str, pod: str, to: Process | None = None, **fields: Any
    ) -> tuple[int, dict[str, Any]]:
        body = make_report(**fields).model_dump_json(by_alias=True).encode()
        return self.send(name, body, self.token(pod, objects.audience(NAMESPACE, name)), to)
