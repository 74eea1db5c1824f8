"""Weights from any known format as a checkpoint, which jobs start from and every command reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from torch import Tensor

from internlm_trainer.checkpoint import CheckpointStore
from internlm_trainer.checkpoint.folder import Folder
from internlm_trainer.checkpoint.format import CHUNK, PieceEntry, aligned
from internlm_trainer.checkpoint.load import stored_steps
from internlm_trainer.checkpoint.tensors import as_bytes
from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.storage import join, user_errors, write_whole
from internlm_trainer.weights.archive import Progress
from internlm_trainer.weights.layout import as_matrix, parameters
from internlm_trainer.weights.source import MASTER, TOKENIZER, Weights, ahead, blocks

JOB, STEP, WHAT = "import", 0, "OUT"
LARGEST_SHARD = 4 << 30  # bytes


def import_weights(
    weights: Weights,
    out: str,
    tokenizer: Tokenizer | None,
    context: int | None,
    progress: Progress = lambda _: None,
    largest: int = LARGEST_SHARD,
) -> str:
    """Write a checkpoint of the weights, in fp32 and without optimizer states, below `out` (path or URL); its URL.

    tokenizer, context: what those who read it are told, as far as it is known.

    It is there when it is whole: an import that was interrupted is none.  progress: hears bytes.  Raises UserError for
    a folder that holds checkpoints already, SaveFailed, and what reading the weights does.
    """
    if stored_steps(Folder(out, what=WHAT))[0]:
        raise UserError(f"{WHAT}: {out} holds checkpoints already; give another folder")
    sizes = parameters(weights.shape)
    store = CheckpointStore(out, weights.shape._asdict(), keep=1, job=JOB)
    entries = [
        store.write_shard(STEP, number, _Shard(weights, names, progress))
        for number, names in enumerate(_shards(sizes, largest))
    ]
    state: dict[str, object] = {} if context is None else {"seqLen": context}
    if tokenizer is not None:
        state["tokenizer"] = join(out, TOKENIZER)
        with user_errors(join(out, TOKENIZER), WHAT), write_whole(join(out, TOKENIZER)) as file:
            file.write(tokenizer.model)
    return store.commit(STEP, entries, state, sizes).uri


def _shards(sizes: dict[str, tuple[int, ...]], largest: int) -> list[list[str]]:
    """Parameters in order, in as few files of at most `largest` bytes as that allows; none is cut."""
    shards, bytes_ = [list[str]()], 0
    for name, size in sizes.items():
        if shards[-1] and bytes_ + 4 * prod(size) > largest:
            shards.append([])
            bytes_ = 0
        shards[-1].append(name)
        bytes_ += 4 * prod(size)
    return shards


class _Shard:
    """A shard that is read while it is written."""

    def __init__(self, weights: Weights, names: Sequence[str], progress: Progress) -> None:
        self._weights, self._progress = weights, progress
        self.pieces: list[PieceEntry] = []
        self.bytes = 0
        for name in names:
            count, start = prod(parameters(weights.shape)[name]), aligned(self.bytes)
            self.pieces.append(PieceEntry(MASTER, name, 0, count, "float32", start))
            self.bytes = start + 4 * count

    def chunks(self) -> Iterator[memoryview]:
        """All bytes, `CHUNK` at a time."""
        chunk, filled = bytearray(CHUNK), 0
        for data in self._data():
            done = 0
            while done < len(data):
                part = data[done : done + CHUNK - filled]
                chunk[filled : filled + len(part)] = part
                done, filled = done + len(part), filled + len(part)
                if filled == CHUNK:
                    yield memoryview(chunk)
                    chunk, filled = bytearray(CHUNK), 0
        if filled:
            yield memoryview(chunk)[:filled]

    def _data(self) -> Iterator[memoryview]:
        """The same bytes as they come, the next ones being read meanwhile."""
        end = 0
        for piece, first, values in ahead(self._read, self._blocks()):
            if first == 0:
                yield memoryview(bytes(piece.offset - end))
                end = piece.offset + 4 * (piece.stop - piece.start)
            yield as_bytes(values.flatten())
            self._progress(values.nbytes)

    def _blocks(self) -> Iterator[tuple[PieceEntry, int, int]]:
        for piece in self.pieces:
            rows, columns = as_matrix(parameters(self._weights.shape)[piece.parameter])
            for first, last in blocks(columns, 0, rows):
                yield piece, first, last

    def _read(self, block: tuple[PieceEntry, int, int]) -> tuple[PieceEntry, int, Tensor]:
        piece, first, last = block
        return piece, first, self._weights.rows(piece.parameter, first, last)
