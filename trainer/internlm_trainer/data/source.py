"""One source of tokenized data: its files, and where its n-th row is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from internlm_trainer.data.bin_format import BinFile, Ids, open_bins
from internlm_trainer.data.packing import Part, row_count, row_parts, shuffled
from internlm_trainer.errors import UserError

K = TypeVar("K")
T = TypeVar("T")

# The streams of random numbers for rows and for samples must differ; the samples' is InternLM's.
_ROW_STREAM = 1
# Rows of the epoch that ends and of the one that starts are asked for in one step.
_CACHED_EPOCHS = 2


class Place(NamedTuple):
    """A row: the epoch, the file's number, and the row's number in the file's order of that epoch."""

    epoch: int
    file: int
    row: int


class Source:
    """Files of one source, cut into rows.

    In each epoch every file's samples are shuffled and cut into rows, and the rows of all files are shuffled.
    The sample order of an epoch takes 16 bytes of memory a sample.
    """

    def __init__(self, files: Sequence[BinFile], row_tokens: int, seed: int) -> None:
        self.files = list(files)
        self._row_tokens, self._seed = row_tokens, seed
        self._first_rows = np.cumsum([0] + [row_count(file.tokens, row_tokens) for file in files])
        self._row_orders: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._sample_orders: OrderedDict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64]]] = (
            OrderedDict()
        )

    @property
    def rows(self) -> int:
        """Rows of one epoch."""
        return int(self._first_rows[-1])

    @property
    def tokens(self) -> int:
        """Tokens in all files, with those that an epoch leaves over."""
        return sum(file.tokens for file in self.files)

    @cached_property
    def fingerprint(self) -> str:
        """Names the data: the same wherever the folder lies, another one for other samples or lengths."""
        digest = xxhash.xxh3_128()
        for file in self.files:
            digest.update(f"{file.name}\0{len(file.lengths)}\0".encode())
            digest.update(file.starts.tobytes())
            digest.update(file.lengths.tobytes())
        return "xxh3:" + digest.hexdigest()

    def place(self, number: int) -> Place:
        """Where the source's row `number` is, counted over all epochs."""
        epoch, index = divmod(number, self.rows)
        row = int(self._row_order(epoch)[index])
        file = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return Place(epoch, file, row - int(self._first_rows[file]))

    def cut(self, place: Place) -> tuple[list[int], list[Part]]:
        """What the row consists of: the numbers in the file of its samples, and the part of each."""
        order, ends = self._sample_order(place.epoch, place.file)
        parts = row_parts(ends, place.row, self._row_tokens)
        return [int(order[part.place]) for part in parts], parts

    def read(self, samples: Sequence[tuple[int, int]], vocab_size: int) -> list[Ids]:
        """The ids of whole samples (file, number in the file), checked against meta and vocabulary."""
        if not samples:
            return []
        lines = self.files[0].ranges.read([self.files[file].byte_range(number) for file, number in samples])
        return [
            self.files[file].parse(number, line, vocab_size)
            for (file, number), line in zip(samples, lines, strict=True)
        ]

    def _row_order(self, epoch: int) -> NDArray[np.int64]:
        return _cached(
            self._row_orders,
            epoch,
            _CACHED_EPOCHS,
            lambda: shuffled(self.rows, [self._seed, epoch, _ROW_STREAM]),
        )

    def _sample_order(self, epoch: int, file: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(samples in shuffled order, running sum of their lengths)."""

        def make() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            order = shuffled(len(self.files[file].lengths), self._seed + epoch)
            return order, np.cumsum(self.files[file].lengths[order])

        return _cached(self._sample_orders, (epoch, file), _CACHED_EPOCHS * len(self.files), make)


def open_source(url: str, row_tokens: int, seed: int, field: str) -> Source:
    """The source at a path or URL.  Raises UserError if it is missing, empty, broken or shorter than a
    row.
    """
    source = Source(open_bins(url, field), row_tokens, seed)
    if source.rows == 0:
        what = f"{url} has {source.tokens} tokens"
        if source.tokens >= row_tokens:
            largest = max(file.tokens for file in source.files)
            what = f"the largest of the {len(source.files)} files of {url} has {largest} tokens"
        raise UserError(
            f"{field}: {what}, but a row needs {row_tokens} (training.microBatchSize x model.seqLen, or "
            "training.microBatchTokens); give more data, or make the row shorter"
        )
    return source


def _cached(cache: OrderedDict[K, T], key: K, size: int, make: Callable[[], T]) -> T:
    if key in cache:
        cache.move_to_end(key)
    else:
        cache[key] = make()
        if len(cache) > size:
            cache.popitem(last=False)
    return cache[key]
