"""A small file that says where a rank is: what tells a hung process from a slow one."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path

log = logging.getLogger(__name__)

PULSE_SECONDS = 0.5


def pulse_file(folder: Path, rank: int) -> Path:
    """A file that is touched as long as a rank's interpreter runs."""
    return folder / f"rank-{rank}.pulse"


def start_pulse(rank: int) -> None:
    """Touch this rank's pulse from now on; where it stops, no Python runs in this process, whatever it waits for."""
    folder = os.environ.get("INTERNLM_HEARTBEAT_DIR")
    if folder:
        file = pulse_file(Path(folder), rank)
        threading.Thread(target=_pulse, args=[file], name="pulse", daemon=True).start()


def _pulse(file: Path) -> None:
    while True:
        try:
            file.touch()
        except OSError:
            return  # the folder went with the agent
        time.sleep(PULSE_SECONDS)


class Heartbeat:
    """Writes `rank-N.json` in the folder INTERNLM_HEARTBEAT_DIR; does nothing without one.

    The file is JSON of `rank`, `pid`, `section` (`setup`, `prepare`, `data`, `fwd_bwd`, `reduce`, `optimizer`,
    `checkpoint`, `evaluation`, `done`...), `step` (steps done) and `time` (seconds since 1970, when the section
    began), and is whole at any moment.  A folder in memory is best: it is written at every change of section.
    """

    def __init__(self, rank: int) -> None:
        folder = os.environ.get("INTERNLM_HEARTBEAT_DIR")
        self._rank = rank
        self._file = Path(folder, f"rank-{rank}.json") if folder else None

    def beat(self, section: str, step: int) -> None:
        """This rank begins a section after `step` steps."""
        if self._file is None:
            return
        content = {
            "rank": self._rank,
            "pid": os.getpid(),
            "section": section,
            "step": step,
            "time": time.time(),
        }
        new = self._file.with_suffix(".new")
        try:
            new.write_text(json.dumps(content))
            new.replace(self._file)
        except OSError as error:
            log.warning("%s: cannot be written: %s; training goes on without heartbeats", self._file, error)
            self._file = None
