"""The test cluster itself: what the end-to-end tests rely on, and that nothing of it stays behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import images
from cluster.cluster import GPU, Cluster
from cluster.controlplane import wait_until

pytestmark = pytest.mark.cluster

SLEEP = "import signal; signal.sigwait([signal.SIGTERM])"
# Looks up the other pod, asks the API server as its service account, and the object storage for its health.
LOOK_AROUND = """
import os, socket, ssl, time, urllib.request
def retry(action):
    while True:
        try:
            return action()
        except OSError as error:
            print(time.monotonic(), error, flush=True)
            time.sleep(0.5)
found = retry(lambda: socket.gethostbyname(os.environ["PEER"]))
token = open("/var/run/secrets/kubernetes.io/serviceaccount/token").read()
trust = ssl.create_default_context(cafile="/var/run/secrets/kubernetes.io/serviceaccount/ca.crt")
login = {"Authorization": "Bearer " + token}
request = urllib.request.Request("https://kubernetes.default.svc/api", headers=login)
api = retry(lambda: urllib.request.urlopen(request, context=trust, timeout=5)).status
s3 = retry(lambda: urllib.request.urlopen(os.environ["S3"] + "/minio/health/live", timeout=5)).status
print("peer", found, "api", api, "s3", s3, flush=True)
import signal; signal.sigwait([signal.SIGTERM])
"""


@pytest.fixture(scope="module")
def base(cluster: Cluster) -> str:
    """The Debian image, on all nodes."""
    cluster.import_image(images.base_image())
    return images.BASE_TAG


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own that admits what Pod Security calls restricted."""
    name = f"test-{time.monotonic_ns()}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    account = ("get", "serviceaccount", "default", f"--namespace={name}", "--ignore-not-found", "-o=name")
    wait_until(lambda: cluster.kubectl(*account), "the default service account", 30)
    yield name
    cluster.kubectl("delete", "pods", "--all", f"--namespace={name}", "--force", "--grace-period=0")
    cluster.kubectl("delete", "namespace", name, "--wait=false")


def pod(name: str, namespace: str, code: str, *, gpus: int = 0, **spec: Any) -> dict[str, Any]:
    container = {
        "name": "main",
        "image": images.BASE_TAG,
        "imagePullPolicy": "Never",
        "command": ["python", "-c", code],
        "env": spec.pop("env", []),
        "volumeMounts": spec.pop("volumeMounts", []),
        "resources": {"limits": {GPU: str(gpus)}} if gpus else {},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    security = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
        "spec": {"restartPolicy": "Never", "securityContext": security, "containers": [container]} | spec,
    }


def status(cluster: Cluster, namespace: str, name: str) -> dict[str, Any]:
    found = cluster.kubectl("get", "pod", name, f"--namespace={namespace}", "--output=json")
    result: dict[str, Any] = json.loads(found)["status"]
    return result


def wait_phase(cluster: Cluster, namespace: str, name: str, phase: str, timeout: float = 60) -> None:
    wait_until(
        lambda: status(cluster, namespace, name)["phase"] == phase, f"pod {name} to be {phase}", timeout
    )


def wait_log(cluster: Cluster, namespace: str, name: str, expected: str, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while expected not in (log := cluster.kubectl("logs", name, f"--namespace={namespace}")):
        assert time.monotonic() < deadline, f"pod {name} did not print {expected!r} but:\n{log}"
        time.sleep(0.2)


@pytest.mark.usefixtures("base")
def test_pods_on_two_nodes_find_each_other_the_api_server_and_the_object_storage(
    cluster: Cluster, namespace: str
) -> None:
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"group": "pair"}}
    metadata = {"name": "pair", "namespace": namespace}
    manifests: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service}
    ]
    for index, node in enumerate(cluster.nodes):
        peer = f"pair-{1 - index}.pair.{namespace}.svc.cluster.local"
        env = [{"name": "PEER", "value": peer}, {"name": "S3", "value": cluster.s3.endpoint}]
        place: dict[str, Any] = {"nodeName": node, "hostname": f"pair-{index}", "subdomain": "pair"}
        manifest = pod(f"pair-{index}", namespace, LOOK_AROUND, env=env, **place)
        manifest["metadata"] |= {"labels": {"group": "pair"}}
        manifests.append(manifest)
    cluster.apply(*manifests)
    for index in range(2):
        wait_phase(cluster, namespace, f"pair-{index}", "Running")
    for index in range(2):
        address = status(cluster, namespace, f"pair-{1 - index}")["podIP"]
        wait_log(cluster, namespace, f"pair-{index}", f"peer {address} api 200 s3 200")


