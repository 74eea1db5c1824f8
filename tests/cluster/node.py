"""One node of a test cluster: containerd, kubelet, kube-proxy and a device plugin in namespaces of their own.

A node is a machine in all that matters to tests: it has its own processes, mounts, network interfaces,
firewall and host name. Killing the first process of its process namespace is pulling the power cord: the
kernel kills everything in it, containers included, and takes mounts and interfaces away. What is under
`var-lib` is the node's disk.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from cluster.images import docker_archive
from cluster.network import Switch, all_pods, node_address, pod_network, run, wait_namespace
from cluster.state import State, cgroup_folders, children, remove_cgroups

SANDBOX_IMAGE = "localhost/pause:1"
# The kubelet insists on these kernel settings and would change them for the whole machine.
KERNEL_SETTINGS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
CONTAINERD_CONFIG = f"""\
version = 3
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "{SANDBOX_IMAGE}"
[plugins.'io.containerd.cri.v1.runtime']
# Without CAP_SYS_RESOURCE runc cannot lower a score, and dies of it.
restrict_oom_score_adj = true
disable_apparmor = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["/usr/lib/cni"]
conf_dir = "/var/lib/cni/net.d"
"""
# Runs inside of the new namespaces. $1 is the node's folder; the binaries follow as NAME=PATH.
BOOT_SCRIPT = """\
set -eu
folder=$1; shift
mount --make-rshared /
mount --bind "$folder/var-log" /var/log
# The node's own /var/lib, over the machine's, as caches and clusters may be somewhere below it.
layers="lowerdir=/var/lib,upperdir=$folder/overlay/upper,workdir=$folder/overlay/work"
mount -t overlay -o "$layers" lib /var/lib
for part in cni containerd kubelet; do
  mkdir -p "/var/lib/$part"
  mount --bind "$folder/var-lib/$part" "/var/lib/$part"
