"""Where the time of a step goes, measured without making a GPU wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function


class Stopwatch:
    """Seconds of the named sections of a loop.

    A section's time is the host's, or with `on_device` the GPU's: from when it reaches the section's work to when
    that is done.  A GPU's times are taken by events and read when it has passed them, steps later if need be, so a
    section counts in the interval in which its time was read.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._totals: dict[str, float] = {}
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def section(self, name: str, *, on_device: bool = False) -> Iterator[None]:
        """Add the time of the block to `name`'s, and name it in traces."""
        if on_device and self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            with record_function(name):
                yield
            end.record()
            self._events.append((name, start, end))
            self._drain()
        else:
            began = time.perf_counter()
            with record_function(name):
                yield
            self._add(name, time.perf_counter() - began)

    def read(self) -> dict[str, float]:
        """The sections' seconds since the last call."""
        self._drain()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def total(self, name: str) -> float:
        """A section's seconds since the beginning."""
        return self._totals.get(name, 0.0)

    def _drain(self) -> None:
        while self._events and self._events[0][2].query():
            name, start, end = self._events.popleft()
            self._add(name, start.elapsed_time(end) / 1000)

    def _add(self, name: str, seconds: float) -> None:
        for sums in (self._seconds, self._totals):
            sums[name] = sums.get(name, 0.0) + seconds