@pytest.mark.usefixtures("base")
def test_a_pod_is_bound_only_where_enough_gpus_are(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("three", namespace, SLEEP, gpus=3), pod("two", namespace, SLEEP, gpus=2))
    wait_phase(cluster, namespace, "two", "Running")
    conditions = status(cluster, namespace, "three")["conditions"]
    [bound] = [item for item in conditions if item["type"] == "PodScheduled"]
    assert (bound["status"], bound["reason"]) == ("False", "Unschedulable")
    assert f"Insufficient {GPU}" in bound["message"]


def test_a_failed_gpu_is_no_longer_allocatable(cluster: Cluster) -> None:
    path = "--output=jsonpath={.status.allocatable.nvidia\\.com/gpu}"
    cluster.set_healthy_gpus("node-0", 1)
    wait_until(lambda: cluster.kubectl("get", "node", "node-0", path) == "1", "one GPU to be missing", 30)
    cluster.set_healthy_gpus("node-0", 2)
    wait_until(lambda: cluster.kubectl("get", "node", "node-0", path) == "2", "both GPUs to be back", 30)


@pytest.mark.usefixtures("base")
def test_killing_a_process_from_outside_fails_its_container(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("victim", namespace, f"import os; os.fork(); {SLEEP}"))
    wait_phase(cluster, namespace, "victim", "Running")
    wait_until(lambda: len(cluster.container_pids(namespace, "victim")) == 2, "both processes", 30)
    os.kill(cluster.container_pids(namespace, "victim")[0], signal.SIGKILL)
    wait_phase(cluster, namespace, "victim", "Failed")
    [container] = status(cluster, namespace, "victim")["containerStatuses"]
    assert container["state"]["terminated"]["exitCode"] == 137


@pytest.mark.usefixtures("base")
def test_a_read_only_folder_of_this_machine_is_mounted_by_claim(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("__version__ = '0.0.test'")
    tmp_path.chmod(0o755)
    claim = {"claimName": cluster.torch_volume(namespace, tmp_path), "readOnly": True}
    volume = {"name": "torch", "persistentVolumeClaim": claim}
    mount = {"name": "torch", "mountPath": images.TORCH_MOUNT, "readOnly": True}
    code = "import torch; assert torch.__version__ == '0.0.test'; print(torch.__file__)"
    cluster.apply(pod("torch", namespace, code, volumes=[volume], volumeMounts=[mount]))
    wait_phase(cluster, namespace, "torch", "Succeeded")


@pytest.mark.usefixtures("base")
def test_an_image_is_built_from_a_dockerfile_and_runs(
    cluster: Cluster, namespace: str, tmp_path: Path
) -> None:
    dockerfile = "ARG BASE\nFROM ${BASE} AS small\nRUN cat /data/word > /word\nRUN pip --version\n"
    (tmp_path / "Dockerfile").write_text(dockerfile)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "word").write_text("built")
    archive = images.build(
        tmp_path,
        "small",
        "localhost/small:1",
        build_args={"BASE": images.BASE_TAG},
        volumes={tmp_path / "data": "/data"},
        output=tmp_path / "small.tar",
    )
    cluster.import_image(archive)
    manifest = pod("small", namespace, "assert open('/word').read() == 'built'")
    manifest["spec"]["containers"][0]["image"] = "localhost/small:1"
    cluster.apply(manifest)
    wait_phase(cluster, namespace, "small", "Succeeded")


