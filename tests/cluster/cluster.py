"""A real Kubernetes cluster on this machine: `Cluster.up()`, `Cluster.down()`, and what tests do in between.

python3 tests/cluster/cluster.py up --nodes 2      # leaves it running
python3 tests/cluster/cluster.py status
python3 tests/cluster/cluster.py down
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if not __package__:  # run as a script: this folder must not be where `import cluster` looks
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cluster import binaries
from cluster.binaries import Log, progress
from cluster.controlplane import S3, ControlPlane, wait_until
from cluster.network import MAX_NODES, Switch
from cluster.node import Node
from cluster.state import State, claim, clusters_dir, kill_marked, leftovers, release, remove_cgroups

GPU = "nvidia.com/gpu"


class Cluster:
    """A running cluster, from any process. Make one with `up`, or find one again with `attach`."""

    def __init__(self, state: State, gpus_per_node: int) -> None:
        self.state = state
        names = binaries.CONTROL_PLANE + (binaries.NODE if state.nodes else ())
        self.programs = {name: binaries.binary_path(name) for name in names}
        self.switch = Switch(state)
        self.control_plane = ControlPlane(state, self.programs, self.switch)
        self._nodes = [Node(state, index, gpus_per_node, self.programs) for index in range(state.nodes)]

    # Life

    @classmethod
    def up(
        cls,
        *,
        nodes: int = 2,
        gpus_per_node: int = 2,
        name: str = "dev",
        root: Path | None = None,
        log: Log = binaries.silent,
    ) -> Cluster:
        """Start a cluster and return once its nodes are ready and it answers.

        Args:
            nodes: real nodes, each with its own kubelet and containers; 0 for an API server with its
                controllers only, which needs no root and is there in a few seconds.
            gpus_per_node: how many `nvidia.com/gpu` a node advertises. There is no device behind them.
            name: clusters of different names live side by side.
            root: the cluster's folder; by default one of this name among the user's state files.

        Raises:
            RuntimeError: no cluster can run here, or one of this name already does; the message says which.
                What had been started by then is gone again.
        """
        reason = binaries.unavailable(nodes=nodes > 0)
        if reason:
            raise RuntimeError(reason)
        if not 0 <= nodes <= MAX_NODES:
            raise ValueError(f"nodes must be from 0 to {MAX_NODES}, not {nodes}")
        # Some of what is started finds its helpers by PATH.
        os.environ["PATH"] = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        binaries.prepare(nodes=nodes > 0, log=log)
        state = claim((root or clusters_dir() / name).resolve(), nodes)
        (state.root / "gpus").write_text(str(gpus_per_node))
        cluster = cls(state, gpus_per_node)
        try:
            cluster._start(log)
        except BaseException:
            cluster.down()
            raise
        return cluster

    @classmethod
    def attach(cls, name: str = "dev", root: Path | None = None) -> Cluster | None:
        """The cluster that some process started under this name, or in this folder; None if there is none."""
        root = (root or clusters_dir() / name).resolve()
        state = State.load(root)
        if state is None:
            return None
        gpus = root / "gpus"
        return cls(state, int(gpus.read_text()) if gpus.exists() else 0)

    def _start(self, log: Log) -> None:
        state = self.state
        if state.nodes:
            self.switch.start(self.programs["pause"])
        self._write_tools()
        control = self.control_plane
        control.create_identities()
        control.add_identity("proxy", "system:kube-proxy")
        control.add_identity("dns", "system:coredns")
        for node in self._nodes:
            control.add_identity(node.name, f"system:node:{node.name}", "system:nodes")
        with ThreadPoolExecutor(max_workers=MAX_NODES) as pool:
            booting = [pool.submit(node.boot, self.switch) for node in self._nodes]
            control.start()
            log(f"the API server is ready at {control.server}")
            for boot in booting:
                boot.result()
            list(pool.map(Node.join, self._nodes))
        self._wait_for_account()
        if state.nodes:
            control.start_dns()
            for node in self._nodes:
                self.wait_node(node.name)
                log(f"{node.name} is ready")

    def down(self, keep_logs: Path | None = None) -> None:
        """Remove every trace, whatever state the cluster is in; RuntimeError names what could not be removed.

        Args:
            keep_logs: a folder to save the components' logs in first.
        """
        state = self.state
        kill_marked(state.root)
        if state.nodes:
            remove_cgroups(state.cgroup)
            self.switch.remove()
        if keep_logs is not None:
            shutil.copytree(state.root / "logs", keep_logs, dirs_exist_ok=True)
        release(state)
        found = leftovers(state)
        if found:
            raise RuntimeError(f"the cluster left behind: {', '.join(found)}")

    def _write_tools(self) -> None:
        """kubectl and helm under their own names, for people."""
        folder = self.state.root / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "kubectl").write_text(f'#!/bin/sh\nexec "{self.programs["kubernetes"]}" kubectl "$@"\n')
        (folder / "kubectl").chmod(0o755)
        if "helm" in self.programs:
            (folder / "helm").symlink_to(self.programs["helm"])

    def _wait_for_account(self) -> None:
        """Pods are refused in a namespace until the controllers have made its default service account."""
        command = (
            "get",
            "serviceaccount",
            "default",
            "--namespace=default",
            "--ignore-not-found",
            "--output=name",
        )
        wait_until(lambda: self.kubectl(*command), "the default service account", 60)

    # Use

    @property
    def root(self) -> Path:
        """The cluster's folder; logs/ in it has a file for each component."""
        return self.state.root

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig."""
        return self.control_plane.kubeconfig("admin")

    @property
    def host(self) -> str:
        """The address at which pods reach this machine, for tests that serve something themselves."""
        return f"{self.state.network}.0.1" if self.state.nodes else self.state.address

    @property
    def s3(self) -> S3:
        return S3(**json.loads((self.root / "s3.json").read_text()))

    @property
    def nodes(self) -> list[str]:
        return [node.name for node in self._nodes]

    @property
    def helm(self) -> Path:
        """The helm program; give it `--kubeconfig`."""
        return self.programs["helm"]

    def kubectl(self, *arguments: str, input: str | None = None, check: bool = True) -> str:  # noqa: A002
        """Run kubectl as the administrator and return what it prints; RuntimeError when it fails."""
        return self.control_plane.kubectl(*arguments, input=input, check=check)

    def apply(self, *manifests: object) -> None:
        """kubectl apply of manifests that are given as plain Python data."""
        self.control_plane.apply(*manifests)

    def import_image(self, archive: Path) -> None:
        """Load a docker-archive into every node; pods then use its tag with imagePullPolicy Never."""
        with ThreadPoolExecutor(max_workers=MAX_NODES) as pool:
            list(pool.map(lambda node: node.import_image(archive), self._nodes))

    def torch_volume(self, namespace: str, layer: Path, name: str = "torch") -> str:
        """Offer the folder of `images.torch_layer` to a namespace's pods; returns the claim to mount.

        A claim, because Pod Security 'restricted' refuses hostPath volumes in pods.
        """
        volume = f"{name}-{namespace}"
        shared = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": volume},
                "spec": shared
                | {
                    "capacity": {"storage": "1Gi"},
                    "hostPath": {"path": str(layer), "type": "Directory"},
                    "claimRef": {"namespace": namespace, "name": name},
                    "persistentVolumeReclaimPolicy": "Retain",
                },
            },
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"namespace": namespace, "name": name},
                "spec": shared | {"volumeName": volume, "resources": {"requests": {"storage": "1Gi"}}},
            },
        )
        return name

    @property
    def token_key(self) -> Path:
        """The key with which the API server signs service account tokens."""
        return self.control_plane.authority.folder / "tokens.key"

    def node_root(self, name: str) -> Path:
        """A node's file system, as its own processes see it."""
        return Path(f"/proc/{self._node(name).init}/root")

    # Misfortune

    def _node(self, name: str) -> Node:
        return self._nodes[self.nodes.index(name)]

    def wait_node(self, name: str, ready: bool = True, timeout: float = 90) -> None:
        """Wait until the node is Ready with all its GPUs, or (ready=False) is seen as lost."""
        node = self._node(name)

        def reached() -> bool:
            found = self.kubectl("get", "node", name, "--ignore-not-found", "--output=json")
            status = json.loads(found)["status"] if found else {}
            conditions = {item["type"]: item["status"] for item in status.get("conditions", [])}
            if not ready:
                return conditions.get("Ready") != "True"
            if not node.alive():
                raise RuntimeError(f"{name} died:\n{self.state.tail(name)}")
            gpus = int(status.get("allocatable", {}).get(GPU, 0))
            return conditions.get("Ready") == "True" and gpus >= node.gpus

        wait_until(reached, f"{name} to be {'ready' if ready else 'seen as lost'}", timeout, interval=0.3)

    def kill_node(self, name: str) -> None:
        """Kill everything on the node at once, containers included. The API server is not told."""
        self._node(name).power_off()

    def start_node(self, name: str) -> None:
        """Boot a killed node again, with its old disk and name, and wait until it is ready."""
        node = self._node(name)
        if node.alive():
            raise RuntimeError(f"{name} is running")
        node.boot(self.switch)
        node.join()
        self.wait_node(name)

    def partition_node(self, name: str) -> None:
        """Pull the node's network plug: what runs on it goes on, alone."""
        self.switch.set_link(name, up=False)

    def heal_node(self, name: str) -> None:
        self.switch.set_link(name, up=True)

    def stop_kubelet(self, name: str) -> None:
        """Kill the node's kubelet: its containers run on, and nobody speaks for them."""
        self.state.stop(f"{name}-kubelet")

    def start_kubelet(self, name: str) -> None:
        self.state.restart(self.state.daemons[f"{name}-kubelet"])
        self.wait_node(name)

    def set_healthy_gpus(self, name: str, count: int) -> None:
        """Let all but this many of the node's GPUs fail: allocatable follows within a second or two."""
        self._node(name).set_healthy_gpus(count)

    def container_pids(self, namespace: str, pod: str, container: str | None = None) -> list[int]:
        """Processes of a running container (the pod's first by default) as this machine numbers them.

        The container's own first process comes first: killing it ends the container.
        """
        found = json.loads(self.kubectl("get", "pod", pod, f"--namespace={namespace}", "--output=json"))
        for status in found["status"].get("containerStatuses", []):
            if container in (None, status["name"]) and "running" in status["state"]:
                container_id = status["containerID"].partition("://")[2]
                return self._node(found["spec"]["nodeName"]).container_pids(container_id)
        raise RuntimeError(f"pod {namespace}/{pod} has no running container {container or ''}".rstrip())

    def stop_apiserver(self) -> None:
        """Kill the API server; running pods do not notice."""
        self.state.stop("kube-apiserver")

    def start_apiserver(self) -> None:
        self.state.restart(self.state.daemons["kube-apiserver"])
        self.control_plane.wait_ready()

    def stop_s3(self) -> None:
        """Kill the object storage; what it has stored stays."""
        self.state.stop("minio")

    def start_s3(self) -> None:
        self.state.restart(self.state.daemons["minio"])


