"""Where the tensors lie in files of weights, so that any rows of any of them can be read alone.

Two kinds of files: safetensors, whose header says it, and what `torch.save` writes, a zip archive that is read
without its data (https://docs.pytorch.org/docs/stable/notes/serialization.html, "reading under FakeTensorMode").
A pickle may run code when it is loaded; with `weights_only=True` PyTorch refuses all but tensors and plain values.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import OrderedDict
from math import prod
from typing import Any, NamedTuple

import torch

from internlm_trainer.checkpoint.folder import Folder
from internlm_trainer.errors import UserError
from internlm_trainer.storage import user_errors

_LARGEST_HEADER = 100 << 20  # bytes, safetensors' own limit
_ZIP = b"PK\x03\x04"
# Of `model_config.pt`: a dictionary with attributes.
_INTERNLMS_CONFIG = "internlm.core.context.parallel_context.Config"
_BLOCK = 256 << 10  # bytes read at once of a pickle that is far away


class Type(NamedTuple):
    """A type of stored weights, by the names of those who read and write them."""

    dtype: torch.dtype
    safetensors: str
    storage: type
    name: str


# fp32 masters hold each of these exactly.
TYPES = {
    "fp32": Type(torch.float32, "F32", torch.FloatStorage, "float32"),
    "bf16": Type(torch.bfloat16, "BF16", torch.BFloat16Storage, "bfloat16"),
    "fp16": Type(torch.float16, "F16", torch.HalfStorage, "float16"),
}
DTYPES = {type.safetensors: type.dtype for type in TYPES.values()}


class TensorAt(NamedTuple):
    """A tensor in a file: contiguous, from byte `offset` on."""

    dtype: torch.dtype | str
    """What PyTorch calls it, or for types that are not read here its name."""
    shape: tuple[int, ...]
    offset: int


def tensors(folder: Folder, file: str) -> dict[str, TensorAt]:
    """Every tensor of a `.safetensors`, `.bin` or `.pt` file.

    Raises UserError for one that is missing, cut off, no such file, or that could run code.
    """
    table = _safetensors(folder, file) if file.endswith(".safetensors") else _pickled(folder, file)
    end, there = 0, size(folder, file)
    for one in table.values():
        item = one.dtype.itemsize if isinstance(one.dtype, torch.dtype) else 0
        end = max(end, one.offset + prod(one.shape) * item)
    if end > there:
        raise refusal(
            folder, file, f"is cut off: it has {there} bytes, and its tensors end at {end}; copy it again"
        )
    return table


def refusal(folder: Folder, file: str, why: str) -> UserError:
    """What is wrong with a file, as a sentence."""
    return UserError(f"{folder.what}: {folder.uri(file)} {why}")


def read(folder: Folder, file: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Bytes [start, stop) of a file.  Raises UserError if it is not there, StorageUnavailable."""
    try:
        return folder.read(file, start=start, stop=stop)
    except FileNotFoundError:
        raise refusal(folder, file, "is missing; copy the folder again, whole") from None


def size(folder: Folder, file: str) -> int:
    """Bytes of a file.  Raises as `read`."""
    try:
        return folder.size(file)
    except FileNotFoundError:
        raise refusal(folder, file, "is missing; copy the folder again, whole") from None


def _safetensors(folder: Folder, file: str) -> dict[str, TensorAt]:
    length = int.from_bytes(read(folder, file, 0, 8), "little")
    if length > min(_LARGEST_HEADER, size(folder, file)):
        raise refusal(folder, file, "is cut off or no safetensors file; copy it again")
    try:
        header = json.loads(read(folder, file, 8, 8 + length))
        header.pop("__metadata__", None)
        return {name: _entry(entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refusal(folder, file, "is damaged or no safetensors file; copy it again") from error


def _entry(entry: dict[str, Any], data: int) -> TensorAt:
    """A tensor as the header tells it; the data begin at byte `data`."""
    dtype, shape = DTYPES.get(entry["dtype"], entry["dtype"]), tuple(map(int, entry["shape"]))
    start, stop = map(int, entry["data_offsets"])
    if start < 0 or (isinstance(dtype, torch.dtype) and stop - start != prod(shape) * dtype.itemsize):
        raise ValueError("the tensor's bytes do not fit its shape")
    return TensorAt(dtype, shape, data + start)


def _pickled(folder: Folder, file: str) -> dict[str, TensorAt]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        content = load_pickle(folder, file)
    if not isinstance(content, dict):
        raise refusal(folder, file, "holds no dictionary of tensors")
    table = {}
    for name, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise refusal(folder, file, f"holds {name}, which is no tensor")
        if not value.is_contiguous():
            raise refusal(folder, file, f"holds {name} with its elements out of order; save it contiguous")
        begin = value.untyped_storage()._checkpoint_offset
        assert begin is not None
        offset = begin + int(value.storage_offset()) * value.itemsize
        table[str(name)] = TensorAt(value.dtype, tuple(value.shape), offset)
    return table


def load_pickle(folder: Folder, file: str) -> Any:
    """The content of what `torch.save` wrote, tensors and plain values alone; raises as `tensors`."""
    if read(folder, file, 0, len(_ZIP)) != _ZIP:
        raise refusal(
            folder,
            file,
            "is cut off, or nothing that torch.save of PyTorch 1.6 or later wrote; copy it again, or save it with a "
            "newer PyTorch",
        )
    allowed = torch.serialization.safe_globals([(OrderedDict, _INTERNLMS_CONFIG)])
    with (
        user_errors(folder.uri(file), folder.what),
        folder.fs.open(folder.path(file), "rb", block_size=_BLOCK) as opened,
        allowed,
    ):
        try:
            return torch.load(opened, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            names = f" (it names {found[1]})" if found else ""
            raise refusal(
                folder,
                file,
                f"holds more than tensors and plain values{names}, which could run code when loaded, and is refused",
            ) from error
        except (RuntimeError, EOFError, AssertionError) as error:
            raise refusal(folder, file, "is cut off or damaged; copy it again") from error
