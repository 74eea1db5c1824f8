"""Who holds what under Hybrid ZeRO: pure arithmetic, no communication.

The data-parallel ranks form a mesh of four levels, the fastest first, from the degrees p, g and o (each a divisor
of the next):

    level        size       neighbours share
    parameters   p          one copy of the parameters
    gradients    g / p      one copy of the accumulated gradients, together with the level before
    optimizer    o / g      one copy of master weights and optimizer states, together with the levels before
    replicas     W / o      nothing: they hold the same

A bucket of S elements (padded to a multiple of o) is cut level by level, so each rank's optimizer shard lies
inside its gradient shard and that inside its parameter shard.  Reduction therefore is a reduce-scatter along each
level and an all-reduce along the last, and the way back is an all-gather along each: every byte moves over the
narrowest group that can use it.  InternLM's `zero1=8` is (1, 1, 8), FSDP is (W, W, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

LEVELS = ("parameters", "gradients", "optimizer", "replicas")


class Span(NamedTuple):
    """Elements [start, stop) of a flat buffer."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def part(self, index: int, count: int) -> Span:
        """The index-th of `count` equal parts."""
        size = self.size // count
        return Span(self.start + index * size, self.start + (index + 1) * size)

    def meet(self, other: Span) -> Span | None:
        """What both have in common, or None."""
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return Span(start, stop) if start < stop else None


class ZeroLayout(NamedTuple):
    """Degrees p | g | o | world_size."""

    world_size: int
    parameters: int
    gradients: int
    optimizer: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Ranks along each level of `LEVELS`; their product is the world size."""
        return (
            self.parameters,
            self.gradients // self.parameters,
            self.optimizer // self.gradients,
            self.world_size // self.optimizer,
        )

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """A rank's index along each level."""
        found = []
        for size in self.sizes:
            found.append(rank % size)
            rank //= size
        a, b, c, d = found
        return a, b, c, d

    def groups(self, level: int) -> list[list[int]]:
        """Every group of ranks along a level, each in order of their index along it."""
        stride = prod(self.sizes[:level])
        size = self.sizes[level]
        starts = (r for r in range(self.world_size) if (r // stride) % size == 0)
        return [[start + i * stride for i in range(size)] for start in starts]

    def spans(self, rank: int, padded: int) -> tuple[Span, Span, Span]:
        """A rank's parameter, gradient and optimizer shard of a bucket of `padded` elements."""
        a, b, c, _ = self.coordinates(rank)
        parameters = Span(0, padded).part(a, self.sizes[0])
        gradients = parameters.part(b, self.sizes[1])
        return parameters, gradients, gradients.part(c, self.sizes[2])


class Entry(NamedTuple):
    """A parameter's place in its bucket."""

    name: str
    shape: tuple[int, ...]
    span: Span


class BucketLayout(NamedTuple):
    """Parameters side by side in one flat buffer; the decayed ones come first, so that each rank's shard has at
    most one piece that decays and one that does not."""

    entries: tuple[Entry, ...]
    decayed: Span
    padded: int

    def pieces(self, span: Span) -> list[tuple[Entry, Span]]:
        """The parts of parameters inside `span`: (entry, elements of the bucket)."""
        met = ((entry, entry.span.meet(span)) for entry in self.entries)
        return [(entry, part) for entry, part in met if part]


def bucket_layout(
    parameters: Sequence[tuple[str, tuple[int, ...]]], decayed: Sequence[bool], multiple: int
) -> BucketLayout:
    """Lay out (name, shape) pairs in one bucket padded to `multiple` elements."""
    order = sorted(range(len(parameters)), key=lambda i: not decayed[i])
    entries: list[Entry] = []
    end = decay_end = 0
    for i in order:
        name, shape = parameters[i]
        entries.append(Entry(name, shape, Span(end, end + prod(shape))))
        end = entries[-1].span.stop
        if decayed[i]:
            decay_end = end
    return BucketLayout(tuple(entries), Span(0, decay_end), -(-end // multiple) * multiple)
