"""The training processes of one attempt on this machine, as torchrun would start them.

They get torchrun's environment, so the trainer does not know who started it.  Nodes and ranks are known
beforehand and nothing is elastic, so all that torchrun adds here is its own start, of some seconds, and a text
where an exit code was.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from internlm_trainer.telemetry.hangs import Beat, parse_beat

POLL_SECONDS = 0.1


class Place(NamedTuple):
    """Where in the job this machine is; the names are torchrun's."""

    nnodes: int
    node_rank: int
    nproc_per_node: int
    master_addr: str
    master_port: int

    def environment(self, local_rank: int) -> dict[str, str]:
        """What tells a process who it is."""
        rank = self.node_rank * self.nproc_per_node + local_rank
        values = {
            "RANK": rank,
            "LOCAL_RANK": local_rank,
            "GROUP_RANK": self.node_rank,
            "ROLE_RANK": rank,
            "WORLD_SIZE": self.nnodes * self.nproc_per_node,
            "LOCAL_WORLD_SIZE": self.nproc_per_node,
            "GROUP_WORLD_SIZE": self.nnodes,
            "ROLE_WORLD_SIZE": self.nnodes * self.nproc_per_node,
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": self.master_port,
        }
        return {name: str(value) for name, value in values.items()}


class Ended(NamedTuple):
    """A process that is over: its exit code, or minus the signal that ended it."""

    rank: int
    code: int


class Ranks:
    """Processes that run `internlm_trainer.worker`, each in a session of its own."""

    def __init__(self, place: Place, environment: dict[str, str], folder: Path) -> None:
        """`folder`: an empty one, for their heartbeats, stacks and message."""
        self.folder = folder
        self.message_file = folder / "message"
        self._over = False
        own = {"INTERNLM_HEARTBEAT_DIR": str(folder), "INTERNLM_TERMINATION_LOG": str(self.message_file)}
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        for local_rank in range(place.nproc_per_node):
            variables = place.environment(local_rank)
            self.processes[int(variables["RANK"])] = subprocess.Popen(
                [sys.executable, "-m", "internlm_trainer.worker"],
                env=environment | variables | own,
                start_new_session=True,
            )

    def ended(self) -> list[Ended]:
        """Those that are over."""
        found = ((rank, process.poll()) for rank, process in self.processes.items())
        return [Ended(rank, code) for rank, code in found if code is not None]

    def running(self) -> dict[int, int]:
        """Process ids of the others, by rank."""
        return {rank: process.pid for rank, process in self.processes.items() if process.poll() is None}

    def beats(self) -> list[Beat]:
        """The heartbeats of those that run; one that has not begun yet is in its set-up."""
        return [self._beat(rank, pid) for rank, pid in self.running().items()]

    def _beat(self, rank: int, pid: int) -> Beat:
        try:
            return parse_beat(json.loads((self.folder / f"rank-{rank}.json").read_bytes()))
        except (OSError, ValueError, KeyError, TypeError):
            return Beat(rank, pid, "setup", 0)

    def send(self, number: int) -> None:
        """Send a signal to those that run."""
        for pid in self.running().values():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self, seconds: float) -> None:
        """Ask them to end and give them so long; then none of them, and none that they started, is left."""
        if self._over:
            return
        self._over = True  # once: the ids of groups that are gone may come to be somebody else's
        if seconds:
            self.send(signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        for process in self.processes.values():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
