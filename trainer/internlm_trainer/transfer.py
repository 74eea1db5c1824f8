"""Numbers and times between host and device, for neither of which the other waits."""

from __future__ import annotations

import time
import weakref
from typing import Any

import torch
from torch import Tensor


def page_locked(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[size]` zeros in host memory that `device` reads and writes at the bus's speed.

    Not pinned by PyTorch, which takes the next power of two of bytes.  Raises RuntimeError where there is no room.
    """
    values = torch.zeros(size, dtype=dtype)
    if size:
        with torch.cuda.device(device):  # that of a thread is the first one until it is set
            _check(_runtime().cudaHostRegister(values.data_ptr(), values.nbytes, 0))
        weakref.finalize(values, _unlock, values.data_ptr()).atexit = False
    return values


def _unlock(address: int) -> None:
    _check(_runtime().cudaHostUnregister(address))


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _check(error: Any) -> None:
    torch.cuda.check_error(int(error))


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device.  From pinned memory: from any other, it would wait for all that a GPU has to do before."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


class ToHost:
    """Numbers on their way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._arrived: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> list[float]:
        """Waits until they are there."""
        if self._arrived:
            self._arrived.synchronize()
        return list(map(float, self._values.tolist()))


class Moment:
    """When a device has done what it was given so far; on a CPU, now."""

    def __init__(self, device: torch.device) -> None:
        self._time = time.monotonic()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def since(self, earlier: Moment) -> float:
        """Seconds between two moments of a device, which both have passed."""
        if self._event and earlier._event:
            return float(earlier._event.elapsed_time(self._event)) / 1000
        return self._time - earlier._time
