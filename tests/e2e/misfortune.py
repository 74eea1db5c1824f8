"""Misfortune of the cluster's parts, for the tests of faults: operators, tokens, clocks, pods."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from cluster import binaries
from cluster.cluster import Cluster
from cluster.controlplane import wait_until

# Shifts the clock of a program that loads what is built from it.  libfaketime 0.9.10 makes Python's sleeps fail.
CLOCK = Path(__file__).with_name("clock.c")
COMPILER = {"gcc": "/usr/bin/gcc", "libc6-dev": "/usr/include/time.h"}
CLOCK_MAP, CLOCK_FOLDER = "clock", "/opt/clock"


@dataclass(frozen=True)
class Operators:
    """The operator's replicas."""

    cluster: Cluster
    namespace: str

    def kubectl(self, *arguments: str) -> str:
        return self.cluster.kubectl(f"--namespace={self.namespace}", *arguments)

    @property
    def leader(self) -> str:
        """Name of the pod that leads; empty while none does."""
        lease = json.loads(self.kubectl("get", "lease", "internlm-operator", "--output=json"))
        return str(lease["spec"].get("holderIdentity") or "").partition("_")[0]

    def wait_ready(self) -> None:
        """Until both replicas watch and one leads."""
        path = "--output=jsonpath={.status.readyReplicas}/{.status.updatedReplicas}/{.status.replicas}"
        wait_until(
            lambda: (
                self.kubectl("get", "deployment", "internlm-operator", path) == "2/2/2"
                and f"pod/{self.leader}" in self.kubectl("get", "pods", "--output=name").split()
            ),
            "both replicas to be ready",
            300,  # the kubelet lets a container wait that ends again and again
            interval=0.5,
        )

    def renew(self) -> None:
        """Put new replicas in the place of those that were killed, which their kubelets start again at once."""
        self.kubectl("rollout", "restart", "deployment/internlm-operator")
        self.kubectl("rollout", "status", "deployment/internlm-operator", "--timeout=120s")
        self.wait_ready()
        wait_until(lambda: len(self._pods()) == 2, "the old replicas to be gone", 60, interval=0.5)

    def kill_leader(self) -> float:
        """kill -9 the process that leads; seconds until another one does."""
        return self._kill([self.leader])

    def kill_all(self) -> float:
        """kill -9 the processes of all replicas; seconds until one leads."""
        return self._kill(self._pods())

    def _pods(self) -> list[str]:
        pods = self.kubectl("get", "pods", "--field-selector=status.phase=Running", "--output=name")
        return [pod.removeprefix("pod/") for pod in pods.split()]

    def _kill(self, pods: list[str]) -> float:
        lease = self._transitions()
        pids = [self.cluster.container_pids(self.namespace, pod, "operator")[0] for pod in pods]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        begun = time.time()
        wait_until(lambda: self._transitions() > lease, "another leader", 120, interval=0.5)
        return time.time() - begun

    def _transitions(self) -> int:
        path = "--output=jsonpath={.spec.leaseTransitions}"
        return int(self.kubectl("get", "lease", "internlm-operator", path))

    def shift_clock(self, seconds: int) -> None:
        """Both replicas start anew with a clock that is ahead by so much; 0 gives them their own back."""
        shift = clock_variables(seconds)
        container: dict[str, Any] = {"name": "operator"}
        volume: dict[str, Any] = {"name": CLOCK_MAP}
        mount: dict[str, Any] = {"mountPath": CLOCK_FOLDER}
        if seconds:
            share_clock(self.cluster, self.namespace)
            container |= {"env": shift, "volumeMounts": [mount | {"name": CLOCK_MAP, "readOnly": True}]}
            volume |= {"configMap": {"name": CLOCK_MAP}}
        else:
            container["env"] = [{"name": entry["name"], "$patch": "delete"} for entry in shift]
            container["volumeMounts"] = [mount | {"$patch": "delete"}]
            volume |= {"$patch": "delete"}
        patch = {"spec": {"template": {"spec": {"containers": [container], "volumes": [volume]}}}}
        self.kubectl("patch", "deployment", "internlm-operator", f"--patch={json.dumps(patch)}")
        self.kubectl("rollout", "status", "deployment/internlm-operator", "--timeout=120s")
        self.wait_ready()


def clock_variables(seconds: int) -> list[dict[str, Any]]:
    """Variables of a container whose clock is ahead by so much; it mounts CLOCK_MAP at CLOCK_FOLDER."""
    values = {"LD_PRELOAD": f"{CLOCK_FOLDER}/clock.so", "CLOCK_OFFSET": f"{seconds:+d}"}
    return [{"name": name, "value": value} for name, value in values.items()]


def share_clock(cluster: Cluster, namespace: str) -> None:
    """Offer the library that shifts clocks to a namespace's pods, as a ConfigMap."""
    binaries.install_packages(COMPILER, binaries.progress())
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "clock.so")
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", f"--output={library}", CLOCK], check=True)
        content = {library.name: base64.b64encode(library.read_bytes()).decode()}
    metadata = {"name": CLOCK_MAP, "namespace": namespace}
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "binaryData": content}
    cluster.kubectl("apply", "--server-side", "--filename=-", input=json.dumps(manifest))


def expire_token(cluster: Cluster, pod: dict[str, Any]) -> None:
    """Put an expired token in the place of the one that reports; the kubelet puts the right one back in a while.

    It is the pod's own, signed by the cluster's key, but for its end.
    """
    uid, node = pod["metadata"]["uid"], pod["spec"]["nodeName"]
    volumes = f"var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~projected"
    file = cluster.node_root(node) / volumes / "internlm-token" / "token"
    head, claims, _ = file.read_text().split(".")
    content = json.loads(base64.urlsafe_b64decode(claims + "==")) | {"exp": int(time.time()) - 60}
    signed = f"{head}.{_encode(json.dumps(content).encode())}"
    key = serialization.load_pem_private_key(cluster.token_key.read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    signature = key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
    file.write_text(f"{signed}.{_encode(signature)}")


def _encode(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
