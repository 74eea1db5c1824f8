"""A checkpoint's weights as plain files, written a block of a tensor at a time.

The safetensors format (https://github.com/huggingface/safetensors): 8 bytes with the header's length, a JSON header
that says where each tensor lies, the tensors.  Its library writes whole dictionaries of tensors from memory; a
model that was trained on many machines need not fit into one, so the file is streamed here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch

from internlm_trainer.checkpoint.load import Checkpoint
from internlm_trainer.checkpoint.tensors import as_bytes
from internlm_trainer.checkpoint.tools import Progress, blocks
from internlm_trainer.errors import UserError
from internlm_trainer.storage import join, user_errors, write_whole

WEIGHTS = "master"
DTYPES = {"fp32": ("F32", torch.float32), "bf16": ("BF16", torch.bfloat16)}
LARGEST_FILE = 5_000_000_000  # bytes, as Hugging Face's own tools cut them


class Tensor(NamedTuple):
    """A tensor of the files: its name there, and the parameter whose values it has."""

    name: str
    parameter: str
    shape: tuple[int, ...]


def tensors(checkpoint: Checkpoint) -> list[Tensor]:
    """All weights under the trainer's own names."""
    return [Tensor(name, name, shape) for name, shape in checkpoint.manifest.parameters.items()]


def export(
    checkpoint: Checkpoint,
    out: str,
    dtype: str,
    chosen: Sequence[Tensor],
    progress: Progress = lambda _: None,
    largest_file: int = LARGEST_FILE,
) -> list[str]:
    """Write `chosen` to safetensors files below `out` (path or URL); their names, the index's last if there is one.

    A file appears whole or not at all.  `progress` hears the elements of each block.  Raises UserError for a place
    that cannot be written, and what `Checkpoint.load` does.
    """
    if WEIGHTS not in checkpoint.index.kinds:
        raise UserError(f"checkpoint {checkpoint.name} holds no {WEIGHTS} weights")
    item = DTYPES[dtype][1].itemsize
    parts = _parts(chosen, item, largest_file)
    names = [
        "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        for number in range(1, len(parts) + 1)
    ]
    for name, part in zip(names, parts, strict=True):
        with user_errors(out, "--out"), write_whole(join(out, name)) as file:
            for data in _file(checkpoint, dtype, part, progress):
                file.write(data)
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": sum(prod(tensor.shape) * item for tensor in chosen)},
            "weight_map": {
                tensor.name: name for name, part in zip(names, parts, strict=True) for tensor in part
            },
        }
        names.append("model.safetensors.index.json")
        with user_errors(out, "--out"), write_whole(join(out, names[-1])) as file:
            file.write(json.dumps(index, indent=2).encode())
    return names


def _parts(chosen: Sequence[Tensor], item: int, largest: int) -> list[list[Tensor]]:
    """Tensors in order, in as few files of at most `largest` bytes as that allows; none is cut."""
    parts: list[list[Tensor]] = [[]]
    size = 0
    for tensor in chosen:
        more = prod(tensor.shape) * item
        if parts[-1] and size + more > largest:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += more
    return parts


def _file(
    checkpoint: Checkpoint, dtype: str, part: Sequence[Tensor], progress: Progress
) -> Iterator[memoryview | bytes]:
    code, kind = DTYPES[dtype]
    header: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "job": checkpoint.manifest.job,
            "step": str(checkpoint.step),
            "model": json.dumps(dict(checkpoint.manifest.model)),
        }
    }
    end = 0
    for tensor in part:
        start, end = end, end + prod(tensor.shape) * kind.itemsize
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in part:
        for block in blocks(checkpoint, WEIGHTS, tensor.parameter):
            yield as_bytes(block.to(kind))
            progress(len(block))
