"""Weights that are there, under the trainer's names, whatever they are kept in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from internlm_trainer.checkpoint import Checkpoint, Piece, Want
from internlm_trainer.checkpoint.folder import Folder
from internlm_trainer.checkpoint.load import in_parallel
from internlm_trainer.checkpoint.tensors import as_tensor
from internlm_trainer.config import ModelShape
from internlm_trainer.errors import UserError
from internlm_trainer.weights.files import DTYPES, TensorAt, read, refusal
from internlm_trainer.weights.layout import Place, Stored, as_matrix, parameters, places

S = TypeVar("S")
T = TypeVar("T")
BLOCK = 2 << 20  # elements of a block: 8 MiB in fp32
AHEAD = 4  # blocks that are read, verified and rounded while one is written
MASTER, TOKENIZER = "master", "tokenizer.model"


class Weights(Protocol):
    """A model's weights.

    url: for messages.  context: the longest sequence that the model knows.  tokenizer: URL of its model file.  Either
    is None where it is not told.
    """

    url: str
    shape: ModelShape
    context: int | None
    tokenizer: str | None

    def rows(self, parameter: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a parameter as a matrix, fp32 `[stop - start, columns]`."""
        ...


class CheckpointWeights:
    """The weights of a checkpoint of any layout, or another kind of its states."""

    def __init__(self, checkpoint: Checkpoint, kind: str = MASTER) -> None:
        self.checkpoint, self.url, self.kind = checkpoint, checkpoint.committed.uri, kind
        try:
            self.shape = ModelShape(**checkpoint.manifest.model)
        except TypeError as error:
            raise UserError(f"{self.url} is a checkpoint of no InternLM model") from error
        if {**checkpoint.manifest.parameters} != parameters(self.shape):
            raise UserError(f"{self.url} is a checkpoint of no InternLM model")
        self.context: int | None = checkpoint.state.get("seqLen")
        self.tokenizer: str | None = checkpoint.state.get("tokenizer")

    def of(self, kind: str) -> CheckpointWeights:
        """Its states of another kind."""
        return CheckpointWeights(self.checkpoint, kind)

    def rows(self, parameter: str, start: int, stop: int) -> Tensor:
        columns = prod(self.checkpoint.manifest.parameters[parameter][1:])
        dtype = self.checkpoint.index.dtype(self.kind, parameter) or "float32"
        out = torch.empty((stop - start) * columns, dtype=getattr(torch, dtype))
        self.checkpoint.load([Want(self.kind, parameter, start * columns, stop * columns, out)])
        return out.view(-1, columns).float()


class StoredWeights:
    """Weights in the files of another format.

    stored: what each file should hold.  tables: what it does.
    """

    def __init__(
        self,
        folder: Folder,
        shape: ModelShape,
        stored: Mapping[str, list[Stored]],
        tables: Mapping[str, Mapping[str, TensorAt]],
        context: int | None = None,
    ) -> None:
        self.url, self.shape, self.context = folder.url, shape, context
        self.tokenizer = folder.uri(TOKENIZER) if TOKENIZER in folder.names() else None
        self._folder, self._tables = folder, tables
        for file, expected in stored.items():
            for one in expected:
                self._check(file, one)
            for name in tables[file].keys() - {one.name for one in expected}:
                if not name.endswith(".inv_freq"):  # of the rotary embedding: a constant
                    raise refusal(folder, file, f"holds {name}, which no InternLM model of this shape has")
        self._places = places(stored)

    def _check(self, file: str, expected: Stored) -> None:
        found = self._tables[file].get(expected.name)
        if found is None:
            raise refusal(self._folder, file, f"lacks {expected.name}; copy the folder again, whole")
        if found.shape != expected.shape:
            raise refusal(
                self._folder,
                file,
                f"holds {expected.name} of shape {list(found.shape)}, where the model has {list(expected.shape)}; "
                "give weights of this model",
            )
        if found.dtype not in DTYPES.values():
            name = str(found.dtype).removeprefix("torch.")
            raise refusal(
                self._folder,
                file,
                f"holds {expected.name} as {name}, which fp32 weights cannot hold as it is; give weights in float32, "
                "bfloat16 or float16",
            )

    def rows(self, parameter: str, start: int, stop: int) -> Tensor:
        columns = as_matrix(parameters(self.shape)[parameter])[1]
        out = torch.empty(stop - start, columns)
        for place in self._places[parameter]:
            first, last = max(start, place.slice.rows[0]), min(stop, place.slice.rows[1])
            if first < last:
                out[first - start : last - start, slice(*place.slice.columns)] = self._read(
                    place, first, last
                )
        return out

    def _read(self, place: Place, first: int, last: int) -> Tensor:
        """Rows [first, last) of the parameter from where a slice of it is kept."""
        table = self._tables[place.file][place.tensor]
        assert isinstance(table.dtype, torch.dtype)
        width = place.slice.columns[1] - place.slice.columns[0]
        row = place.row + first - place.slice.rows[0]
        begin = table.offset + row * width * table.dtype.itemsize
        end = begin + (last - first) * width * table.dtype.itemsize
        data = read(self._folder, place.file, begin, end)
        if len(data) != end - begin:
            raise refusal(self._folder, place.file, "is cut off; copy it again")
        return torch.frombuffer(bytearray(data), dtype=table.dtype).view(-1, width)


def blocks(columns: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) of a parameter with so many columns as [first, last) of blocks of at most `BLOCK` elements."""
    step = max(1, BLOCK // columns)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def ahead(work: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """`work(item)` for each item, in their order; the next `AHEAD` are at work while one is used."""
    coming: deque[Future[T]] = deque()
    with ThreadPoolExecutor(AHEAD) as pool:
        try:
            for item in items:
                coming.append(pool.submit(work, item))
                if len(coming) > AHEAD:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for one in coming:
                one.cancel()


def fill(weights: Weights, pieces: Iterable[Piece]) -> None:
    """Set each piece's tensor, on any device, to its elements of its parameter; several are read at a time."""
    in_parallel(lambda piece: _fill(weights, piece), pieces)


def _fill(weights: Weights, piece: Piece) -> None:
    out = as_tensor(piece.tensor)
    columns = as_matrix(parameters(weights.shape)[piece.parameter])[1]
    first, done = piece.start // columns, 0
    skipped = piece.start - first * columns
    for rows in blocks(columns, first, -(-piece.stop // columns)):
        block = weights.rows(piece.parameter, *rows)
        values = block.flatten()[skipped : skipped + len(out) - done]
        out[done : done + len(values)].copy_(values)
        done, skipped = done + len(values), 0
    assert done == piece.stop - piece.start
