"""What a cluster has done to this machine, written down so that any later process can undo it.

A cluster leaves three kinds of trace outside its own folder: processes, one network interface and cgroups.
Every process is started with a marker in its environment that names the cluster's folder. So even one that
was started in the instant before a crash, and never got into the state file, is found again; and nothing that
belongs to someone else can be mistaken for ours.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

MARKER = "INTERNLM_TEST_CLUSTER"
SLOTS = 16


def clusters_dir() -> Path:
    """Where clusters keep their folders unless told otherwise."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "internlm-test"


@dataclass
class Daemon:
    """A long-running process of the cluster and how to start it again."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    pid: int = 0
    started: int = 0  # clock ticks since boot, so that a reused pid is not taken for ours

    def alive(self) -> bool:
        return self.pid > 0 and start_time(self.pid) == self.started


@dataclass
class State:
    """The cluster's folder, the addresses it took, and its daemons by name."""

    root: Path
    slot: int
    nodes: int
    daemons: dict[str, Daemon] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    # Addresses follow from the slot: 10.(96 + slot).0.0/16 with nodes, one loopback address without.
    @property
    def network(self) -> str:
        return f"10.{96 + self.slot}"

    @property
    def address(self) -> str:
        """Where API server, object storage and DNS listen, for pods and for this machine alike."""
        return f"{self.network}.0.2" if self.nodes else f"127.0.{100 + self.slot}.1"

    @property
    def interface(self) -> str:
        return f"ilmtest{self.slot}"

    @property
    def cgroup(self) -> str:
        return f"internlm-test-{self.slot}"

    def save(self) -> None:
        daemons = {name: asdict(daemon) for name, daemon in self.daemons.items()}
        data = {"slot": self.slot, "nodes": self.nodes, "daemons": daemons}
        temporary = self.root / ".state.json"
        temporary.write_text(json.dumps(data, indent=1))
        temporary.rename(self.root / "state.json")

    @classmethod
    def load(cls, root: Path) -> State | None:
        try:
            data = json.loads((root / "state.json").read_text())
        except FileNotFoundError:
            return None
        daemons = {name: Daemon(**fields) for name, fields in data["daemons"].items()}
        return cls(root, data["slot"], data["nodes"], daemons)

    def log_path(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"

    def start(
        self, name: str, command: Iterable[str | Path], environment: dict[str, str] | None = None
    ) -> Daemon:
        """Start a daemon with its output in logs/NAME.log. It outlives this process."""
        daemon = Daemon(name, [str(word) for word in command], environment or {})
        return self.restart(daemon)

    def restart(self, daemon: Daemon) -> Daemon:
        with self.log_path(daemon.name).open("ab") as log:
            process = _spawn(daemon, self.root, log)
        daemon.pid, daemon.started = process.pid, start_time(process.pid) or 0
        with self._lock:  # nodes start in parallel
            self.daemons[daemon.name] = daemon
            self.save()
        return daemon

    def stop(self, name: str, sig: signal.Signals = signal.SIGKILL, timeout: float = 20) -> None:
        """Kill one daemon and wait until it is gone; one that nsenter put into a node is nsenter's child."""
        daemon = self.daemons[name]
        if daemon.alive():
            wrapper = daemon.command[0] == "nsenter" and "--pid" in daemon.command
            pids = (children(daemon.pid) if wrapper else []) + [daemon.pid]
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, sig)
            wait_gone(pids, timeout)

    def tail(self, name: str, lines: int = 15) -> str:
        path = self.log_path(name)
        text = path.read_text(errors="replace") if path.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


# Popen objects must stay referenced while their process lives: a collected one warns, and never reaps.
_children: dict[int, subprocess.Popen[bytes]] = {}


