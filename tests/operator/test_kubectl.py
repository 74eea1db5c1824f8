"""`kubectl internlm` on a real API server, by a user who may only look; the test is the kubelet that has the logs."""

from __future__ import annotations

import http.server
import json
import os
import ssl
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from operator_world import SETTINGS, SPEC
from typer.testing import CliRunner

from cluster.cluster import Cluster
from cluster.controlplane import wait_until
from internlm_operator import api, crd, objects, tls
from internlm_operator.kubectl import cli
from internlm_operator.kubectl.access import AccessError
from internlm_operator.manifest import parse_job

pytestmark = pytest.mark.cluster

NAMESPACE, NODE = "kubectl-test", "kubectl-test-node"
LOGS = {
    "hurt-worker-0": ["step 1", "step 2", "lost worker 1"],
    "hurt-worker-1": ["step 1", "key hunter2-hunter2", "CUDA error: Xid 79"],
}


class Kubelet(http.server.BaseHTTPRequestHandler):
    """The part of a kubelet that has logs."""

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        _, kind, namespace, pod, container = path.path.split("/")
        assert (kind, namespace, container) == ("containerLogs", NAMESPACE, "trainer")
        tail = parse_qs(path.query).get("tailLines", ["1000"])[0]
        self.send_response(200)
        self.end_headers()
        self.wfile.write("".join(f"{line}\n" for line in LOGS[pod][-int(tail) :]).encode())

    def log_message(self, *_: Any) -> None:
        pass


