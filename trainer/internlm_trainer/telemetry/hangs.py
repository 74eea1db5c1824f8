"""When a rank hangs: decided from what its heartbeats say, by limits that follow the measured step.

Pure: times are those of the watcher's own monotonic clock, so a machine whose clock is set does not matter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

STEP_SECTIONS = ("data", "fwd_bwd", "reduce", "optimizer")
# Rank 0 makes data from raw text in this one, which may take a day.
UNLIMITED = ("prepare",)
# A step may take this many times the slowest recent one: a hiccup of storage or network is no hang.
SLOWER = 10.0
RECENT_STEPS = 32
# Until then a step compiles kernels and fills caches, and the limit of the set-up holds.
FIRST_STEPS = 2
# A watcher that was itself stopped for longer than this has not seen what the ranks did meanwhile.
ASLEEP_SECONDS = 5.0


class Beat(NamedTuple):
    """A rank's heartbeat file."""

    rank: int
    pid: int
    section: str
    step: int

    @property
    def progress(self) -> tuple[int, int]:
        """Larger for who is further.  `step` grows within `optimizer`; what follows belongs to the next step."""
        if self.section in ("setup", *UNLIMITED):
            return -1, 0
        in_step = self.section in STEP_SECTIONS
        return self.step, STEP_SECTIONS.index(self.section) + 1 if in_step else 0

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return self.section if self.progress[0] < 0 else f"step {self.step}, {self.section}"


def parse_beat(content: Mapping[str, Any]) -> Beat:
    """Raises KeyError, TypeError or ValueError for what is no heartbeat."""
    return Beat(int(content["rank"]), int(content["pid"]), str(content["section"]), int(content["step"]))


class Limits(NamedTuple):
    """Seconds that a rank may stay in a section; 0: for ever."""

    setup: float
    """Before the first steps are done, and after the last one."""
    step: float
    """In a section of a step, at least; `SLOWER` times the slowest recent step where that is more."""
    checkpoint: float
    """In a checkpoint, an evaluation, or anything else between two steps; as `step`, where that is more."""


@dataclass
class _Seen:
    beat: Beat
    since: float
    step_since: float


class Late(NamedTuple):
    """The rank that the others wait for, and how long it has been where it is."""

    beat: Beat
    seconds: float
    limit: float


class Watch:
    """Sees the heartbeats of one attempt's ranks on one machine."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._seen: dict[int, _Seen] = {}
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)
        self._counted = 0
        self._looked = float("-inf")

    def look(self, beats: Iterable[Beat], now: float) -> Late | None:
        """Take in the heartbeats as they are `now`; who is furthest behind, if it is over its limit."""
        slept = now - self._looked if self._seen else 0.0
        if slept > ASLEEP_SECONDS:
            for seen in self._seen.values():
                seen.since, seen.step_since = seen.since + slept, seen.step_since + slept
        self._looked = now
        there = set()
        for beat in beats:
            self._take(beat, now)
            there.add(beat.rank)
        self._seen = {rank: seen for rank, seen in self._seen.items() if rank in there}
        if not self._seen:
            return None
        last = min(self._seen.values(), key=lambda seen: (seen.beat.progress, seen.since, seen.beat.rank))
        limit, seconds = self.limit(last.beat.section), now - last.since
        return Late(last.beat, seconds, limit) if seconds > limit else None

    def _take(self, beat: Beat, now: float) -> None:
        seen = self._seen.get(beat.rank)
        if seen is None:
            self._seen[beat.rank] = _Seen(beat, now, now)
        elif beat != seen.beat:
            steps = beat.step - seen.beat.step
            if steps > 0:
                if seen.beat.progress[0] >= 0 and beat.section != "done":
                    self._steps.append((now - seen.step_since) / steps)
                    self._counted += steps
                seen.step_since = now
            elif seen.beat.progress[0] < 0:
                seen.step_since = now  # the first step begins
            seen.beat, seen.since = beat, now

    def limit(self, section: str) -> float:
        """Seconds that a rank may stay in `section`, from what was seen so far."""
        if section in UNLIMITED:
            return float("inf")
        if section in ("setup", "done") or self._counted < FIRST_STEPS * len(self._seen):
            asked = self._limits.setup
        else:
            asked = self._limits.step if section in STEP_SECTIONS else self._limits.checkpoint
        slowest = max(self._steps, default=0.0)
        return max(asked, SLOWER * slowest) if asked else float("inf")
