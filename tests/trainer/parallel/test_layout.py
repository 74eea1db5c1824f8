"""Who holds what, for every legal layout."""

from __future__ import annotations

from math import prod

from hypothesis import given
from hypothesis import strategies as st

from internlm_trainer.parallel.layout import Span, ZeroLayout, bucket_layout


@st.composite
def layouts(draw: st.DrawFn) -> ZeroLayout:
    """Degrees each of which divides the next, up to 96 ranks."""
    p, g, o, world = 1, 1, 1, 1
    p = draw(st.sampled_from([1, 2, 3, 4]))
    g = p * draw(st.sampled_from([1, 2, 3]))
    o = g * draw(st.sampled_from([1, 2, 4]))
    world = o * draw(st.sampled_from([1, 2]))
    return ZeroLayout(world, p, g, o)


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
    for level in range(4):
        groups = layout.groups(level)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        for group in groups:
            # in the order of the index along the level, and equal in all other coordinates
            assert [layout.coordinates(rank)[level] for rank in group] == list(range(len(group)))
            others = {c[:level] + c[level + 1 :] for c in map(layout.coordinates, group)}
            assert len(others) == 1


@given(layouts())
def test_a_copy_of_the_parameters_is_held_by_consecutive_ranks(layout: ZeroLayout) -> None:
    for group in layout.groups(0):
        assert group == list(range(group[0], group[0] + layout.parameters))


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
