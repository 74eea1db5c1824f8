"""Where the Python of a process is, asked from outside, and what a crash leaves.

The handler is C (`faulthandler`) and takes no lock, so that it answers for a process whose interpreter is held
by a call that never returns.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
from pathlib import Path
from typing import NamedTuple

SIGNAL = signal.SIGUSR1
# Threads that sleep here wait for work, and say nothing about a hang.
_IDLE = (
    "threading.py",
    "queue.py",
    "selectors.py",
    "concurrent/futures/thread.py",
    "socketserver.py",
    "heartbeat.py",
)
_COLLECTIVE = "torch/distributed/"
_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<name>.*)$')
_FATAL = re.compile(r"^Fatal Python error: (.*)$", re.MULTILINE)


def stacks_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves its stacks, when asked for them by `SIGNAL` and when it crashes."""
    return folder / f"rank-{rank}.stacks"


def answer_for_stacks(rank: int) -> None:
    """In a training process: write the stacks of all threads when asked, and when a signal ends the process."""
    faulthandler.enable()
    folder = os.environ.get("INTERNLM_HEARTBEAT_DIR")
    if not folder:
        return
    try:
        # Stays open as long as the process: the handler needs the file's number.
        file = os.open(stacks_file(Path(folder), rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except OSError:
        return  # the heartbeats tell of it
    faulthandler.enable(file)
    faulthandler.register(SIGNAL, file)


class Frame(NamedTuple):
    """A line of a stack."""

    file: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} ({'/'.join(self.file.split('/')[-2:])}:{self.line})"


class Stacks(NamedTuple):
    """A process's threads when it was asked, or crashed."""

    error: str
    """What it died of, such as `Segmentation fault`; empty if it was only asked."""
    main: list[Frame]
    """The thread that got the signal: a crashed one, else the main one.  The innermost frame first."""
    others: list[list[Frame]]
    """Threads that are not idle."""

    @property
    def in_collective(self) -> bool:
        """Whether it waits for other ranks."""
        return any(_COLLECTIVE in frame.file for frame in self.main)

    @property
    def telling(self) -> str:
        """One line: where it is."""
        at = str(self.main[0]) if self.main else "no Python frame"
        busy = [str(frames[0]) for frames in self.others]
        others = f"; another thread in {busy[0]}" if busy else ""
        return f"{self.error}: {at}" if self.error else f"{at}{others}"


def parse_stacks(text: str) -> Stacks | None:
    """One dump of faulthandler's, or the crash that follows it; None where there is neither."""
    threads: list[tuple[bool, list[Frame]]] = []
    error = ""
    for line in text.splitlines():
        if found := _FATAL.match(line):
            error, threads = found[1], []
        elif line.endswith("(most recent call first):"):
            threads.append((line.startswith("Current thread"), []))
        elif threads and (frame := _FRAME.match(line)):
            threads[-1][1].append(Frame(frame["file"], int(frame["line"]), frame["name"]))
    if not threads:
        return None
    main = next((frames for current, frames in threads if current), threads[-1][1])
    others = [frames for _, frames in threads if frames is not main and frames and not _is_idle(frames[0])]
    return Stacks(error, main, others)


def _is_idle(frame: Frame) -> bool:
    return frame.file.endswith(_IDLE)
