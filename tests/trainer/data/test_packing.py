"""Rows: what a plain packer, written out below, would make of the same samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_trainer.data.packing import (
    IGNORED,
    Packing,
    Row,
    pack,
    row_count,
    row_parts,
    sequence_bounds,
    shuffled,
)

ID = st.integers(1, 500) | st.integers(-500, -1)
SAMPLES = st.lists(st.lists(ID, max_size=30), min_size=1, max_size=25)


def packed(samples: list[list[int]], row_tokens: int, seq_len: int, packing: Packing) -> list[Row]:
    """All rows of samples that are in order already, each found on its own, the last one first."""
    arrays = [np.array(sample, dtype=np.int64) for sample in samples]
    ends = np.cumsum([len(sample) for sample in samples])
    rows = []
    for row in reversed(range(row_count(int(ends[-1]), row_tokens))):
        parts = row_parts(ends, row, row_tokens)
        rows.append(pack([arrays[part.place] for part in parts], parts, seq_len, packing, 3))
    return rows[::-1]


def plainly_packed(
    samples: list[list[int]], row_tokens: int, seq_len: int, packing: Packing
) -> list[dict[str, list[int]]]:
    """The reference: token by token, with no arithmetic."""
    rows: list[dict[str, list[int]]] = []
    row: dict[str, list[int]] = {"tokens": [], "labels": [], "starts": [], "positions": []}
    for sample in samples:
        for index, token in enumerate(sample):
            begins = not row["tokens"] or (index == 0 and packing == "documents")
            position = 0 if begins else row["positions"][-1] + 1
            if position == seq_len:
                position = 0
            if position == 0:
                row["starts"].append(len(row["tokens"]))
            following = sample[index + 1] if index + 1 < len(sample) else 0
            row["tokens"].append(abs(token))
            row["labels"].append(following if following > 0 else -100)
            row["positions"].append(position)
            if len(row["tokens"]) == row_tokens:
                rows.append(row)
                row = {"tokens": [], "labels": [], "starts": [], "positions": []}
    return rows


@pytest.mark.parametrize("packing", ["documents", "contiguous"])
@given(samples=SAMPLES, row_tokens=st.integers(1, 60), seq_len=st.integers(1, 40))
def test_rows_are_those_of_the_plain_packer(
    packing: Packing, samples: list[list[int]], row_tokens: int, seq_len: int
) -> None:
    rows = packed(samples, row_tokens, seq_len, packing)
    expected = plainly_packed(samples, row_tokens, seq_len, packing)
    assert len(rows) == len(expected)
    for row, plain in zip(rows, expected, strict=True):
        assert row.tokens.tolist() == plain["tokens"]
        assert row.labels.tolist() == plain["labels"]
        assert row.positions.tolist() == plain["positions"]
        assert row.cu_seqlens.tolist() == [*plain["starts"], row_tokens]
        assert row.source == 3


@pytest.mark.parametrize("packing", ["documents", "contiguous"])
@given(samples=SAMPLES, row_tokens=st.integers(1, 60), seq_len=st.integers(1, 40))
def test_every_token_is_in_one_row_but_for_the_tail(
    packing: Packing, samples: list[list[int]], row_tokens: int, seq_len: int
) -> None:
    rows = packed(samples, row_tokens, seq_len, packing)
    stream = [abs(token) for sample in samples for token in sample]
    kept = [token for row in rows for token in row.tokens.tolist()]
    assert kept == stream[: len(kept)]
    assert len(stream) - len(kept) < row_tokens


@pytest.mark.parametrize("packing", ["documents", "contiguous"])
@given(samples=SAMPLES, row_tokens=st.integers(1, 60), seq_len=st.integers(1, 40))
def test_a_row_has_the_promised_shapes_and_no_sequence_is_too_long(
    packing: Packing, samples: list[list[int]], row_tokens: int, seq_len: int
) -> None:
    for row in packed(samples, row_tokens, seq_len, packing):
        assert row.tokens.shape == row.labels.shape == row.positions.shape == (row_tokens,)
        assert {row.tokens.dtype, row.labels.dtype, row.positions.dtype} == {np.dtype(np.int64)}
        assert row.cu_seqlens.dtype == np.int32
        lengths = np.diff(row.cu_seqlens)
        assert (lengths > 0).all()
        assert row.max_seqlen == lengths.max() <= seq_len
        assert row.cu_seqlens[0] == 0
        assert row.cu_seqlens[-1] == row_tokens


def test_a_negative_id_is_input_without_loss_and_documents_do_not_predict_each_other() -> None:
    (row,) = packed([[1, -5, -6, 7, 8], [1, 9]], 7, 4, "documents")
    assert row.tokens.tolist() == [1, 5, 6, 7, 8, 1, 9]
    assert row.labels.tolist() == [IGNORED, IGNORED, 7, 8, IGNORED, 9, IGNORED]
    assert row.cu_seqlens.tolist() == [0, 4, 5, 7]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 0, 1]


def test_contiguous_windows_take_no_notice_of_documents() -> None:
    (row,) = packed([[1, 5, 6, 7, 8], [1, 9]], 7, 4, "contiguous")
    assert row.cu_seqlens.tolist() == [0, 4, 7]
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert row.labels.tolist() == [5, 6, 7, 8, IGNORED, 9, IGNORED]


def test_a_sample_that_goes_on_in_the_next_row_predicts_its_first_token_there() -> None:
    first, second = packed([[1, 5, 6, 7]], 2, 2, "documents")
    assert (first.tokens.tolist(), first.labels.tolist()) == ([1, 5], [5, 6])
    assert (second.tokens.tolist(), second.labels.tolist()) == ([6, 7], [7, IGNORED])


def test_bounds_of_long_parts_fall_every_seq_len() -> None:
    assert sequence_bounds([5, 2, 4], 2, "documents").tolist() == [0, 2, 4, 5, 7, 9, 11]
    assert sequence_bounds([5, 2, 4], 4, "contiguous").tolist() == [0, 4, 8, 11]


@given(count=st.integers(0, 200), seed=st.integers(0, 2**31))
def test_a_shuffle_is_a_permutation_and_the_same_for_the_same_seed(count: int, seed: int) -> None:
    order = shuffled(count, seed)
    assert sorted(order.tolist()) == list(range(count))
    assert order.tolist() == shuffled(count, seed).tolist()


def test_the_shuffle_is_internlms() -> None:
    """Which is `numpy.random.RandomState(1024).shuffle(indices)`; the numbers are any NumPy's."""
    indices = np.arange(10)
    np.random.RandomState(1024).shuffle(indices)
    assert shuffled(10, 1024).tolist() == indices.tolist() == [2, 3, 7, 0, 6, 8, 5, 4, 9, 1]
