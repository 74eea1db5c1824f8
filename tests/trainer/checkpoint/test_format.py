"""The format by itself: plans of reads, manifests, what must cover what, and which steps go."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_trainer.checkpoint.errors import BadCheckpoint
from internlm_trainer.checkpoint.format import (
    CHUNK,
    ITEM_SIZES,
    Elements,
    Index,
    Manifest,
    PieceEntry,
    ShardEntry,
    aligned,
    canonical_json,
    decode,
    digest,
    encode,
    parse_step,
    step_name,
    uncovered,
)
from internlm_trainer.checkpoint.retention import superseded
from internlm_trainer.errors import UserError

ITEM = {"float32": np.dtype("<f4"), "int64": np.dtype("<i8"), "uint8": np.dtype("u1")}


def cut(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """Any partition of [0, size)."""
    bounds = sorted({0, size, *draw(st.lists(st.integers(1, max(size - 1, 1)), max_size=6))})
    return [(a, b) for a, b in pairwise(bounds) if b <= size]


@st.composite
def saved(
    draw: st.DrawFn,
) -> tuple[dict[str, np.ndarray], dict[str, bytes], list[ShardEntry], list[Elements]]:
    """Parameters, cut anyhow and written by any of n ranks in any order; wants, cut anyhow."""
    values, files, entries, wants = {}, {}, {}, []
    ranks = draw(st.integers(1, 4))
    parts: list[tuple[int, str, int, int]] = []
    for name in ("a", "b", "c")[: draw(st.integers(1, 3))]:
        dtype = ITEM[draw(st.sampled_from(sorted(ITEM)))]
        size = draw(st.integers(1, 200))
        values[name] = np.random.default_rng(draw(st.integers(0, 99))).bytes(size * dtype.itemsize)
        values[name] = np.frombuffer(values[name], dtype)
        parts += [(draw(st.integers(0, ranks - 1)), name, *bounds) for bounds in cut(draw, size)]
        wants += [Elements("master", name, *bounds) for bounds in cut(draw, size)]
    for rank in range(ranks):
        data, pieces = b"", []
        for _, name, start, stop in draw(st.permutations([part for part in parts if part[0] == rank])):
            data += bytes(aligned(len(data)) - len(data))
            pieces.append(PieceEntry("master", name, start, stop, values[name].dtype.name, len(data)))
            data += values[name][start:stop].tobytes()
        files[f"{rank}"] = data
        entries[rank] = ShardEntry(f"{rank}", len(data), (), tuple(pieces))
    return values, files, list(entries.values()), draw(st.permutations(wants))


@settings(max_examples=200, deadline=None)
@given(saved(), st.sampled_from([1, 4, 64, 1024]), st.integers(1, 5))
def test_what_any_ranks_saved_any_other_ranks_read_back_to_the_bit(case, chunk, chunks):
    values, files, entries, wants = case
    assert uncovered({name: v.shape for name, v in values.items()}, entries) is None
    out = [np.zeros((want.stop - want.start) * values[want.parameter].itemsize, np.uint8) for want in wants]
    written = [np.zeros(len(buffer), int) for buffer in out]
    chunks_read: set[tuple[str, int]] = set()
    for read in Index(entries).plan(wants, chunk, chunks * chunk):
        whole = range(read.start, read.stop, chunk)
        assert len(whole) <= chunks
        assert read.start % chunk == 0
        assert read.stop % chunk == 0 or read.stop == len(files[read.file])
        assert not chunks_read & {(read.file, start) for start in whole}
        chunks_read |= {(read.file, start) for start in whole}
        data = np.frombuffer(files[read.file][read.start : read.stop], np.uint8)
        for copy in read.copies:
            to = slice(copy.to, copy.to + copy.stop - copy.start)
            out[copy.want][to] = data[copy.start - read.start : copy.stop - read.start]
            written[copy.want][to] += 1
    for want, buffer, times in zip(wants, out, written, strict=True):
        assert buffer.tobytes() == values[want.parameter][want.start : want.stop].tobytes()
        assert (times == 1).all()


def shard(*pieces: PieceEntry) -> ShardEntry:
    return ShardEntry("shard-00000.bin", 10**9, (), pieces)


def piece(start: int, stop: int, parameter: str = "w", kind: str = "master", offset: int = 0) -> PieceEntry:
    return PieceEntry(kind, parameter, start, stop, "uint8", offset)


def test_pieces_side_by_side_are_read_at_once_and_distant_ones_apart():
    entries = [shard(piece(0, 10, offset=0), piece(10, 20, offset=64), piece(20, 30, offset=5000))]
    reads = Index(entries).plan([Elements("master", "w", 0, 30)], chunk=100, largest=200)
    assert [(read.start, read.stop) for read in reads] == [(0, 100), (5000, 5100)]


def test_only_the_chunk_that_holds_the_wanted_bytes_of_a_large_piece_is_read():
    reads = Index([shard(piece(0, 10**9))]).plan([Elements("master", "w", 10**7, 10**7 + 10)])
    assert [(read.start, read.stop) for read in reads] == [(2 * CHUNK, 3 * CHUNK)]


def test_elements_that_nobody_saved_cannot_be_planned():
    with pytest.raises(KeyError, match="has no element 10"):
        Index([shard(piece(0, 10))]).plan([Elements("master", "w", 5, 11)])


@pytest.mark.parametrize(
    ("pieces", "sentence"),
    [
        ([piece(0, 10)], None),
        ([piece(4, 10), piece(0, 4)], None),
        ([piece(0, 4), piece(6, 10)], "elements 4 to 6 of master of w are missing"),
        ([piece(0, 6), piece(4, 10)], "elements 4 to 6 of master of w are written twice"),
        ([piece(0, 10), piece(0, 10)], "elements 0 to 10 of master of w are written twice"),
        ([piece(0, 8)], "master of w ends at element 8 of 10"),
        ([piece(0, 10), piece(0, 3, kind="exp_avg")], "exp_avg of w ends at element 3 of 10"),
        ([piece(0, 10), piece(0, 10, "v")], "shard-00000.bin holds v, which is no parameter"),
    ],
)
def test_every_element_of_every_kind_must_be_written_exactly_once(pieces, sentence):
    assert uncovered({"w": (2, 5)}, [shard(*pieces)]) == sentence


def test_a_kind_that_lacks_a_whole_parameter_is_not_covered():
    pieces = shard(piece(0, 10), piece(0, 3, "v"), piece(0, 3, "v", kind="exp_avg"))
    sentence = uncovered({"w": (10,), "v": (3,)}, [pieces])
    assert sentence == "w has ['master'] alone, and others have 2 kinds"


def test_parameters_of_different_optimizers_have_different_kinds():
    pieces = [piece(0, 10), piece(0, 3, "v"), piece(0, 3, "v", kind="exp_avg"), piece(0, 10, kind="momentum")]
    assert uncovered({"w": (10,), "v": (3,)}, [shard(*pieces)]) is None
    pieces[-1] = piece(0, 9, kind="momentum")
    assert uncovered({"w": (10,), "v": (3,)}, [shard(*pieces)]) == "momentum of w ends at element 9 of 10"


def manifest(state: object = None, step: int = 100) -> Manifest:
    return Manifest(
        job="job",
        step=step,
        created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        model={"layers": 2, "norm_eps": 1e-6, "attention_bias": True},
        world_size=2,
        parameters={"w": (2, 5)},
        state={"loader": state},
        shards=(ShardEntry("shard-00000.bin", 10, ("0",), (piece(0, 10),)),),
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(json_values)
def test_a_manifest_is_read_as_it_was_written(state):
    written = manifest(state)
    data, found = encode(written)
    assert decode(data, "step") == (written, found)


def test_a_state_with_integer_keys_can_be_verified_though_json_makes_them_strings():
    data, _ = encode(manifest({9: "a", 10: "b"}))
    assert decode(data, "step")[0].state == {"loader": {"9": "a", "10": "b"}}


def test_a_state_that_is_not_json_is_refused_when_it_is_written():
    with pytest.raises(ValueError, match="JSON"):
        encode(manifest(float("nan")))


def test_a_manifest_cut_off_anywhere_is_noticed():
    data, _ = encode(manifest())
    for end in range(len(data)):
        with pytest.raises(BadCheckpoint, match=r"manifest.json is (cut off or )?damaged"):
            decode(data[:end], "step")


def test_any_flipped_bit_in_a_manifest_is_noticed_unless_it_means_the_same():
    data, found = encode(manifest([1.5e-7, "text"]))
    unnoticed = []
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert decode(bytes(flipped), "step") == (manifest([1.5e-7, "text"]), found)
            unnoticed.append(chr(flipped[bit // 8]))
        except BadCheckpoint:
            pass
    assert set(unnoticed) == {"E"}  # 1E-06 is 1e-06


def test_a_checkpoint_of_a_newer_format_is_not_taken_for_a_damaged_one():
    data = encode(manifest())[0]
    content = json.loads(data) | {"format": 3}
    del content["digest"]
    content["digest"] = digest(canonical_json(content))
    with pytest.raises(UserError, match="is of format 3 and this version reads format 2: resume with"):
        decode(canonical_json(content), "step-00000100")


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00000100", 100),
        ("step-123456789", 123456789),
        ("step-100", None),
        ("step-000000100", None),
        ("step-0000010x", None),
        ("old-step-00000100", None),
        ("manifest.json", None),
    ],
)
def test_only_folders_that_a_save_makes_are_steps(name, step):
    assert parse_step(name) == step
    assert step is None or step_name(step) == name


@pytest.mark.parametrize(
    ("committed", "unfinished", "newest", "keep", "refused", "removed"),
    [
        ([10], [], 10, 1, [], []),
        ([10, 20, 30], [], 30, 2, [], [10]),
        ([10, 20, 30], [], 30, 1, [], [10, 20]),
        ([10, 20], [5, 15], 20, 2, [], [5, 15]),  # left by a save that was killed
        ([10, 20], [30], 20, 2, [], []),  # may be under way
        ([10, 15, 20], [], 15, 1, [], [10]),  # a newer one that could not be read when the job resumed
        ([10, 15, 20], [], 15, 2, [20], [20]),  # one that did not verify
        ([10, 20, 30], [], 30, 2, [20], [20]),  # which takes no whole one's place
    ],
)
def test_old_checkpoints_go_when_a_new_one_is_there(committed, unfinished, newest, keep, refused, removed):
    assert superseded(committed, unfinished, newest, keep, refused=refused) == removed


@pytest.mark.parametrize(
    ("verified", "removed"), [(None, [10, 20, 30]), (20, [10, 30]), (40, [10, 20, 30]), (5, [10, 20, 30])]
)
def test_the_newest_one_that_is_known_to_be_whole_stays_until_a_newer_one_is(verified, removed):
    assert superseded([10, 20, 30, 40], [], 40, 1, verified=verified) == removed


def run_of(saves: list[int], keep: int, keep_every: int) -> set[int]:
    """What is left after a job has saved these steps."""
    there: set[int] = set()
    for step in saves:
        there |= {step}
        there -= set(superseded(there, [], step, keep, keep_every))
    return there


@pytest.mark.parametrize(
    ("saves", "keep", "keep_every", "left"),
    [
        (range(10, 101, 10), 2, 30, {30, 60, 90, 100}),
        (range(10, 101, 10), 1, 10, set(range(10, 101, 10))),
        ([10, 23, 37, 41, 52, 66, 71], 1, 20, {23, 41, 66, 71}),  # saves that came late
        ([10, 100], 1, 30, {100}),
    ],
)
def test_the_first_checkpoint_of_each_span_is_kept_for_ever(saves, keep, keep_every, left):
    assert run_of(list(saves), keep, keep_every) == left


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(1, 4), st.integers(1, 50))
def test_what_is_kept_for_ever_does_not_depend_on_when_one_looks(saves, keep, keep_every):
    order = sorted(saves)
    firsts = {
        min(s for s in order if s // keep_every == span) for span in {s // keep_every for s in order} - {0}
    }
    assert run_of(order, keep, keep_every) == firsts | set(order[-keep:])


@given(
    st.sets(st.integers(0, 20)),
    st.sets(st.integers(0, 20)),
    st.integers(0, 20),
    st.integers(1, 5),
    st.sets(st.integers(0, 20)),
)
def test_removal_never_takes_the_checkpoint_just_committed_nor_too_many(
    committed, unfinished, newest, keep, refused
):
    committed, unfinished, refused = (
        committed | {newest},
        unfinished - committed - {newest},
        refused - {newest},
    )
    gone = superseded(committed, unfinished, newest, keep, refused=refused)
    good = {step for step in committed - refused if step <= newest}
    assert newest not in gone
    assert len(good - set(gone)) == min(keep, len(good))
    assert all(step < newest or step in refused for step in gone)


def test_sizes_of_types_are_those_of_torch():
    assert {name: getattr(torch, name).itemsize for name in ITEM_SIZES} == ITEM_SIZES
