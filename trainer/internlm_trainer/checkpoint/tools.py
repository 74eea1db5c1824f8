"""What people do with checkpoints outside a job: list, compare and export them, a block of a tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from internlm_trainer.checkpoint.errors import BadCheckpoint
from internlm_trainer.checkpoint.folder import Folder
from internlm_trainer.checkpoint.load import Checkpoint, open_checkpoint, stored_steps
from internlm_trainer.checkpoint.tensors import Want
from internlm_trainer.errors import UserError

BLOCK = 8 << 20  # elements in memory at once: 32 MiB of fp32 weights

Progress = Callable[[int], None]


def locate(uri: str) -> tuple[Folder, int | None]:
    """The folder that `uri` names, and the step, where it ends with one (`.../step-500`)."""
    found = re.fullmatch(r"(?:(.*)/)?step-(\d+)/?", uri)
    if not found:
        return Folder(uri), None
    return Folder("." if found[1] is None else found[1]), int(found[2])


def newest_step(folder: Folder) -> int:
    """Raises UserError where no checkpoint is."""
    steps, _ = stored_steps(folder)
    if not steps:
        raise UserError(f"{folder.url} holds no checkpoint")
    return steps[-1]


def open_one(uri: str) -> Checkpoint:
    """The checkpoint that `uri` names, or the newest of the folder that it names.

    Raises UserError if there is none, BadCheckpoint, StorageUnavailable.
    """
    folder, step = locate(uri)
    return open_checkpoint(folder, newest_step(folder) if step is None else step)


class Listed(NamedTuple):
    """A step's folder, as far as its manifest and the sizes of its files tell."""

    step: int
    checkpoint: Checkpoint | None
    problem: str
    """What is wrong with it, or nothing."""


def listing(folder: Folder) -> Iterator[Listed]:
    """Every step, oldest first, without reading shards."""
    committed, unfinished = stored_steps(folder)
    for step in sorted(committed + unfinished):
        if step in unfinished:
            yield Listed(step, None, "unfinished")
            continue
        checkpoint = None
        try:
            checkpoint = open_checkpoint(folder, step)
            checkpoint.check_sizes()
        except (BadCheckpoint, UserError) as error:
            yield Listed(step, checkpoint, error.why if isinstance(error, BadCheckpoint) else str(error))
        else:
            yield Listed(step, checkpoint, "")


def blocks(checkpoint: Checkpoint, kind: str, parameter: str) -> Iterator[torch.Tensor]:
    """A parameter's state in order, `[up to BLOCK]` elements at a time."""
    size = prod(checkpoint.manifest.parameters[parameter])
    name = checkpoint.index.dtype(kind, parameter)
    assert name
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        out = torch.empty(stop - start, dtype=getattr(torch, name))
        checkpoint.load([Want(kind, parameter, start, stop, out)])
        yield out


@dataclass(frozen=True)
class Difference:
    """A state that is not the same in two checkpoints."""

    kind: str
    parameter: str
    what: str
    """`values`, or why they cannot be compared."""
    elements: int = 0
    differ: int = 0
    """Elements whose bits are not the same."""
    largest: float = 0.0
    """Largest absolute difference."""
    relative: float = 0.0
    """Norm of the difference over the norm of the first."""


def states(checkpoint: Checkpoint) -> dict[tuple[str, str], tuple[int, ...]]:
    """Shape of every (kind, parameter) that it holds."""
    return {key: checkpoint.manifest.parameters[key[1]] for key in checkpoint.index.pieces}


def compare(
    a: Checkpoint, b: Checkpoint, progress: Progress = lambda _: None, kinds: tuple[str, ...] = ()
) -> Iterator[Difference]:
    """What differs between two checkpoints of any layouts, in the order of the parameters.

    `kinds`: only these.  `progress` hears the elements of each block.  Raises what `Checkpoint.load` does.
    """
    mine, theirs = states(a), states(b)
    for kind, parameter in sorted(mine.keys() | theirs.keys(), key=lambda key: (key[1], key[0])):
        if kinds and kind not in kinds:
            continue
        key = (kind, parameter)
        if key not in theirs or key not in mine:
            yield Difference(kind, parameter, f"only in the {'first' if key in mine else 'second'}")
        elif mine[key] != theirs[key]:
            yield Difference(kind, parameter, f"shape {list(mine[key])} and {list(theirs[key])}")
        elif (one := a.index.dtype(*key)) != (other := b.index.dtype(*key)):
            yield Difference(kind, parameter, f"type {one} and {other}")
        elif (found := _compare(a, b, kind, parameter, progress)).differ:
            yield found


def _compare(a: Checkpoint, b: Checkpoint, kind: str, parameter: str, progress: Progress) -> Difference:
    elements = differ = 0
    largest = squares = norm = 0.0
    for x, y in zip(blocks(a, kind, parameter), blocks(b, kind, parameter), strict=True):
        elements += len(x)
        bits = (x.view(torch.uint8) != y.view(torch.uint8)).view(len(x), -1).any(1)
        differ += int(bits.sum())
        gap = x.double() - y.double()
        largest = max(largest, float(gap.abs().max()))
        squares, norm = squares + float(gap.square().sum()), norm + float(x.double().square().sum())
        progress(len(x))
    relative = (squares / norm) ** 0.5 if norm else float("inf") if squares else 0.0
    return Difference(kind, parameter, "values", elements, differ, largest, relative)