@dataclass
class Plugin:
    kubeconfig: Path

    def __call__(self, command: str, *arguments: str) -> str:
        place = (f"--kubeconfig={self.kubeconfig}", f"--namespace={NAMESPACE}")
        done = CliRunner().invoke(cli.app, [command, *arguments, *place], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output


@pytest.fixture(scope="module")
def kubelet(control_plane: Cluster) -> Iterator[int]:
    """Serves logs where pods' nodes are; gives the port."""
    authority = tls.new_authority(datetime.now(UTC))
    server = http.server.ThreadingHTTPServer((control_plane.host, 0), Kubelet)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load(context, tls.new_server(authority, [NODE], datetime.now(UTC)))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield int(server.server_address[1])
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def plugin(control_plane: Cluster, kubelet: int) -> Iterator[Plugin]:
    """A job whose worker 1 failed, its pods on a node of this test's, and a user with the role `view`."""
    cluster = control_plane
    cluster.kubectl("apply", "--filename=manifests/crd.yaml")
    cluster.kubectl("wait", "--for=condition=Established", f"crd/{crd.CRD_NAME}", "--timeout=30s")
    cluster.kubectl("create", "namespace", NAMESPACE)
    install = Path("manifests/install.yaml").read_text()
    roles = [
        o
        for o in yaml.safe_load_all(install)
        if "rbac.authorization.k8s.io/aggregate" in json.dumps(o["metadata"])
    ]
    cluster.apply(*roles, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
    status: Any = {
        "addresses": [{"type": "InternalIP", "address": cluster.host}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": kubelet}},
    }
    patch = ("--subresource=status", "--type=merge", "--patch")
    cluster.kubectl("patch", "node", NODE, *patch, json.dumps({"status": status}))
    environment = [{"name": "MY_KEY", "value": "hunter2-hunter2"}]
    template = {"spec": {"nodeName": NODE, "containers": [{"name": "trainer", "env": environment}]}}
    job = {
        "apiVersion": api.API_VERSION,
        "kind": api.KIND,
        "metadata": {"name": "hurt", "namespace": NAMESPACE},
    }
    cluster.apply(job | {"spec": SPEC | {"template": template}})
    failure = {
        "attempt": 1,
        "reason": "Error",
        "message": "CUDA error: Xid 79",
        "pod": "hurt-worker-1",
        "exitCode": 134,
    }
    attempts = [
        {
            "number": 1,
            "startTime": "2026-01-01T00:00:00Z",
            "endTime": "2026-01-01T01:00:00Z",
            "reason": "Error",
        }
    ]
    failed = {"type": "Failed", "status": "True", "reason": "Error", "message": "CUDA error: Xid 79"}
    failed["lastTransitionTime"] = "2026-01-01T01:00:00Z"
    status = {"phase": "Failed", "conditions": [failed], "attempts": attempts, "lastFailure": failure}
    cluster.kubectl(
        "patch", "ilj", "hurt", f"--namespace={NAMESPACE}", *patch, json.dumps({"status": status})
    )
    made = json.loads(cluster.kubectl("get", "ilj", "hurt", f"--namespace={NAMESPACE}", "--output=json"))
    account = (
        "get",
        "serviceaccount",
        "default",
        f"--namespace={NAMESPACE}",
        "--ignore-not-found",
        "--output=name",
    )
    wait_until(lambda: cluster.kubectl(*account), "the default service account", 60)
    cluster.apply(*(objects.worker_pod(made, parse_job(made).spec, 1, index, SETTINGS) for index in (0, 1)))
    cluster.kubectl(
        "create", "rolebinding", "watcher", "--clusterrole=view", "--user=watcher", f"--namespace={NAMESPACE}"
    )
    yield Plugin(cluster.control_plane.add_identity("watcher", "watcher"))
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
    cluster.kubectl("delete", "pods", "--all", f"--namespace={NAMESPACE}", "--force", "--grace-period=0")
    cluster.kubectl("delete", "node", NODE)
    cluster.kubectl("delete", "clusterroles", *(role["metadata"]["name"] for role in roles))


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if "proxy" in name.lower():
            monkeypatch.delenv(name)


def test_top_prints_a_line_a_job(plugin: Plugin) -> None:
    def line() -> list[str]:
        return next(line for line in plugin("top").splitlines() if line.startswith("hurt")).split()

    assert line()[:2] == ["hurt", "Failed"]
    assert line()[-4:] == ["CUDA", "error:", "Xid", "79"]


def test_describe_tells_what_failed(plugin: Plugin) -> None:
    text = plugin("describe", "hurt")
    for part in ("Error: CUDA error: Xid 79", "hurt-worker-1", "134", "━"):
        assert part in text


def test_logs_are_those_of_the_worker_that_failed_first(plugin: Plugin) -> None:
    lines = plugin("logs", "hurt").splitlines()
    lines.remove("hurt-worker-1 failed first: Error: CUDA error: Xid 79")  # on stderr
    assert lines == [f"[2-3] {line}" for line in LOGS["hurt-worker-1"]]
    assert plugin("logs", "hurt", "--worker=0", "--tail=1").splitlines() == ["[0-1] lost worker 1"]
    together = plugin("logs", "hurt", "--all", "--follow").splitlines()
    assert sorted(together) == sorted(
        f"[{2 * index}-{2 * index + 1}] {line}" for index in (0, 1) for line in LOGS[f"hurt-worker-{index}"]
    )


def test_checkpoint_asks_for_one_and_waits_until_it_is_there(plugin: Plugin, control_plane: Cluster) -> None:
    """The test is the operator, and the user one who may edit."""

    def kubectl(*arguments: str) -> str:
        return control_plane.kubectl(f"--namespace={NAMESPACE}", *arguments)

    def set_status(**status: Any) -> None:
        patch = json.dumps({"status": status})
        kubectl("patch", "ilj", "hurt", "--subresource=status", "--type=merge", "--patch", patch)

    editor = Plugin(control_plane.control_plane.add_identity("editor", "editor"))
    kubectl("create", "rolebinding", "editor", "--clusterrole=edit", "--user=editor")
    with pytest.raises(AccessError, match="hurt is Failed: only a job that runs"):
        editor("checkpoint", "hurt")
    set_status(phase="Running")
    with pytest.raises(AccessError, match='cannot patch resource "internlmjobs"'):
        plugin("checkpoint", "hurt")
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(editor, "checkpoint", "hurt")

        def asked() -> str:
            return kubectl("get", "ilj", "hurt", "--output=jsonpath={.metadata.annotations}")

        wait_until(lambda: "checkpoint-now" in asked(), "the annotation", 30)
        saved = {"step": 7, "uri": "s3://b/step-7", "time": "2026-01-01T00:30:00Z"}
        set_status(checkpoint=saved, checkpointRequest=json.loads(asked())[objects.CHECKPOINT_ANNOTATION])
        assert asking.result(timeout=30) == "hurt: checkpoint of step 7 at s3://b/step-7\n"
    set_status(phase="Failed")


def test_debug_packs_what_the_user_may_see_and_says_what_it_had_to_leave_out(
    plugin: Plugin, tmp_path: Path
) -> None:
    output = plugin("debug", "hurt", f"--output={tmp_path / 'x.tar.gz'}", "--operator-namespace=default")
    assert "left out: operator pods in default" in output
    with tarfile.open(tmp_path / "x.tar.gz") as tar:
        texts = {m.name.partition("/")[2]: tar.extractfile(m).read().decode() for m in tar}  # type: ignore[union-attr]
    assert {
        "job.yaml",
        "pods.yaml",
        "events.yaml",
        "logs/hurt-worker-0.log",
        "logs/hurt-worker-1.log",
    } <= texts.keys()
    assert "Xid 79" in texts["logs/hurt-worker-1.log"]
    assert "cannot list resource" in texts["missing.txt"]
    assert "hunter2" not in "".join(texts.values())
    assert [pod["metadata"]["name"] for pod in yaml.safe_load_all(texts["pods.yaml"])] == [
        "hurt-worker-0",
        "hurt-worker-1",
    ]


def test_kubectl_finds_the_plugin_and_mistakes_are_one_sentence(
    plugin: Plugin, control_plane: Cluster, tmp_path: Path
) -> None:
    script = tmp_path / "kubectl-internlm"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m internlm_operator.kubectl.cli "$@"\n')
    script.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "KUBECONFIG": str(plugin.kubeconfig),
    }
    kubectl = [str(control_plane.root / "bin" / "kubectl"), "internlm"]

    def run(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [*kubectl, *arguments], env=environment, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout, done.stderr

    assert run("describe", "nobody", "-n", NAMESPACE) == (
        1,
        "",
        'error: internlmjobs.training.internlm.io "nobody" not found\n',
    )
    code, _, said = run("top", "--all-namespaces")
    assert code == 1
    assert said.startswith("error: internlmjobs.training.internlm.io is forbidden")
    assert run("top", "--kubeconfig=/nowhere")[2].startswith("error: no usable kubeconfig")
