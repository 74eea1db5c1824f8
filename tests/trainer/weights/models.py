"""Small models in every family's shape, with all their numbers random, and what they are saved as."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from internlm_trainer.checkpoint import CheckpointStore, Piece, Snapshot
from internlm_trainer.config import ModelShape
from internlm_trainer.weights.layout import parameters
from internlm_trainer.weights.source import Weights

SHAPES = {
    "InternLM-7B": ModelShape(4, 64, 8, 8, 96, 512, 1e-6, 10000, True),
    "InternLM-20B": ModelShape(3, 64, 8, 8, 96, 512, 1e-6, 10000, False),
    "InternLM2": ModelShape(5, 64, 8, 4, 96, 512, 1e-5, 1_000_000, False),
}


def random_weights(shape: ModelShape, seed: int = 0) -> dict[str, Tensor]:
    """Every parameter at random, rounded to what bf16 holds."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, size in parameters(shape).items():
        values = torch.randn(size, generator=generator) * (0.2 if len(size) > 1 else 0.1)
        values += 1.0 if "norm" in name else 0.0
        found[name] = values.bfloat16().float()
    return found


def save(
    url: str,
    shape: ModelShape,
    weights: dict[str, Tensor],
    ranks: int = 3,
    moments: dict[str, dict[str, Tensor]] | None = None,
    **state: object,
) -> str:
    """A checkpoint of these weights that `ranks` wrote, each parameter cut at their borders; its URL.

    moments: of each kind of state the values of every parameter.
    """
    store = CheckpointStore(url, shape._asdict(), keep=3, job="job")
    entries = []
    for rank in range(ranks):
        pieces = []
        for kind, states in {"master": weights, **(moments or {})}.items():
            for name, values in states.items():
                start, stop = (values.numel() * one // ranks for one in (rank, rank + 1))
                pieces.append(Piece(kind, name, start, stop, values.flatten()[start:stop].clone()))
        entries.append(store.write_shard(100, rank, Snapshot().take(pieces)))
    sizes = {name: tuple(values.shape) for name, values in weights.items()}
    return store.commit(100, entries, state, sizes).uri


def content(weights: Weights) -> dict[str, Tensor]:
    """All parameters, read in parts that respect nothing."""
    found = {}
    for name, size in parameters(weights.shape).items():
        parts = [weights.rows(name, start, min(start + 150, size[0])) for start in range(0, size[0], 150)]
        found[name] = torch.cat(parts).view(size)
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same to the bit."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


def in_folder(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
