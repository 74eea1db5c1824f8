"""Who holds what, for every legal layout."""

from __future__ import annotations

from math import prod
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_trainer.parallel.layout import (
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    REPLICAS,
    GradientBuffers,
    Level,
    Span,
    ZeroLayout,
    bucket_layout,
    gradient_buffers,
)


@st.composite
def layouts(draw: st.DrawFn) -> ZeroLayout:
    """Degrees each of which divides the next, up to 96 ranks, on nodes of any size, even ones that fit nothing."""
    p = draw(st.sampled_from([1, 2, 3, 4]))
    g = p * draw(st.sampled_from([1, 2, 3]))
    o = g * draw(st.sampled_from([1, 2, 4]))
    world = o * draw(st.sampled_from([1, 2]))
    return ZeroLayout(world, p, g, o, draw(st.one_of(st.just(0), st.integers(1, 12))))


@given(layouts(), st.integers(1, 50))
def test_each_kind_of_shard_covers_a_bucket_exactly_once_in_its_group(layout: ZeroLayout, scale: int) -> None:
    padded = layout.optimizer * scale
    degrees = (layout.parameters, layout.gradients, layout.optimizer)
    for kind, degree in enumerate(degrees):
        for start in range(0, layout.world_size, degree):
            spans = sorted(layout.spans(rank, padded)[kind] for rank in range(start, start + degree))
            assert [span.start for span in spans] == [i * padded // degree for i in range(degree)]
            assert spans[-1].stop == padded


@given(layouts(), st.integers(1, 50))
def test_shards_are_nested(layout: ZeroLayout, scale: int) -> None:
    for rank in range(layout.world_size):
        parameters, gradients, optimizer = layout.spans(rank, layout.optimizer * scale)
        assert parameters.meet(gradients) == gradients
        assert gradients.meet(optimizer) == optimizer


@given(layouts())
def test_the_groups_of_every_level_partition_the_ranks(layout: ZeroLayout) -> None:
    assert prod(layout.sizes) == layout.world_size
    sizes = [1, 1, 1, 1]
    for level in layout.levels:
        sizes[level.kind] *= level.size
        groups = layout.groups(level)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        for group in groups:
            # in the order of the place along the level, and at the same place along all others
            assert [level.place(rank) for rank in group] == list(range(level.size))
            others = {tuple(o.place(rank) for o in layout.levels if o != level) for rank in group}
            assert len(others) == 1
    assert tuple(sizes) == layout.sizes


@given(layouts())
def test_along_levels_within_a_degree_one_reaches_the_consecutive_ranks_that_share_a_copy(
    layout: ZeroLayout,
) -> None:
    for kind, degree in enumerate((layout.parameters, layout.gradients, layout.optimizer)):
        reached = {0}
        for level in layout.levels:
            if level.kind <= kind:
                reached = {r for group in layout.groups(level) if reached & set(group) for r in group}
        assert reached == set(range(degree))


def spans_nodes(layout: ZeroLayout, level: Level) -> bool:
    """Whether a group of the level has ranks on several nodes."""
    node = layout.ranks_per_node or layout.world_size
    return any(group[0] // node != group[-1] // node for group in layout.groups(level))


@given(layouts())
def test_a_cut_level_is_first_inside_nodes_then_across_them(layout: ZeroLayout) -> None:
    for kind in range(3):
        parts = [level for level in layout.levels if level.kind == kind]
        assert len(parts) <= 2
        if len(parts) == 2:
            assert [spans_nodes(layout, level) for level in parts] == [False, True]
    assert layout._replace(ranks_per_node=0).levels == layout._replace(ranks_per_node=96 * 12).levels


@pytest.mark.parametrize(
    ("layout", "levels"),
    [
        # the optimizer's 16 ranks on two nodes: 8 inside, then 2 across
        (ZeroLayout(16, 1, 1, 16, 8), [(OPTIMIZER, 8, 1), (OPTIMIZER, 2, 8)]),
        (ZeroLayout(32, 8, 8, 32, 8), [(PARAMETERS, 8, 1), (OPTIMIZER, 4, 8)]),
        (ZeroLayout(32, 2, 16, 16, 8), [(PARAMETERS, 2, 1), (GRADIENTS, 4, 2), (GRADIENTS, 2, 8), (REPLICAS, 2, 16)]),
        (ZeroLayout(16, 1, 1, 1, 8), [(REPLICAS, 16, 1)]),
        (ZeroLayout(6, 1, 1, 6, 4), [(OPTIMIZER, 2, 1), (OPTIMIZER, 3, 2)]),  # nodes that o does not fit
        (ZeroLayout(4, 1, 1, 4, 6), [(OPTIMIZER, 4, 1)]),  # one node, not full
        (ZeroLayout(1, 1, 1, 1, 1), []),
    ],
    ids=str,
)  # fmt: skip
def test_levels_by_example(layout: ZeroLayout, levels: list[tuple[int, int, int]]) -> None:
    assert [tuple(level) for level in layout.levels] == levels


@pytest.mark.parametrize(
    ("degrees", "accumulation", "offload", "micro_batches", "expected"),
    [
        # one GPU: gradients go where the optimizer reads them, however many micro-batches
        ((1, 1, 1, 1), "shards", False, 1, GradientBuffers(True, True, 0, 0)),
        ((1, 1, 1, 1), "shards", False, 4, GradientBuffers(True, True, 0, 0)),
        ((1, 1, 1, 1), "shards", True, 1, GradientBuffers(True, False, 0, 960)),
        ((1, 1, 1, 1), "shards", True, 4, GradientBuffers(True, False, 960, 0)),
        # ZeRO-1: a micro-batch alone needs nothing that stays
        ((8, 1, 1, 8), "shards", False, 1, GradientBuffers(True, False, 0, 960)),
        ((8, 1, 1, 8), "shards", False, 4, GradientBuffers(True, False, 960, 0)),
        ((8, 1, 1, 8), "full", False, 4, GradientBuffers(True, False, 960, 0)),
        # gradients sharded: every micro-batch passes through
        ((8, 1, 4, 8), "shards", False, 4, GradientBuffers(False, False, 240, 960)),
        ((8, 1, 8, 8), "shards", False, 4, GradientBuffers(False, True, 0, 960)),
        ((8, 1, 8, 8), "shards", True, 4, GradientBuffers(False, False, 120, 960)),
        ((8, 1, 8, 8), "full", False, 4, GradientBuffers(True, False, 960, 0)),
    ],
)
def test_where_gradients_are_kept(
    degrees: tuple[int, int, int, int],
    accumulation: Literal["shards", "full"],
    offload: bool,
    micro_batches: int,
    expected: GradientBuffers,
) -> None:
    layout = ZeroLayout(*degrees)
    found = gradient_buffers(
        layout, 960, accumulation=accumulation, offload=offload, micro_batches=micro_batches
    )
    assert found == expected


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans()), min_size=1, max_size=8),
    st.integers(1, 64),
)
def test_a_bucket_holds_every_parameter_once_and_the_decayed_ones_first(
    parameters: list[tuple[int, int, bool]], multiple: int
) -> None:
    shapes = [(f"p{i}", (a, b)) for i, (a, b, _) in enumerate(parameters)]
    decayed = [decay for *_, decay in parameters]
    bucket = bucket_layout(shapes, decayed, multiple)
    assert bucket.padded % multiple == 0
    assert {(entry.name, entry.shape) for entry in bucket.entries} == set(shapes)
    ends = [0, *(entry.span.stop for entry in bucket.entries)]
    assert [entry.span.start for entry in bucket.entries] == ends[:-1]
    assert bucket.padded - ends[-1] < multiple
    flags = dict(zip((name for name, _ in shapes), decayed, strict=True))
    for entry in bucket.entries:
        assert bool(bucket.decayed.meet(entry.span)) == flags[entry.name]
    assert sum(part.size for _, part in bucket.pieces(Span(0, bucket.padded))) == ends[-1]
