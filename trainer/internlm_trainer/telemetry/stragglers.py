"""Which rank is slower than the others, by the time that each spends on its own computing."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

# Cards of a kind differ by some per cent; a throttled or shared one by far more.
SLOW = 1.2
# In so many measurements in a row: the evaluation of one rank, or another's page fault, is no straggler.
LASTING = 3


class Slowest(NamedTuple):
    """The rank that computed longest, and how many times as long as the median rank."""

    rank: int
    score: float


def slowest(times: Sequence[int]) -> Slowest | None:
    """Of the ranks' times; None where there is nothing to compare, as when a GPU's times are not known yet."""
    middle = median(times) if len(times) > 1 else 0
    if not middle:
        return None
    rank = max(range(len(times)), key=lambda rank: times[rank])
    return Slowest(rank, times[rank] / middle)


class Stragglers:
    """Tells a rank that stays slow from one that was held up once."""

    def __init__(self) -> None:
        self._rank, self._count = -1, 0

    def look(self, found: Slowest | None) -> Slowest | None:
        """The straggler after this measurement, if there is one."""
        rank = found.rank if found and found.score >= SLOW else -1
        self._count = self._count + 1 if rank == self._rank else 1
        self._rank = rank
        return found if rank >= 0 and self._count >= LASTING else None
