"""The network of a test cluster: a bridge in a namespace of its own, and one veth pair to this machine.

All that this machine sees is one interface with one address and a few routes through it. They vanish with the
namespace, that is, when its holder is killed; the machine's own firewall rules are neither used nor changed.

    10.X.0.0/24     machine .1, control plane .2, nodes .11, .12, ...
    10.X.16+I.0/24  pods of node I
    10.X.128.0/17   services, reached through node 0 from outside of the nodes
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from cluster.state import Daemon, State, interface_exists

BRIDGE = "nodes"
MAX_NODES = 16


def run(*command: str | Path, input: bytes | None = None) -> str:  # noqa: A002
    """Run a command to its end; RuntimeError with what it said when it fails."""
    done = subprocess.run([str(word) for word in command], input=input, capture_output=True)
    if done.returncode:
        said = (done.stderr + done.stdout).decode(errors="replace").strip()
        raise RuntimeError(f"{' '.join(map(str, command))[:300]}: {said[-1500:]}")
    return done.stdout.decode()


def wait_namespace(pid: int, kind: str) -> None:
    """Wait until a process that was started through unshare really is in its own namespace."""
    own = Path(f"/proc/self/ns/{kind}").readlink()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/ns/{kind}").readlink() == own:
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} did not get a {kind} namespace")
        time.sleep(0.01)


def node_address(state: State, index: int) -> str:
    return f"{state.network}.0.{11 + index}"


def pod_network(state: State, index: int) -> str:
    return f"{state.network}.{16 + index}.0/24"


def all_pods(state: State) -> str:
    return f"{state.network}.16.0/20"


class Switch:
    """The bridge that joins the nodes, the control plane and this machine."""

    def __init__(self, state: State) -> None:
        self.state = state

    @property
    def holder(self) -> Daemon:
        return self.state.daemons["switch"]

    @property
    def prefix(self) -> list[str]:
        """Puts a command into the bridge's network namespace, where the control plane runs."""
        return ["nsenter", f"--target={self.holder.pid}", "--net"]

    def start(self, pause: Path) -> None:
        state = self.state
        holder = state.start("switch", ["unshare", "--net", pause])
        wait_namespace(holder.pid, "net")
        peer = ("peer", "name", "machine", "netns", str(holder.pid))
        run("ip", "link", "add", state.interface, "type", "veth", *peer)
        self._ip("link", "set", "lo", "up")
        self._ip("link", "add", BRIDGE, "type", "bridge")
        self._ip("address", "add", f"{state.address}/24", "dev", BRIDGE)
        self._ip("link", "set", "machine", "master", BRIDGE, "up")
        self._ip("link", "set", BRIDGE, "up")
        run("ip", "address", "add", f"{state.network}.0.1/24", "dev", state.interface)
        run("ip", "link", "set", state.interface, "up")
        for enter in ([], self.prefix):
            for index in range(state.nodes):
                run(
                    *enter, "ip", "route", "add", pod_network(state, index), "via", node_address(state, index)
                )
            run(*enter, "ip", "route", "add", f"{state.network}.128.0/17", "via", node_address(state, 0))

    def remove(self) -> None:
        """Remove the machine's end of the pair: else the kernel does, but at times only after a minute."""
        command = ["ip", "link", "delete", self.state.interface]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and interface_exists(self.state.interface):
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")

    def plug(self, name: str, index: int, pid: int) -> None:
        """Give the namespace of this process an eth0 on the bridge, with the node's address and routes."""
        state = self.state
        peer = ("peer", "name", name, "netns", str(self.holder.pid))
        run("ip", "link", "add", "eth0", "netns", str(pid), "type", "veth", *peer)
        self._ip("link", "set", name, "master", BRIDGE, "up")
        enter = ("nsenter", f"--target={pid}", "--net", "ip")
        run(*enter, "link", "set", "lo", "up")
        run(*enter, "address", "add", f"{node_address(state, index)}/24", "dev", "eth0")
        run(*enter, "link", "set", "eth0", "up")
        for other in range(state.nodes):
            if other != index:
                run(*enter, "route", "add", pod_network(state, other), "via", node_address(state, other))

    def set_link(self, name: str, up: bool) -> None:
        """Pull a node's plug, or put it back."""
        self._ip("link", "set", name, "up" if up else "down")

    def _ip(self, *arguments: str) -> None:
        run(*self.prefix, "ip", *arguments)
