"""Tensors as bytes and back: the one place where a checkpoint touches torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from internlm_trainer.checkpoint.format import ITEM_SIZES, Elements

Array = torch.Tensor | NDArray[np.generic]

assert sys.byteorder == "little", "shards are little-endian, and memory is written as it is"


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of the flattened `parameter`'s state of a `kind`, to be saved.

    `tensor`: 1-D, on any device, `[stop - start]`.
    """

    kind: str
    parameter: str
    start: int
    stop: int
    tensor: Array


@dataclass(frozen=True)
class Want:
    """Elements [start, stop) of the flattened `parameter`'s state of a `kind`, to be read into `out`.

    `out`: 1-D, contiguous, in host memory, `[stop - start]`, of the type that was saved.
    """

    kind: str
    parameter: str
    start: int
    stop: int
    out: Array

    @property
    def elements(self) -> Elements:
        return Elements(self.kind, self.parameter, self.start, self.stop)


def as_tensor(array: Array) -> torch.Tensor:
    """The same memory as a tensor."""
    return array if isinstance(array, torch.Tensor) else torch.from_numpy(array)


def dtype_name(array: Array) -> str:
    """The name of an array's type as the manifest writes it, such as `bfloat16`."""
    name = str(array.dtype).removeprefix("torch.")
    assert name in ITEM_SIZES, f"{name} has no place in a checkpoint"
    return name


def as_bytes(array: Array) -> memoryview:
    """The bytes of a 1-D contiguous array in host memory, shared with it.  numpy has no bfloat16, so torch's
    tensors go through a view of bytes."""
    if isinstance(array, torch.Tensor):
        assert array.device.type == "cpu", "copy it to host memory first"
        assert array.dim() == 1
        assert array.is_contiguous()
        return array.detach().view(torch.uint8).numpy().data
    assert array.ndim == 1
    assert array.flags.c_contiguous
    return array.view(np.uint8).data