done
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/bin /run/kernel /run/lock
for program; do ln -s "${program#*=}" "/run/bin/${program%%=*}"; done
echo 1 > /proc/sys/net/ipv4/ip_forward
"""


class Node:
    """A node by its index; everything else is found through the State, from any process."""

    def __init__(self, state: State, index: int, gpus: int, programs: dict[str, Path]) -> None:
        self.state = state
        self.index = index
        self.gpus = gpus
        self.programs = programs
        self.name = f"node-{index}"
        self.folder = state.root / "nodes" / self.name
        self.disk = self.folder / "var-lib"
        self.cgroup = f"{state.cgroup}/{self.name}"

    @property
    def init(self) -> int:
        """The first process of the node, as this machine numbers it."""
        return children(self.state.daemons[self.name].pid)[0]

    def alive(self) -> bool:
        daemon = self.state.daemons.get(self.name)
        return daemon is not None and daemon.alive()

    def _inside(self, *command: str | Path) -> list[str]:
        namespaces = ("--mount", "--net", "--uts", "--ipc", "--pid")
        enter = [
            "nsenter",
            f"--target={self.init}",
            *namespaces,
            "env",
            "PATH=/run/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        ]
        return enter + [str(word) for word in command]

    def boot(self, switch: Switch) -> None:
        """Make the namespaces and start containerd; no API server is needed yet."""
        self._make_cgroups()
        parts = ("var-log", "overlay/upper", "overlay/work")
        for part in (*parts, "var-lib/kubelet", "var-lib/containerd", "var-lib/cni/net.d"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        self._write_config()
        namespaces = ("--pid", "--mount", "--net", "--uts", "--ipc", "--mount-proc")
        holder = self.state.start(
            self.name,
            [
                "unshare",
                "--fork",
                "--kill-child",
                "--propagation",
                "private",
                *namespaces,
                self.programs["pause"],
            ],
        )
        wait_namespace(holder.pid, "net")
        deadline = time.monotonic() + 10
        while not children(holder.pid):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} did not start:\n{self.state.tail(self.name)}")
            time.sleep(0.01)
        # unshare mounts /proc in its child: wait until that is done, or the child would be seen half made.
        pause = self.programs["pause"].resolve()
        while Path(f"/proc/{self.init}/exe").resolve() != pause:
            time.sleep(0.01)

        names = ("containerd", "containerd-shim-runc-v2", "ctr")
        script = BOOT_SCRIPT + "".join(
            f"echo {value} > /run/kernel/{index}; mount --bind /run/kernel/{index} /proc/sys/{setting}\n"
            for index, (setting, value) in enumerate(KERNEL_SETTINGS.items())
            if Path("/proc/sys", setting).exists()
        )
        programs = [f"{name}={self.programs[name]}" for name in names]
        run(*self._inside("sh", "-c", script, "boot", self.folder, *programs))
        run("nsenter", f"--target={self.init}", "--uts", "hostname", self.name)
        switch.plug(self.name, self.index, self.init)
        self._start("containerd", "containerd", "--config", "/var/lib/containerd/config.toml")
        self._import_sandbox_image()

    def join(self) -> None:
        """Start what talks to the API server."""
        kubernetes = self.programs["kubernetes"]
        if self.gpus:
            arguments = (f"-count={self.gpus}", "-healthy-file=/var/lib/kubelet/healthy-gpus")
            self._start("device-plugin", kubernetes, "device-plugin", *arguments)
        self._start(
            "kubelet",
            kubernetes,
            "kubelet",
            "--config=/var/lib/kubelet/config.json",
            "--kubeconfig=/var/lib/kubelet/kubeconfig",
            f"--hostname-override={self.name}",
            f"--node-ip={node_address(self.state, self.index)}",
        )
        self._start("kube-proxy", kubernetes, "kube-proxy", "--config=/var/lib/kubelet/proxy.json")

    def _start(self, part: str, *command: str | Path) -> None:
        self.state.start(f"{self.name}-{part}", self._inside(*command))

    def power_off(self) -> None:
        """Kill everything on the node at once, as a lost power supply does."""
        if self.alive():
            self.state.stop(self.name)
        for part in ("containerd", "device-plugin", "kubelet", "kube-proxy"):
            if f"{self.name}-{part}" in self.state.daemons:
                self.state.stop(f"{self.name}-{part}")
        remove_cgroups(self.cgroup)

    def set_healthy_gpus(self, count: int) -> None:
        (self.disk / "kubelet" / "healthy-gpus").write_text(str(count))

    def import_image(self, archive: bytes | Path) -> None:
        """Load a docker-archive into the node's containerd."""
        data = archive if isinstance(archive, bytes) else archive.read_bytes()
        run(*self._inside("ctr", "--namespace=k8s.io", "images", "import", "-"), input=data)

    def container_pids(self, container_id: str) -> list[int]:
        """All processes in a container, as this machine numbers them, the first one first."""
        found: set[int] = set()
        for top in cgroup_folders(self.cgroup):
            for folder, _, _ in os.walk(top):
                if container_id in folder:
                    with suppress(OSError):  # the container ended meanwhile
                        found.update(map(int, Path(folder, "cgroup.procs").read_text().split()))
        return sorted(found - {0})

    def _import_sandbox_image(self) -> None:
        image = docker_archive(SANDBOX_IMAGE, {"pause": self.programs["pause"]}, {"Entrypoint": ["/pause"]})
        # containerd lives behind its node's root folder, as that process sees it.
        socket = Path(f"/proc/{self.init}/root/run/containerd/containerd.sock")
        deadline = time.monotonic() + 30
        while not socket.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"containerd did not start:\n{self.state.tail(f'{self.name}-containerd')}")
            time.sleep(0.05)
        self.import_image(image)

    def _make_cgroups(self) -> None:
        """The kubelet wants its root cgroup to exist in each hierarchy."""
        top = Path("/sys/fs/cgroup")
        version2 = (top / "cgroup.controllers").exists()
        for hierarchy in [top] if version2 else [entry for entry in top.iterdir() if entry.is_dir()]:
            folder = hierarchy
            for part in self.cgroup.split("/"):
                parent, folder = folder, folder / part
                if version2:
                    for controller in ("cpuset", "cpu", "io", "memory", "hugetlb", "pids"):
                        with suppress(OSError):  # a controller that this machine has not
                            (parent / "cgroup.subtree_control").write_text(f"+{controller}")
                folder.mkdir(exist_ok=True)
                for file in ("cpuset.cpus", "cpuset.mems"):
                    # In version 1 a new cpuset is empty, and no process can enter an empty one.
                    if not version2 and (folder / file).exists():
                        (folder / file).write_text((parent / file).read_text())

    def _write_config(self) -> None:
        state, kubelet = self.state, self.disk / "kubelet"
        (self.disk / "containerd" / "config.toml").write_text(CONTAINERD_CONFIG)
        (kubelet / "resolv.conf").write_text("")  # pods know the cluster's names only
        (kubelet / "ca.crt").write_bytes((state.root / "pki" / "ca.crt").read_bytes())
        for name in ("kubeconfig", "proxy-kubeconfig"):
            source = state.root / "kubeconfig" / (self.name if name == "kubeconfig" else "proxy")
            (kubelet / name).write_bytes(source.read_bytes())
        bridge = {
            "type": "bridge",
            "bridge": "pods",
            "isGateway": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": pod_network(state, self.index)}]],
                "routes": [{"dst": "0.0.0.0/0"}],
                "dataDir": "/run/cni",  # forgotten at a reboot, as the pods' addresses are
            },
        }
        ports = {"type": "portmap", "capabilities": {"portMappings": True}}
        network = {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, ports]}
        (self.disk / "cni" / "net.d" / "pods.conflist").write_text(json.dumps(network))
        (kubelet / "config.json").write_text(json.dumps(self._kubelet_config(), indent=1))
        proxy = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "iptables",
            "clusterCIDR": all_pods(state),
            "hostnameOverride": self.name,
            "clientConnection": {"kubeconfig": "/var/lib/kubelet/proxy-kubeconfig"},
            "conntrack": {"maxPerCore": 0, "min": 0},  # these limits are the machine's
        }
        (kubelet / "proxy.json").write_text(json.dumps(proxy, indent=1))

    def _kubelet_config(self) -> dict[str, object]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": "/var/lib/kubelet/ca.crt"},
            },
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": [],
            "evictionHard": {},
            "imageGCHighThresholdPercent": 100,  # no registry: a collected image would be lost
            "clusterDomain": "cluster.local",
            "clusterDNS": [self.state.address],
            "resolvConf": "/var/lib/kubelet/resolv.conf",
            "volumePluginDir": "/var/lib/kubelet/volume-plugins",
            # With a grace period of 10 s in the controller manager, a report every 2 s.
            "nodeStatusUpdateFrequency": "2s",
            "nodeLeaseDurationSeconds": 8,
        }