def main() -> None:
    parser = argparse.ArgumentParser(description="A real Kubernetes cluster on this machine, for tests.")
    parser.add_argument("command", choices=["up", "down", "status"])
    parser.add_argument(
        "--nodes", type=int, default=2, help="real nodes; 0 for a control plane only (default: 2)"
    )
    parser.add_argument("--gpus-per-node", type=int, default=2, help="pretended GPUs of a node (default: 2)")
    parser.add_argument(
        "--name", default="dev", help="clusters of different names live side by side (default: dev)"
    )
    options = parser.parse_args()
    try:
        {"up": _up, "down": _down, "status": _status}[options.command](options)
    except (RuntimeError, ValueError, TimeoutError) as error:
        sys.exit(str(error))


def _up(options: argparse.Namespace) -> None:
    log = progress()
    cluster = Cluster.up(nodes=options.nodes, gpus_per_node=options.gpus_per_node, name=options.name, log=log)
    log("the cluster is ready")
    print(f"""
    export KUBECONFIG={cluster.kubeconfig} PATH={cluster.root}/bin:$PATH
    . {cluster.root}/s3.env    # S3 credentials; endpoint {cluster.s3.endpoint}, bucket {cluster.s3.bucket}

    kubectl get nodes
    ls {cluster.root}/logs
    python3 tests/cluster/cluster.py down --name {options.name}    # or: make cluster-down""")


def _down(options: argparse.Namespace) -> None:
    cluster = Cluster.attach(options.name)
    if cluster is None:
        print(f"there is no cluster {options.name!r}")
        return
    cluster.down()
    print(f"the cluster {options.name!r} is gone without a trace")


def _status(options: argparse.Namespace) -> None:
    cluster = Cluster.attach(options.name)
    if cluster is None:
        print(f"there is no cluster {options.name!r}")
        return
    for daemon in cluster.state.daemons.values():
        print(
            f"{daemon.name:24} {'running, process ' + str(daemon.pid) if daemon.alive() else 'not running'}"
        )
    print(f"export KUBECONFIG={cluster.kubeconfig}")


if __name__ == "__main__":
    main()
