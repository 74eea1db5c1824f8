"""A copy of one rank's state in host memory, laid out as its shard will be.

Saving takes the copy at a step's end and writes it while training goes on.  The memory is one shard, taken once
and used again by every save; for a GPU it is page-locked, so that copies run at the bus's speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import torch

from internlm_trainer.checkpoint.format import CHUNK, PieceEntry, aligned
from internlm_trainer.checkpoint.load import Checkpoint
from internlm_trainer.checkpoint.tensors import Piece, Want, as_tensor, dtype_name


class Snapshot:
    """The image of a shard: `pieces` says what lies where in its `bytes` bytes."""

    def __init__(self) -> None:
        self.pieces: tuple[PieceEntry, ...] = ()
        self._image = torch.zeros(0, dtype=torch.uint8)
        self._pinned = False

    @property
    def bytes(self) -> int:
        return len(self._image)

    def take(self, pieces: Iterable[Piece]) -> Self:
        """Copy the pieces as they are now; on return they may change."""
        found = list(pieces)
        self._lay_out(found)
        for piece, view in zip(found, self._views(found), strict=True):
            view.copy_(as_tensor(piece.tensor), non_blocking=True)
        _wait_for_copies(found)
        return self

    def restore(self, checkpoint: Checkpoint, pieces: Iterable[Piece]) -> None:
        """Load the pieces of any layout's checkpoint; those on a device by way of the image.

        Raises what `Checkpoint.load` does.
        """
        found = list(pieces)
        if any(as_tensor(piece.tensor).is_cuda for piece in found):
            self._lay_out(found)
            buffers: Sequence[torch.Tensor] = self._views(found)
        else:
            buffers = [as_tensor(piece.tensor) for piece in found]
        checkpoint.load(
            [
                Want(piece.kind, piece.parameter, piece.start, piece.stop, buffer)
                for piece, buffer in zip(found, buffers, strict=True)
            ]
        )
        for piece, buffer in zip(found, buffers, strict=True):
            if buffer is not piece.tensor:
                as_tensor(piece.tensor).copy_(buffer, non_blocking=True)
        _wait_for_copies(found)

    def chunks(self) -> Iterator[memoryview]:
        """The image, `CHUNK` bytes at a time."""
        whole = self._image.numpy().data
        for start in range(0, len(whole), CHUNK):
            yield whole[start : start + CHUNK]

    def _lay_out(self, pieces: Sequence[Piece]) -> None:
        entries, end = [], 0
        for piece in pieces:
            assert 0 <= piece.start < piece.stop
            assert len(piece.tensor) == piece.stop - piece.start
            start = aligned(end)
            entries.append(
                PieceEntry(
                    piece.kind, piece.parameter, piece.start, piece.stop, dtype_name(piece.tensor), start
                )
            )
            end = start + as_tensor(piece.tensor).nbytes
        if tuple(entries) == self.pieces:
            return
        self.release()
        self.pieces, self._image = tuple(entries), torch.zeros(end, dtype=torch.uint8)
        if end and any(as_tensor(piece.tensor).is_cuda for piece in pieces):
            # Not torch.empty(pin_memory=True), which takes the next power of two of bytes.
            _check(_cuda().cudaHostRegister(self._image.data_ptr(), end, 0))
            self._pinned = True

    def _views(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        views = []
        for entry, piece in zip(self.pieces, pieces, strict=True):
            values = as_tensor(piece.tensor)
            views.append(self._image[entry.offset : entry.offset + values.nbytes].view(values.dtype))
        return views

    def release(self) -> None:
        """Give the memory back."""
        if self._pinned:
            _check(_cuda().cudaHostUnregister(self._image.data_ptr()))
        self.pieces, self._image, self._pinned = (), torch.zeros(0, dtype=torch.uint8), False


def _wait_for_copies(pieces: Iterable[Piece]) -> None:
    for device in {as_tensor(piece.tensor).device for piece in pieces}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(error: Any) -> None:
    torch.cuda.check_error(int(error))
