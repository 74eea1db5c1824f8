"""Cutting shuffled samples into rows.  Pure.

The samples of a file, shuffled, stand one after the other; every `row_tokens` of them are a row, and what is
left at the end is dropped.  A row is found by its number alone, from the running sum of the lengths.  Rows,
bounds and labels are those of InternLM's packed data sets (`internlm/data/packed_dataset.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

IGNORED = -100
"""The label of a token that carries no loss."""

Packing = Literal["documents", "contiguous"]


class Row(NamedTuple):
    """What a rank processes in one micro-batch; T = tokens of a row, S = its sequences.

    tokens: int64 [T], input ids.
    labels: int64 [T], the id that follows in the same sample, or IGNORED.
    cu_seqlens: int32 [S + 1], where sequences start, and T; attention stays inside a sequence.
    positions: int64 [T], counted from each sequence's start.
    max_seqlen: length of the longest sequence.
    source: which source the row is from.
    """

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    positions: NDArray[np.int64]
    max_seqlen: int
    source: int

    @property
    def learned(self) -> int:
        """Tokens that carry loss."""
        return int((self.labels != IGNORED).sum())

    def head(self, tokens: int) -> Row:
        """Its first tokens, as a row of its own."""
        inside = np.minimum(self.cu_seqlens, tokens)
        bounds = inside[: int((self.cu_seqlens < tokens).sum()) + 1]
        return Row(
            self.tokens[:tokens],
            self.labels[:tokens],
            bounds,
            self.positions[:tokens],
            int((bounds[1:] - bounds[:-1]).max()),
            self.source,
        )


class Part(NamedTuple):
    """Tokens [start, stop) of the sample at `place` in the shuffled order."""

    place: int
    start: int
    stop: int


def shuffled(count: int, seed: int | Sequence[int]) -> NDArray[np.int64]:
    """A permutation of `count` numbers.

    NumPy promises that this old generator gives the same numbers for ever, so a job resumes under any
    version; and for a file's samples they are InternLM's.
    """
    return np.random.RandomState(seed).permutation(count).astype(np.int64)


def row_count(tokens: int, row_tokens: int) -> int:
    """Whole rows in `tokens` tokens."""
    return tokens // row_tokens


def row_parts(ends: NDArray[np.int64], row: int, row_tokens: int) -> list[Part]:
    """What row number `row` consists of, in order.

    `ends` [samples] is the running sum of the lengths in shuffled order.  Samples without tokens are in no
    row.
    """
    first_token, end_token = row * row_tokens, (row + 1) * row_tokens
    first = int(np.searchsorted(ends, first_token, side="right"))
    last = int(np.searchsorted(ends, end_token, side="left"))
    stops = ends[first : last + 1]
    starts = np.concatenate(([ends[first - 1] if first else 0], stops[:-1]))
    lows = np.maximum(starts, first_token) - starts
    highs = np.minimum(stops, end_token) - starts
    return [
        Part(first + index, int(low), int(high))
        for index, (low, high) in enumerate(zip(lows, highs, strict=True))
        if low < high
    ]


def sequence_bounds(lengths: Sequence[int], seq_len: int, packing: Packing) -> NDArray[np.int32]:
    """`cu_seqlens` of a row whose parts have these lengths; no sequence is longer than `seq_len`.

    `documents`: every part is a sequence, or several if it is too long.  `contiguous`: the row is cut every
    `seq_len` tokens, whatever stands there.
    """
    if packing == "contiguous":
        lengths = [sum(lengths)]
    bounds, end = [0], 0
    for length in lengths:
        bounds.extend(range(end + seq_len, end + length, seq_len))
        end += length
        bounds.append(end)
    return np.array(bounds, dtype=np.int32)


def pack(
    samples: Sequence[NDArray[np.int64]], parts: Sequence[Part], seq_len: int, packing: Packing, source: int
) -> Row:
    """The row of `parts`; `samples` are the whole samples that they are from, ids as in the file.

    An id's sign only says whether it is learned: the label is the next id of the sample if that is positive,
    else IGNORED, and so is that of a sample's last token.
    """
    cut = list(zip(samples, parts, strict=True))
    ids = np.concatenate([sample[part.start : part.stop] for sample, part in cut])
    following = np.zeros_like(ids)
    following[:-1] = ids[1:]
    end = 0
    for sample, part in cut:
        end += part.stop - part.start
        following[end - 1] = sample[part.stop] if part.stop < len(sample) else 0
    lengths = [part.stop - part.start for part in parts]
    bounds = sequence_bounds(lengths, seq_len, packing)
    sequence_lengths = np.diff(bounds)
    return Row(
        tokens=np.abs(ids),
        labels=np.where(following > 0, following, IGNORED),
        cu_seqlens=bounds,
        positions=np.arange(len(ids), dtype=np.int64) - np.repeat(bounds[:-1], sequence_lengths),
        max_seqlen=int(sequence_lengths.max()),
        source=source,
    )
