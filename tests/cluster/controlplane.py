"""The control plane of a test cluster: etcd, API server, controllers, scheduler; and MinIO and DNS."""

from __future__ import annotations

import json
import os
import secrets
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.network import Switch
from cluster.pki import Authority
from cluster.state import State

API_PORT = 6443
S3_PORT = 9000
BUCKET = "internlm"
# Gang scheduling by PodGroup is native, but not yet on by default.
# Every request of these namespaces' accounts is in logs/audit.log, by which a test holds rights against use.
AUDITED_NAMESPACES = ("rights-test",)
FEATURES = "--feature-gates=GenericWorkload=true"


@dataclass(frozen=True)
class S3:
    """An S3 endpoint with path-style addressing, reachable from pods and from this machine."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str

    def environment(self) -> dict[str, str]:
        """The variables that botocore, s3fs and the AWS command line read."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }


DNS_CONFIG = """\
cluster.local:53 {{
    bind {address}
    errors
    kubernetes {{
        kubeconfig {kubeconfig}
        ttl 1
    }}
}}
.:53 {{
    bind {address}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
}}
"""


class ControlPlane:
    """Starts the components into a State: behind the switch, or on this machine's loopback without nodes."""

    def __init__(self, state: State, programs: dict[str, Path], switch: Switch) -> None:
        self.state = state
        self.programs = programs
        self.switch = switch
        self.authority = Authority(state.root / "pki")
        self.server = f"https://{state.address}:{API_PORT}"
        self.etcd = f"http://{'127.0.0.1' if state.nodes else state.address}:2379"

    @property
    def prefix(self) -> list[str]:
        """Puts a command into the right network namespace."""
        return self.switch.prefix if self.state.nodes else []

    def create_identities(self) -> None:
        self.authority.create(self.state.address, service_address(self.state, 1))
        self.authority.identity("kubelet-client", "kube-apiserver-kubelet-client", "system:masters")
        self.add_identity("admin", "admin", "system:masters")
        self.add_identity("controller-manager", "system:kube-controller-manager")
        self.add_identity("scheduler", "system:kube-scheduler")

    def add_identity(self, name: str, user: str, group: str = "") -> Path:
        """Make a kubeconfig for this user of the API server."""
        return self.authority.kubeconfig(self.kubeconfig(name), self.server, name, user, group)

    def kubeconfig(self, name: str) -> Path:
        return self.state.root / "kubeconfig" / name

    @property
    def audit_log(self) -> Path:
        return self.state.root / "logs" / "audit.log"

    def start(self) -> None:
        """Start everything and return once the API server answers; the rest follows in a second or two."""
        self.start_s3()
        self._kubernetes(
            "etcd",
            f"-data-dir={self.state.root / 'etcd'}",
            f"-client-url={self.etcd}",
            f"-peer-url={self.etcd.replace('2379', '2380')}",
        )
        self._start_apiserver()
        self.wait_ready()
        self._kubernetes(
            "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig('controller-manager')}",
            f"--root-ca-file={self.authority.certificate}",
            f"--service-account-private-key-file={self.authority.folder / 'tokens.key'}",
            "--use-service-account-credentials",
            "--leader-elect=false",
            "--secure-port=0",
            # Tests without nodes bind pods to one that is not there; its pods would be removed every minute.
            *([] if self.state.nodes else ["--controllers=*,-pod-garbage-collector-controller"]),
            # The default, 20 requests a second, makes its start alone take 5 seconds.
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
            # Tests of lost nodes should not wait out production's 50 seconds. Kubelets report every 2.
            "--node-monitor-period=1s",
            "--node-monitor-grace-period=10s",
            FEATURES,
        )
        self._kubernetes(
            "kube-scheduler",
            f"--kubeconfig={self.kubeconfig('scheduler')}",
            "--kube-api-qps=500",
            "--kube-api-burst=1000",
            "--leader-elect=false",
            "--secure-port=0",
            FEATURES,
        )

    def _start_apiserver(self) -> None:
        pki, address = self.authority.folder, self.state.address
        if self.state.nodes:
            endpoint = [f"--advertise-address={address}"]
        else:
            # Endpoints refuse loopback addresses; without nodes nobody would use them anyway.
            endpoint = [f"--advertise-address={self.state.network}.0.2", "--endpoint-reconciler-type=none"]
        audit = self.state.root / "audit-policy.yaml"
        groups = [f"system:serviceaccounts:{namespace}" for namespace in AUDITED_NAMESPACES]
        rules = [
            {"level": "Metadata", "userGroups": groups, "omitStages": ["RequestReceived"]},
            {"level": "None"},
        ]
        audit.write_text(json.dumps({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": rules}))
        self._kubernetes(
            "kube-apiserver",
            f"--etcd-servers={self.etcd}",
            f"--bind-address={address}",
            f"--secure-port={API_PORT}",
            *endpoint,
            f"--service-cluster-ip-range={self.state.network}.128.0/17",
            f"--tls-cert-file={pki / 'apiserver.crt'}",
            f"--tls-private-key-file={pki / 'apiserver.key'}",
            f"--client-ca-file={self.authority.certificate}",
            f"--kubelet-client-certificate={pki / 'kubelet-client.crt'}",
            f"--kubelet-client-key={pki / 'kubelet-client.key'}",
            "--kubelet-preferred-address-types=InternalIP",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            f"--service-account-key-file={pki / 'tokens.key'}",
            f"--service-account-signing-key-file={pki / 'tokens.key'}",
            "--authorization-mode=Node,RBAC",
            # PodSecurity is on by default; the other one asks more of whoever sets blockOwnerDeletion.
            "--enable-admission-plugins=NodeRestriction,OwnerReferencesPermissionEnforcement",
            f"--audit-policy-file={audit}",
            f"--audit-log-path={self.audit_log}",
            "--allow-privileged",
            "--runtime-config=scheduling.k8s.io/v1beta1=true",
            FEATURES,
        )

    def start_s3(self) -> None:
        state, address = self.state, f"{self.state.address}:{S3_PORT}"
        s3 = S3(f"http://{address}", secrets.token_hex(8), secrets.token_urlsafe(24), BUCKET)
        for file, text in {
            "s3.json": json.dumps(s3.__dict__),
            "s3.env": "".join(f"export {key}={value}\n" for key, value in s3.environment().items()),
        }.items():
            (state.root / file).touch(mode=0o600)
            (state.root / file).write_text(text)
        # MinIO takes each folder of its drive for a bucket.
        (state.root / "s3" / BUCKET).mkdir(parents=True)
        flags = ["--quiet", f"--address={address}", f"--console-address={state.address}:{S3_PORT + 1}"]
        state.start(
            "minio",
            [*self.prefix, self.programs["minio"], "server", *flags, state.root / "s3"],
            {
                "MINIO_ROOT_USER": s3.access_key,
                "MINIO_ROOT_PASSWORD": s3.secret_key,
                "MINIO_BROWSER": "off",
                "MINIO_UPDATE": "off",
            },
        )

    def start_dns(self) -> None:
        """Start CoreDNS, which serves the cluster's names to pods and knows no others."""
        verbs = ["get", "list", "watch"]
        rules = [
            {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": verbs},
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": verbs},
        ]
        api, name = "rbac.authorization.k8s.io", {"name": "system:coredns"}
        common = {"apiVersion": f"{api}/v1", "metadata": name}
        subjects = [name | {"apiGroup": api, "kind": "User"}]
        self.apply(
            common | {"kind": "ClusterRole", "rules": rules},
            common
            | {"kind": "ClusterRoleBinding"}
            | {"roleRef": name | {"apiGroup": api, "kind": "ClusterRole"}, "subjects": subjects},
        )
        config = self.state.root / "Corefile"
        config.write_text(DNS_CONFIG.format(address=self.state.address, kubeconfig=self.kubeconfig("dns")))
        self.state.start("coredns", [*self.prefix, self.programs["coredns"], "-conf", config])

    def _kubernetes(self, program: str, *flags: str) -> None:
        self.state.start(program, [*self.prefix, self.programs["kubernetes"], program, *flags])

    def wait_ready(self, timeout: float = 60) -> None:
        certificate, key = self.authority.identity("admin", "admin", "system:masters")
        context = ssl.create_default_context(cafile=str(self.authority.certificate))
        context.load_cert_chain(certificate, key)
        # Straight to the address: an HTTP proxy of the developer's does not know it.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )

        def ready() -> bool:
            for name in ("etcd", "kube-apiserver"):
                if not self.state.daemons[name].alive():
                    raise RuntimeError(f"{name} ended:\n{self.state.tail(name)}")
            try:
                with opener.open(f"{self.server}/readyz", timeout=5) as answer:
                    return bool(answer.status == 200)
            except (urllib.error.URLError, OSError):
                return False

        wait_until(ready, "the API server to be ready", timeout, interval=0.05)

    def kubectl(self, *arguments: str, input: str | None = None, check: bool = True) -> str:  # noqa: A002
        """Run kubectl as admin; returns what it prints, RuntimeError with its complaint when it fails."""
        environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
        environment |= {"KUBECONFIG": str(self.kubeconfig("admin"))}
        done = subprocess.run(
            [str(self.programs["kubernetes"]), "kubectl", *arguments],
            input=input,
            env=environment,
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def apply(self, *manifests: object) -> None:
        items = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
        self.kubectl("apply", "--filename=-", input=json.dumps(items))


def service_address(state: State, index: int) -> str:
    return f"{state.network}.128.{index}"


def wait_until(condition: Callable[[], object], what: str, timeout: float, interval: float = 0.2) -> None:
    """Poll until the condition holds; TimeoutError that says what was waited for."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:.0f} s for {what}")
        time.sleep(interval)
