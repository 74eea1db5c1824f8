"""What there is to know about processes that hang or have died, gathered from outside and kept in the job's store."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from internlm_trainer.storage import join, write_whole
from internlm_trainer.telemetry.diagnostics import FLIGHT_RECORDER
from internlm_trainer.telemetry.hangs import Beat
from internlm_trainer.telemetry.heartbeat import PULSE_SECONDS, pulse_file
from internlm_trainer.telemetry.stacks import SIGNAL, Stacks, parse_stacks, stacks_file

log = logging.getLogger(__name__)

DUMP_SECONDS = 3.0
RECORD_SECONDS = 5.0
SILENT_SECONDS = 3 * PULSE_SECONDS
UPLOAD_SECONDS = 20.0
_STATES = {
    "T": "it was stopped by a signal (SIGSTOP)",
    "t": "it is held by a debugger",
    "D": "it waits in the kernel for a device or a file system",
    "Z": "it has died and was not reaped",
}
_OOM_FILES = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))


class Found(NamedTuple):
    """A process as it was found."""

    state: str
    """The kernel's letter: R, S, D, T..."""
    stacks: Stacks | None
    """None where it did not answer."""
    silent: bool
    """Whether its interpreter stands still."""

    @property
    def waits_for_others(self) -> bool:
        return not self.silent and self.stacks is not None and self.stacks.in_collective

    @property
    def telling(self) -> str:
        """One line: what it does."""
        said = [_STATES[self.state]] if self.state in _STATES else []
        if self.silent and not said:
            said = ["a call holds its interpreter"]
        said += [
            f"in {self.stacks.telling}" if self.stacks else "it does not answer when asked for its stack"
        ]
        return "; ".join(said)


def look_into(pids: Mapping[int, int], folder: Path) -> dict[int, Found]:
    """Have processes, by rank, leave their stacks in `folder`; a stopped one goes on for that."""
    before = {rank: _size(stacks_file(folder, rank)) for rank in pids}
    states = {rank: _state(pid) for rank, pid in pids.items()}
    silent = {rank: _age(pulse_file(folder, rank)) > SILENT_SECONDS for rank in pids}
    asked = {rank for rank in pids if stacks_file(folder, rank).exists()}  # else the signal would end it
    for rank in asked:
        with suppress(ProcessLookupError):
            os.kill(pids[rank], SIGNAL)
            if states[rank] == "T":
                os.kill(pids[rank], signal.SIGCONT)
    _wait_for({stacks_file(folder, rank): before[rank] for rank in asked}, DUMP_SECONDS)
    return {rank: Found(states[rank], _stacks(folder, rank, before[rank]), silent[rank]) for rank in pids}


def culprit(beats: list[Beat], found: Mapping[int, Found]) -> Beat:
    """Who the others wait for: one that stands still, else who is behind, else who does not wait itself."""
    return min(
        (beat for beat in beats if beat.rank in found),
        key=lambda beat: (
            not found[beat.rank].silent,
            beat.progress,
            found[beat.rank].waits_for_others,
            beat.rank,
        ),
    )


def crash_of(folder: Path, rank: int) -> Stacks | None:
    """The stacks that a process left when a signal ended it."""
    stacks = _stacks(folder, rank, 0)
    return stacks if stacks and stacks.error else None


def take_flight_records(ranks: list[int], diagnostics: Path, folder: Path) -> None:
    """Have NCCL write down its last collectives and bring the records to `folder`; nothing without NCCL."""
    before = {}
    for rank in ranks:
        with suppress(OSError):
            pipe = os.open(diagnostics / f"{FLIGHT_RECORDER}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
            file = diagnostics / f"{FLIGHT_RECORDER}{rank}"
            file.unlink(missing_ok=True)
            before[file] = 0
            os.write(pipe, b"1\n")
            os.close(pipe)
    _wait_for(before, RECORD_SECONDS)
    for file in before:
        with suppress(OSError):
            shutil.copy(file, folder)


class Upload:
    """Brings what is in a folder to the store, from a thread: a store that does not answer holds up nobody."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        files = [file for file in sorted(folder.iterdir()) if file.is_file()]
        self._files = {file.name: content for file in files if (content := file.read_bytes())}
        self._thread = threading.Thread(target=self._run, name="evidence", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for name, content in self._files.items():
                with write_whole(join(self.url, name)) as target:
                    target.write(content)
        except Exception as error:
            log.warning("%s: stacks and records of the hang cannot be kept there: %s", self.url, error)

    def wait(self) -> None:
        """Until all is there, for a limited time."""
        self._thread.join(UPLOAD_SECONDS)


def out_of_memory_kills() -> int:
    """How many processes of this container the kernel has killed for its memory limit."""
    for file in _OOM_FILES:
        with suppress(OSError, ValueError):
            fields = dict(line.split(maxsplit=1) for line in file.read_text().splitlines())
            return int(fields.get("oom_kill", 0))
    return 0


def _stacks(folder: Path, rank: int, since: int) -> Stacks | None:
    with suppress(OSError):
        return parse_stacks(stacks_file(folder, rank).read_bytes()[since:].decode(errors="replace"))
    return None


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError as error:
        return "?" if error.errno != errno.ESRCH else "Z"


def _age(file: Path) -> float:
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return 0.0


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _wait_for(files: Mapping[Path, int], seconds: float) -> None:
    """Until each file is larger than it was and grows no more, for a limited time."""
    deadline, sizes = time.monotonic() + seconds, dict(files)
    while time.monotonic() < deadline:
        time.sleep(0.1)
        now = {file: _size(file) for file in files}
        if now == sizes and all(now[file] > files[file] for file in files):
            return
        sizes = now
