"""The bytes that one rank sends in a step, inside its node and to other nodes.

Every collective is counted as its ring or tree must send at least: (n - 1) / n of the whole for a reduce-scatter or
an all-gather among n ranks, twice that for an all-reduce (Chan et al., "Collective communication", 2007).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from internlm_trainer.parallel.layout import (
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    REPLICAS,
    ZeroLayout,
)
from internlm_trainer.plan.memory import FP32, Work


class Sent(NamedTuple):
    """Bytes that a rank sends."""

    inside: int = 0
    """To ranks of its own node."""
    across: int = 0
    """To other nodes."""

    def __add__(self, other: object) -> Sent:
        assert isinstance(other, Sent)
        return Sent(self.inside + other.inside, self.across + other.across)

    def times(self, count: int) -> Sent:
        return Sent(self.inside * count, self.across * count)


class Traffic(NamedTuple):
    """What one rank sends in one step, by purpose."""

    gradients: Sent
    """Reduce-scatters of gradients and the all-reduce across their groups."""
    updated: Sent
    """All-gathers of updated parameters, under the next forward pass."""
    gathered: Sent
    """All-gathers of sharded parameters, forward and backward, in each micro-batch."""

    @property
    def total(self) -> Sent:
        return self.gradients + self.updated + self.gathered


def traffic(work: Work, layout: ZeroLayout) -> Traffic:
    """What one rank sends in one step under a layout."""
    # Sums across groups are 1/o of the bytes, and stay fp32 for o > 1.
    across = work.sent if layout.optimizer == 1 else FP32
    gradients = updated = gathered = Sent()
    for unit in work.units:
        padded = unit.padded(layout.optimizer)
        whole = work.gradient_buffers(layout, unit).whole
        within = _scattered(layout, padded * work.sent, (PARAMETERS, GRADIENTS))
        rest = _scattered(layout, padded // layout.gradients * work.sent, (OPTIMIZER,))
        summed = _scattered(layout, padded // layout.optimizer * across, (REPLICAS,)).times(2)
        once = within.times(1 if whole else work.micro_batches) + rest + summed
        gradients += once.times(unit.copies)
        to_gather = padded // layout.parameters * work.width
        updated += _scattered(layout, to_gather, (GRADIENTS, OPTIMIZER)).times(unit.copies)
        # An embedding's backward reads no weights, and the head stays between forward and backward.
        uses = 1 if unit.name in ("embedding", "head") else 2
        each = _scattered(layout, padded * work.width, (PARAMETERS,))
        gathered += each.times(unit.copies * uses * work.micro_batches)
    return Traffic(gradients, updated, gathered)


def _scattered(layout: ZeroLayout, size: int, kinds: Sequence[int]) -> Sent:
    """What one rank sends to scatter `size` bytes along the levels of `kinds`, or to gather them the other way."""
    total = Sent()
    for level in layout.levels:
        if level.kind in kinds:
            sent = size * (level.size - 1) // level.size
            size //= level.size
            # Of the n hops of a ring through k nodes, k lead to another node.
            nodes = nodes_of_a_group(layout.ranks_per_node or layout.world_size, level.size, level.stride)
            away = sent * nodes // level.size if nodes > 1 else 0
            total += Sent(sent - away, away)
    return total


@cache
def nodes_of_a_group(node: int, size: int, stride: int) -> int:
    """Nodes of `node` ranks that a group of a level has ranks on, at most."""
    if stride > node:
        return size
    last = (size - 1) * stride
    window = size * stride
    starts = (w * window + r for w in range(node) for r in range(stride))
    return max((start + last) // node - start // node + 1 for start in starts)
