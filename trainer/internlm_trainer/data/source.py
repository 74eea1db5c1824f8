"""One source of tokenized data: its files, and where its n-th row is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from internlm_trainer.data.bin_format import BinFile, Ids, LocalCache, open_bins, parse_samples
from internlm_trainer.data.mapped import MappedArrays
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
    Samples of fewer than `min_length` tokens are in no row.  The sample order of an epoch takes 16 bytes a sample, of
    memory or in the files of `arrays`.
    """

    def __init__(
        self,
        files: Sequence[BinFile],
        row_tokens: int,
        seed: int,
        min_length: int = 0,
        arrays: MappedArrays | None = None,
    ) -> None:
        self.files = list(files)
        self._row_tokens, self._seed, self._min_length = row_tokens, seed, min_length
        self._arrays = arrays or MappedArrays(None)
        self.file_tokens = [self._kept_tokens(file) for file in files]
        """Tokens of each file that rows are made of."""
        self._first_rows = np.cumsum([0] + [row_count(tokens, row_tokens) for tokens in self.file_tokens])
        self._row_orders: OrderedDict[int, NDArray[np.int64]] = OrderedDict()
        self._sample_orders: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    def _kept_tokens(self, file: BinFile) -> int:
        if self._min_length <= 1:
            return file.tokens
        return int(file.lengths[file.lengths >= self._min_length].sum())

    @property
    def rows(self) -> int:
        """Rows of one epoch."""
        return int(self._first_rows[-1])

    @property
    def tokens(self) -> int:
        """Tokens in all files, with those that an epoch leaves over."""
        return sum(self.file_tokens)

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

    def prefetch(self, samples: Sequence[tuple[int, int]]) -> None:
        """Begin to fetch samples (file, number in the file) that `read` will be asked for."""
        if samples:
            self.files[0].ranges.prefetch([self.files[file].byte_range(number) for file, number in samples])

    def forget(self, samples: Sequence[tuple[int, int]]) -> None:
        """Let go of samples that `prefetch` was asked for and `read` was not, or will not be."""
        if samples:
            self.files[0].ranges.forget([self.files[file].byte_range(number) for file, number in samples])

    def read(self, samples: Sequence[tuple[int, int]], vocab_size: int) -> list[Ids]:
        """The ids of whole samples (file, number in the file), checked against meta and vocabulary."""
        if not samples:
            return []
        found = [(self.files[file], number) for file, number in samples]
        lines = self.files[0].ranges.read([file.byte_range(number) for file, number in found])
        return parse_samples(found, lines, vocab_size)

    def stop(self) -> None:
        """Let reads that wait for a store fail at once."""
        self.files[0].ranges.stop()

    def close(self) -> None:
        """Let go of threads and files."""
        self.files[0].ranges.close()

    def _row_order(self, epoch: int) -> NDArray[np.int64]:
        return _cached(
            self._row_orders,
            epoch,
            _CACHED_EPOCHS,
            lambda: shuffled(self.rows, [self._seed, epoch, _ROW_STREAM]),
        )

    def _sample_order(self, epoch: int, file: int) -> NDArray[np.int64]:
        """[2, samples]: the samples in shuffled order, and the running sum of their lengths."""

        def make() -> NDArray[np.int64]:
            lengths = self.files[file].lengths
            if self._min_length <= 1:
                order = shuffled(len(lengths), self._seed + epoch)
            else:
                kept = np.flatnonzero(lengths >= self._min_length)
                order = kept[shuffled(len(kept), self._seed + epoch)]
            return np.stack((order, np.cumsum(lengths[order])))

        def key(epoch: int) -> str:
            of = self.files[file]
            return f"order\0{of.url}\0{of.starts[-1]}\0{of.stamp}\0{self._seed + epoch}\0{self._min_length}"

        def get() -> NDArray[np.int64]:
            return self._arrays.get(key(epoch), make, instead_of=key(epoch - _CACHED_EPOCHS))

        return _cached(self._sample_orders, (epoch, file), _CACHED_EPOCHS * len(self.files), get)


def open_source(
    url: str,
    row_tokens: int,
    seed: int,
    field: str,
    min_length: int = 0,
    cache: LocalCache | None = None,
) -> Source:
    """The source at a path or URL.  Raises UserError if it is missing, empty, broken or shorter than a
    row.
    """
    cache = cache or LocalCache()
    source = Source(open_bins(url, field, cache), row_tokens, seed, min_length, cache.arrays)
    if source.rows == 0:
        what = f"{url} has {source.tokens} tokens"
        if min_length > 1:
            what += f" in samples of at least data.minLength {min_length}"
        if source.tokens >= row_tokens:
            largest = max(source.file_tokens)
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
