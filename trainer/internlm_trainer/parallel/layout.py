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

A level whose groups span nodes is cut in two, the part inside the node first.  So a reduce-scatter brings the bytes
down inside the node before the rest crosses the network, and an all-gather crosses it before it spreads inside.
Only the replicas' all-reduce stays whole, since NCCL's own is hierarchical already.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from typing import Literal, NamedTuple

ALIGNMENT = 64  # elements: keeps every shard of every bucket aligned for vector loads and for NCCL
LEVELS = ("parameters", "gradients", "optimizer", "replicas")
PARAMETERS, GRADIENTS, OPTIMIZER, REPLICAS = range(4)


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


class Level(NamedTuple):
    """One level of the mesh, or the part of one inside or across nodes."""

    kind: int
    """Index of `LEVELS`."""
    size: int
    """Ranks of a group."""
    stride: int
    """Distance between neighbouring ranks of a group."""

    def place(self, rank: int) -> int:
        """A rank's index in its group."""
        return rank // self.stride % self.size


class ZeroLayout(NamedTuple):
    """Degrees p | g | o | world_size."""

    world_size: int
    parameters: int
    gradients: int
    optimizer: int
    ranks_per_node: int = 0
    """Consecutive ranks that share a node; 0: all of them."""

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

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels of more than one rank, the fastest first, those that span nodes cut at the node's boundary."""
        found: list[Level] = []
        several_nodes = 0 < self.ranks_per_node < self.world_size
        stride = 1
        for kind, size in enumerate(self.sizes):
            inside = 1
            if several_nodes and kind != REPLICAS and self.ranks_per_node % stride == 0:
                inside = gcd(size, self.ranks_per_node // stride)
            for part in (inside, size // inside):
                if part > 1:
                    found.append(Level(kind, part, stride))
                stride *= part
        return tuple(found)

    def groups(self, level: Level) -> list[list[int]]:
        """Every group of ranks along a level, each in order of their index along it."""
        starts = (rank for rank in range(self.world_size) if level.place(rank) == 0)
        return [[start + i * level.stride for i in range(level.size)] for start in starts]

    def spans(self, rank: int, padded: int) -> tuple[Span, Span, Span]:
        """A rank's parameter, gradient and optimizer shard of a bucket of `padded` elements."""
        found, span = [], Span(0, padded)
        for kind in (PARAMETERS, GRADIENTS, OPTIMIZER):
            for level in self.levels:
                if level.kind == kind:
                    span = span.part(level.place(rank), level.size)
            found.append(span)
        parameters, gradients, optimizer = found
        return parameters, gradients, optimizer


class GradientBuffers(NamedTuple):
    """Where a bucket's gradients are between the backward pass and `master_grad`, in elements on one rank."""

    whole: bool
    """Micro-batches are added up before anything is reduced; otherwise after the reduce-scatter inside g."""
    in_place: bool
    """They are added up in `master_grad` itself, which has the same elements."""
    accumulated: int
    """fp32, kept from step to step; 0 where `in_place`, or where there is one micro-batch a step."""
    incoming: int
    """A micro-batch's gradient on its way into the reduction, in the type that is reduced.  At most two buckets
    have one at a time."""


def gradient_buffers(
    layout: ZeroLayout,
    padded: int,
    *,
    accumulation: Literal["shards", "full"],
    offload: bool,
    micro_batches: int,
) -> GradientBuffers:
    """The buffers of a bucket of `padded` elements in steps of `micro_batches`."""
    whole = accumulation == "full" or layout.gradients == 1
    elements = padded if whole else padded // layout.gradients
    in_place = not offload and elements == padded // layout.optimizer
    kept = 0 if in_place or micro_batches == 1 else elements
    passing = 0 if whole and (in_place or micro_batches > 1) else padded
    return GradientBuffers(whole, in_place, kept, passing)


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
