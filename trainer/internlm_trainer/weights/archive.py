"""Files of tensors, written a block at a time, so that no model needs to fit into memory.

safetensors (https://github.com/huggingface/safetensors): 8 bytes with the header's length, a JSON header that says
where each tensor lies, the tensors.  A `.pt` file as `torch.save` writes it: a zip archive, not compressed, with a
pickle that refers to each tensor's bytes in a member of its own, aligned to 64 bytes, so that it can be mapped.
Either library writes whole dictionaries from memory.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from math import prod
from typing import IO, Any, NamedTuple

import torch

from internlm_trainer.checkpoint.tensors import as_bytes
from internlm_trainer.errors import UserError
from internlm_trainer.weights.files import Type
from internlm_trainer.weights.layout import Slice, Stored, as_matrix, parameters
from internlm_trainer.weights.source import Weights, ahead, blocks

Progress = Callable[[int], None]


class Part(NamedTuple):
    """A tensor of a file, and where its numbers come from."""

    weights: Weights
    tensor: Stored


def size(tensors: Sequence[Stored], type: Type) -> int:
    """Bytes of all of them."""
    return sum(prod(one.shape) for one in tensors) * type.dtype.itemsize


def write_safetensors(
    file: IO[bytes],
    weights: Weights,
    tensors: Sequence[Stored],
    type: Type,
    metadata: Mapping[str, str],
    progress: Progress,
) -> None:
    """`progress` hears the bytes of each block.  Raises UserError for numbers that the type does not hold."""
    ends = list(accumulate((size([one], type) for one in tensors), initial=0))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    for one, start, end in zip(tensors, ends, ends[1:], strict=False):
        header[one.name] = {"dtype": type.safetensors, "shape": one.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for data in _data([Part(weights, one) for one in tensors], type):
        file.write(data)
        progress(len(data))
        _begin(file)


def write_pt(file: IO[bytes], content: object, type: Type, progress: Progress) -> None:
    """As `torch.save` of `content`, plain values with a `Part` where a tensor is to be; otherwise as
    `write_safetensors`."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        pickled, parts = _pickled(content, type)
        _add(archive, "data.pkl", pickled)
        _add(archive, "byteorder", b"little")
        data = _data(parts, type)
        for number, one in enumerate(parts):
            left = size([one.tensor], type)
            with archive.open(_member(archive, f"data/{number}"), "w", force_zip64=True) as member:
                while left:
                    block = next(data)
                    member.write(block)
                    progress(len(block))
                    _begin(file)
                    left -= len(block)
        _add(archive, "version", b"3\n")


class _Block(NamedTuple):
    """Rows [first, last) of a part's slice, and what the part is called."""

    weights: Weights
    slice: Slice
    first: int
    last: int
    name: str


def _begin(file: IO[bytes]) -> None:
    """Have a local disk begin with what was written so far, not with all of it when the file is flushed.

    What it has is dropped from memory, for which the kernel otherwise looks for room at every write.
    """
    with suppress(io.UnsupportedOperation):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _data(parts: Iterable[Part], type: Type) -> Iterator[memoryview]:
    """All bytes of the parts, a block at a time; none has bytes of two."""
    return ahead(lambda block: _rounded(block, type), _blocks(parts))


def _blocks(parts: Iterable[Part]) -> Iterator[_Block]:
    for weights, tensor in parts:
        for one in tensor.slices:
            columns = as_matrix(parameters(weights.shape)[one.parameter])[1]
            for first, last in blocks(columns, *one.rows):
                yield _Block(weights, one, first, last, tensor.name)


def _rounded(block: _Block, type: Type) -> memoryview:
    rows = block.weights.rows(block.slice.parameter, block.first, block.last)
    values = rows[:, slice(*block.slice.columns)].to(type.dtype)
    if type.dtype == torch.float16 and not values.isfinite().all():
        raise UserError(f"--dtype fp16: {block.name} has numbers above 65504; take bf16 or fp32")
    return as_bytes(values.flatten())


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    with archive.open(_member(archive, name), "w", force_zip64=True) as member:
        member.write(data)


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A member whose content begins at a multiple of 64 bytes: an extra field of its header fills the gap."""
    info = zipfile.ZipInfo(f"archive/{name}")
    fixed, zip64, own = 30, 20, 4  # bytes of a header before the name, and of the extra fields
    gap = -(archive.start_dir + fixed + len(info.filename) + own + zip64) % 64
    info.extra = b"FB" + struct.pack("<H", gap) + bytes(gap)
    return info


class _Storage(NamedTuple):
    key: str
    elements: int


def _pickled(content: object, type: Type) -> tuple[bytes, list[Part]]:
    """The content as PyTorch pickles it, with references in place of the tensors' bytes, and the tensors in order."""
    parts: list[Part] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if isinstance(value, _Storage):
                return "storage", type.storage, value.key, "cpu", value.elements
            return None

        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, Part):
                shape = value.tensor.shape
                strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
                storage = _Storage(str(len(parts)), prod(shape))
                arguments: tuple[Any, ...] = (storage, 0, shape, strides, False, OrderedDict())
                parts.append(value)
                return torch._utils._rebuild_tensor_v2, arguments
            return NotImplemented

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue(), parts
