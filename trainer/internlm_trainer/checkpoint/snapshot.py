"""A copy of one rank's state in host memory, laid out as its shard will be.

Saving takes the copy while the next step computes, which changes nothing of the state before its update, and writes
it while training goes on.  The memory is one shard, taken once and used again by every save; for a GPU it is
page-locked, so that copies run at the bus's speed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Self

import torch

from internlm_trainer.checkpoint.format import CHUNK, PieceEntry, aligned
from internlm_trainer.checkpoint.load import Checkpoint
from internlm_trainer.checkpoint.tensors import Piece, Want, as_tensor, dtype_name
from internlm_trainer.transfer import page_locked


class Snapshot:
    """The image of a shard: `pieces` says what lies where in its `bytes` bytes."""

    def __init__(self) -> None:
        self.pieces: tuple[PieceEntry, ...] = ()
        self._image = torch.zeros(0, dtype=torch.uint8)
        self._stream: torch.cuda.Stream | None = None
        self._on_device: torch.cuda.Event | None = None  # the end of the copies from there
        self._on_host: list[tuple[torch.Tensor, torch.Tensor]] = []  # (place, values) still to be copied

    @property
    def bytes(self) -> int:
        return len(self._image)

    def take(self, pieces: Iterable[Piece]) -> Self:
        """Copy the pieces as they are now; on return they may change."""
        self.begin(pieces)
        self.finish()
        return self

    def begin(self, pieces: Iterable[Piece]) -> None:
        """Start to copy the pieces as they are after what their device has to do so far.

        Until `finish` has returned nothing else may change them than what comes after a `hold`.
        """
        found = list(pieces)
        self.prepare(found)
        pairs = [
            (view, as_tensor(piece.tensor)) for piece, view in zip(found, self._views(found), strict=True)
        ]
        self._on_host = [pair for pair in pairs if not pair[1].is_cuda]
        self._on_device = None
        if on_device := [pair for pair in pairs if pair[1].is_cuda]:
            device = on_device[0][1].device
            self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                for view, values in on_device:
                    view.copy_(values, non_blocking=True)
                self._on_device = self._stream.record_event()

    def finish(self) -> None:
        """Wait until all is copied, which may be in another thread."""
        for view, values in self._on_host:
            view.copy_(values)
        if self._on_device and self._stream:
            # Waiting makes a context on the thread's device, which is the first one until it is set.
            with torch.cuda.device(self._stream.device):
                self._on_device.synchronize()

    @property
    def of_host(self) -> bool:
        """Whether some of it is copied in `finish`, and not by a device."""
        return bool(self._on_host)

    def hold(self) -> tuple[torch.cuda.Event, torch.cuda.Event] | None:
        """Make what the device is given from here on wait for its copies, and not the host.

        Returns between which events it waits; None where no device copies.
        """
        if not self._on_device:
            return None
        stream = torch.cuda.current_stream()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record(stream)
        stream.wait_event(self._on_device)
        ended.record(stream)
        return began, ended

    def restore(self, checkpoint: Checkpoint, pieces: Iterable[Piece]) -> None:
        """Load the pieces of any layout's checkpoint; those on a device by way of the image.

        Raises what `Checkpoint.load` does.
        """
        found = list(pieces)
        if any(as_tensor(piece.tensor).is_cuda for piece in found):
            self.prepare(found)
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

    def prepare(self, pieces: Sequence[Piece]) -> None:
        """Have the memory for copies of these pieces, which takes seconds for gigabytes; nothing if it is there."""
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
        devices = {as_tensor(piece.tensor).device for piece in pieces}
        gpu = next((device for device in devices if device.type == "cuda"), None)
        self.pieces = tuple(entries)
        self._image = page_locked(end, torch.uint8, gpu) if gpu else torch.zeros(end, dtype=torch.uint8)

    def _views(self, pieces: Sequence[Piece]) -> list[torch.Tensor]:
        views = []
        for entry, piece in zip(self.pieces, pieces, strict=True):
            values = as_tensor(piece.tensor)
            views.append(self._image[entry.offset : entry.offset + values.nbytes].view(values.dtype))
        return views

    def release(self) -> None:
        """Give the memory back."""
        self.pieces, self._image = (), torch.zeros(0, dtype=torch.uint8)


def _wait_for_copies(pieces: Iterable[Piece]) -> None:
    for device in {as_tensor(piece.tensor).device for piece in pieces}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