def _spawn(daemon: Daemon, root: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    # Only what a daemon needs: a proxy or a kubeconfig of the developer's would lead it astray.
    environment = {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin", "HOME": str(root)}
    environment |= daemon.environment | {MARKER: str(root)}
    process = subprocess.Popen(
        daemon.command,
        env=environment,
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # or Ctrl-C in the terminal of `make cluster` would kill it
    )
    _children[process.pid] = process
    return process


def start_time(pid: int) -> int | None:
    """Start of a live process in clock ticks since boot; None when there is none (a zombie is none)."""
    child = _children.get(pid)
    if child is not None and child.poll() is not None:
        del _children[pid]
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def marked_processes(root: Path) -> list[int]:
    """All live processes, of any parent, that were started for the cluster in this folder."""
    marker = f"{MARKER}={root}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                ours = marker in (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # it ended meanwhile, or belongs to another user
                continue
            if ours and start_time(int(entry.name)) is not None:
                found.append(int(entry.name))
    return found


def wait_gone(pids: Sequence[int], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while remaining := [pid for pid in pids if start_time(pid) is not None]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {remaining} did not end within {timeout} s")
        time.sleep(0.02)


def kill_marked(root: Path, timeout: float = 30) -> None:
    """Kill everything that was started for this cluster; in rounds, as a process may just have forked."""
    deadline = time.monotonic() + timeout
    while pids := marked_processes(root):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {pids} of the cluster do not die")
        time.sleep(0.05)


def interface_exists(name: str) -> bool:
    return Path("/sys/class/net", name).exists()


def cgroup_folders(name: str) -> list[Path]:
    """The cluster's top folder in each cgroup hierarchy (several with version 1, one with version 2)."""
    top = Path("/sys/fs/cgroup")
    return [path for path in (top / name, *(entry / name for entry in top.iterdir())) if path.is_dir()]


def remove_cgroups(name: str, timeout: float = 20) -> None:
    """Remove a cgroup tree whose processes were killed; the kernel lets go of them a little later."""
    deadline = time.monotonic() + timeout
    for top in cgroup_folders(name):
        for folder, _, _ in os.walk(top, topdown=False):
            while Path(folder).exists():
                try:
                    os.rmdir(folder)
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.05)


def _slots_dir() -> Path:
    """Shared by all users' clusters where that is possible, as addresses are the machine's."""
    if os.geteuid() == 0:
        return Path("/run/internlm-test")
    return Path(tempfile.gettempdir()) / f"internlm-test-{os.geteuid()}"


def claim(root: Path, nodes: int) -> State:
    """Take a free slot for a new cluster; RuntimeError when its folder is in use or no slot is free."""
    if (root / "state.json").exists():
        raise RuntimeError(
            f"a cluster is already in {root}: use it, or take it down first (make cluster-down)"
        )
    (root / "logs").mkdir(mode=0o700, parents=True, exist_ok=True)
    for slot in range(SLOTS):
        state = State(root, slot, nodes)
        if _take(_slots_dir() / str(slot), root):
            if not _addresses_taken(state):
                state.save()
                return state
            _give_back(_slots_dir() / str(slot), root)
    raise RuntimeError(f"no room for another test cluster: its {SLOTS} address ranges are all in use here")


def _take(owner: Path, root: Path) -> bool:
    """Write our name on a slot, unless someone else's is on it."""
    try:
        stale = (
            time.time() - owner.stat().st_mtime > 60 and not Path(owner.read_text(), "state.json").exists()
        )
        if stale:  # its owner died before it had written anything that could be cleaned up
            owner.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    owner.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = owner.with_name(f".{owner.name}.{os.getpid()}")
    draft.write_text(str(root))
    try:
        os.link(draft, owner)  # a link, unlike a rename, fails where the name exists
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _give_back(owner: Path, root: Path) -> None:
    if owner.exists() and owner.read_text() == str(root):
        owner.unlink()
        with suppress(OSError):  # other clusters' names are in it
            owner.parent.rmdir()


def _addresses_taken(state: State) -> bool:
    if not state.nodes:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((state.address, 6443))
            except OSError:
                return True
        return False
    if interface_exists(state.interface) or cgroup_folders(state.cgroup):
        return True
    ours = ipaddress.ip_network(f"{state.network}.0.0/16")
    routes = subprocess.run(["ip", "-json", "route", "show", "table", "all"], capture_output=True, text=True)
    for route in json.loads(routes.stdout or "[]"):
        destination = route.get("dst", "default")
        if destination == "default" or ":" in destination:
            continue
        if ipaddress.ip_network(destination, strict=False).overlaps(ours):
            return True
    return False


def release(state: State) -> None:
    """Remove the cluster's folder and give the slot back; state.json goes last, so it can be repeated."""
    for entry in state.root.iterdir():
        if entry.name != "state.json":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    shutil.rmtree(state.root)
    _give_back(_slots_dir() / str(state.slot), state.root)


def leftovers(state: State) -> list[str]:
    """Every trace of the cluster on this machine, in words; empty once it is really gone."""
    found = [f"process {pid}" for pid in marked_processes(state.root)]
    if state.nodes:  # another user's cluster may have these names, without nodes they are not ours
        found += [f"interface {state.interface}"] * interface_exists(state.interface)
        found += [f"cgroup {folder}" for folder in cgroup_folders(state.cgroup)]
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    found += [f"mount {line.split()[1]}" for line in mounts if line.split()[1].startswith(f"{state.root}/")]
    if state.root.exists():
        found.append(f"folder {state.root}")
    return found
