"""Samples as lines of a `.bin`, many at once.

Writing numbers as JSON one by one costs a tenth of what finding them costs (SentencePiece takes about a
microsecond a token), so the text of every id is looked up in a table instead, eight bytes each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from internlm_trainer.data.bin_format import PREFIX, SUFFIX
from internlm_trainer.data.tokenizer import Tokenizer


class Lines(NamedTuple):
    """Lines of a `.bin`: their bytes one after the other, and of each its bytes and its ids (int64)."""

    content: bytes
    sizes: NDArray[np.int64]
    tokens: NDArray[np.int64]


class LineEncoder:
    """Texts to lines; every sample begins with `<s>`, and ends with `</s>` if `eos`."""

    def __init__(self, tokenizer: Tokenizer, *, eos: bool = False, exact: bool = True) -> None:
        self._tokenizer, self._exact = tokenizer, exact
        self._first = np.array([tokenizer.bos], dtype=np.int32)
        self._last = np.array([tokenizer.eos] if eos else [], dtype=np.int32)
        self._words, self._widths = _table(tokenizer.vocab_size)

    def encode(self, texts: Sequence[str], threads: int = 1) -> Lines:
        """A line for each text."""
        samples = self._tokenizer.encode_arrays(texts, threads, exact=self._exact)
        if not samples:
            return Lines(b"", np.zeros(0, np.int64), np.zeros(0, np.int64))
        ids = np.concatenate([part for sample in samples for part in (self._first, sample, self._last)])
        tokens = np.array([len(sample) for sample in samples]) + len(self._first) + len(self._last)
        ends = np.cumsum(tokens)
        words = self._words[ids].view(np.uint8)
        text = words[words != 0].tobytes()
        stops = np.cumsum(np.add.reduceat(self._widths[ids], ends - tokens, dtype=np.int64))
        starts = np.concatenate(([0], stops[:-1])) + len(b", ")
        parts: list[bytes] = []
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            parts += (PREFIX, text[start:stop], SUFFIX)
        sizes = stops - starts + len(PREFIX) + len(SUFFIX)
        return Lines(b"".join(parts), sizes, tokens)


def _table(vocab_size: int) -> tuple[NDArray[np.void], NDArray[np.uint8]]:
    """(the text of `, ID` filled with zeros to a multiple of eight bytes, and its length) for each id."""
    words = [f", {token}".encode() for token in range(vocab_size)]
    size = -(-len(words[-1]) // 8) * 8
    table = np.array(words, dtype=f"S{size}").view(np.uint64 if size == 8 else f"V{size}")
    return table, np.array([len(word) for word in words], dtype=np.uint8)
