"""What the steps since the last log line had, added up where it is: losses on the device, counts on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from internlm_trainer.data.packing import Row
from internlm_trainer.telemetry.flops import causal_pairs
from internlm_trainer.transfer import ToHost, to_device


class Sums(NamedTuple):
    """The tallies of all ranks together."""

    losses: list[float | None]
    """Mean loss of each source's tokens, in nats; None for a source without any."""
    pairs: int
    """Pairs of positions that attention saw."""


class Tally:
    """Losses of each source and attention's work, of one rank's rows."""

    def __init__(self, sources: int, device: torch.device) -> None:
        self._losses = torch.zeros(sources, dtype=torch.float64, device=device)
        self._labels = [0] * sources
        self._pairs = 0

    def add(self, row: Row, loss: Tensor) -> None:
        """Count a row; `loss` is the sum of its tokens' losses, 0-dim on the device."""
        self._losses[row.source] += loss
        self._labels[row.source] += row.learned
        self._pairs += causal_pairs(row.cu_seqlens)

    def reduce(self, common: Tensor) -> Reading:
        """`common` and the tallies of all ranks, by one reduction and one transfer; starts anew.

        `common` is 1-dim on the device and the same on all ranks.  Waits for nothing.  Every rank calls it.
        """
        counts = torch.tensor([*self._labels, self._pairs], dtype=torch.float64)
        sums = torch.cat((self._losses, to_device(counts, self._losses.device)))
        dist.all_reduce(sums)
        reading = Reading(ToHost(torch.cat((common.double(), sums))), len(common))
        self._losses.zero_()
        self._labels, self._pairs = [0] * len(self._labels), 0
        return reading


class Reading(NamedTuple):
    """What `Tally.reduce` found, on its way to the host."""

    numbers: ToHost
    common: int
    """How many of them come first."""

    def read(self) -> tuple[list[float], Sums]:
        """(`common`, tallies); waits for the device."""
        found = self.numbers.read()
        shared, (*numbers, pairs) = found[: self.common], found[self.common :]
        sources = len(numbers) // 2
        sums = zip(numbers[:sources], numbers[sources:], strict=True)
        return shared, Sums([loss / labels if labels else None for loss, labels in sums], int(pairs))


def source_names(paths: Sequence[str]) -> list[str]:
    """A short name for each source: the last part of its path, or as many parts as tell the paths apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path}#{number}" for number, path in enumerate(paths)]