@pytest.mark.usefixtures("base")
def test_this_machine_reaches_services_and_pods_reach_this_machine(cluster: Cluster, namespace: str) -> None:
    with socket.create_server((cluster.host, 0)) as server:
        server.settimeout(60)
        port = server.getsockname()[1]
        code = f"""
import http.server, socket
socket.create_connection(("{cluster.host}", {port})).sendall(b"hello")
http.server.HTTPServer(("", 8080), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
        service = {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}
        metadata = {"name": "web", "namespace": namespace}
        cluster.apply(
            pod("web", namespace, code, nodeName="node-1"),
            {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service},
        )
        connection, _ = server.accept()
        with connection:
            assert connection.recv(5) == b"hello"
    path = ("get", "service", "web", f"--namespace={namespace}", "--output=jsonpath={.spec.clusterIP}")
    url = f"http://{cluster.kubectl(*path)}/etc/hostname"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def answered() -> bool:
        try:
            with opener.open(url, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    wait_until(answered, "the service to answer", 30)


def test_objects_are_stored_with_the_generated_credentials(cluster: Cluster) -> None:
    s3fs = pytest.importorskip("s3fs")
    s3 = cluster.s3
    files = s3fs.S3FileSystem(key=s3.access_key, secret=s3.secret_key, endpoint_url=s3.endpoint)
    files.pipe(f"{s3.bucket}/folder/object", b"content")
    assert files.cat(f"{s3.bucket}/folder/object") == b"content"


def test_the_api_server_comes_back_with_what_it_knew(cluster: Cluster, namespace: str) -> None:
    cluster.stop_apiserver()
    with pytest.raises(RuntimeError, match="refused"):
        cluster.kubectl("get", "namespace", namespace)
    cluster.start_apiserver()
    assert namespace in cluster.kubectl("get", "namespace", namespace)


def test_a_partitioned_node_is_lost_and_found_again(cluster: Cluster) -> None:
    cluster.partition_node("node-1")
    cluster.wait_node("node-1", ready=False, timeout=30)
    cluster.heal_node("node-1")
    cluster.wait_node("node-1")


@pytest.mark.usefixtures("base")
def test_a_killed_node_is_lost_and_starts_its_pods_anew_when_it_boots(
    cluster: Cluster, namespace: str
) -> None:
    cluster.apply(pod("survivor", namespace, SLEEP, nodeName="node-1", restartPolicy="Always"))
    wait_phase(cluster, namespace, "survivor", "Running")
    pids = cluster.container_pids(namespace, "survivor")
    cluster.kill_node("node-1")
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    cluster.wait_node("node-1", ready=False, timeout=30)
    cluster.start_node("node-1")

    def restarted() -> bool:
        statuses = status(cluster, namespace, "survivor")["containerStatuses"]
        return bool(statuses[0]["restartCount"] and statuses[0]["ready"])

    wait_until(restarted, "the container to run again", 60)


def traces() -> dict[str, Any]:
    """What a cluster could change on this machine."""

    def lines(*command: str) -> list[str]:
        return sorted(subprocess.run(command, capture_output=True, text=True).stdout.splitlines())

    rules = [line.split(" [")[0] for line in lines("iptables-save") if not line.startswith("#")]
    settings = ("vm/overcommit_memory", "kernel/panic", "kernel/panic_on_oops", "net/ipv4/ip_forward")
    return {
        "links": [line.split()[0] for line in lines("ip", "-brief", "link")],
        "routes": lines("ip", "route"),
        "rules": rules,
        "mounts": lines("cat", "/proc/self/mounts"),
        "cgroups": lines("find", "/sys/fs/cgroup", "-name", "internlm-test*"),
        "hosts": Path("/etc/hosts").read_text(),
        "settings": [Path("/proc/sys", name).read_text() for name in settings],
        "run": lines("ls", "/run", "/run/internlm-test", "/run/containerd", "/var/lib", "/var/log"),
    }


@pytest.mark.usefixtures("base")
def test_a_second_cluster_lives_beside_and_goes_without_a_trace(cluster: Cluster) -> None:
    from cluster.fixtures import running  # not at the top: pytest wants to import its plugins first

    before = traces()
    with running(nodes=1, name="second") as second:
        second.import_image(images.base_image())
        second.apply(pod("guest", "default", SLEEP, gpus=1))
        wait_phase(second, "default", "guest", "Running")
        assert second.host != cluster.host
        with pytest.raises(RuntimeError, match="already"):
            Cluster.up(nodes=1, root=second.root)
        assert Cluster.attach(root=second.root) is not None
    assert traces() == before
    assert not second.root.exists()
    assert cluster.kubectl("get", "nodes", "--output=name").split() == ["node/node-0", "node/node-1"]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("seconds", [0.0, 2.0, 5.0])
def test_a_cluster_whose_maker_was_killed_halfway_can_be_removed(tmp_path: Path, seconds: float) -> None:
    before = traces()
    code = "import sys; from pathlib import Path; from cluster.cluster import Cluster; "
    code += "Cluster.up(nodes=1, root=Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    maker = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "half")], env=environment)
    while not (tmp_path / "half" / "state.json").exists():  # before, there is nothing to remove
        assert maker.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    maker.kill()
    maker.wait()
    half = Cluster.attach(root=tmp_path / "half")
    assert half is not None
    half.down()
    assert traces() == before
    assert not (tmp_path / "half").exists()
