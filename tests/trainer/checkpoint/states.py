"""A small training state whose every element is known, its layouts, and ranks that are threads."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from threading import Barrier, Thread
from typing import TypeVar

import torch

from internlm_trainer.checkpoint import (
    Alone,
    Checkpoint,
    CheckpointStore,
    Collective,
    CommittedCheckpoint,
    Piece,
    ShardEntry,
    Snapshot,
    Want,
    newest_good,
)

T = TypeVar("T")
MODEL = {"layers": 1, "hidden_size": 8, "norm_eps": 1e-6, "attention_bias": True}
PARAMETERS = {
    "embedding.weight": (50, 8),
    "blocks.0.w1.weight": (7, 13),
    "norm.weight": (13,),
    "head.weight": (50, 8),
}
KINDS = {"master": torch.float32, "exp_avg": torch.float32, "parameters": torch.bfloat16}


def open_store(url: str, keep: int = 3, **changes: object) -> CheckpointStore:
    """The store of the job `job`; short of patience, since tests make it wait on purpose."""
    settings = {"model": MODEL, "job": "job", "patience": 1.0} | changes
    return CheckpointStore(url, keep=keep, **settings)  # type: ignore[arg-type]


def value(kind: str, parameter: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    """The flattened state of a parameter after `step`: random bits, the same for everyone."""
    seed = zlib.crc32(f"{kind} {parameter} {step}".encode())
    return torch.randn(prod(shape), generator=torch.Generator().manual_seed(seed)).to(KINDS[kind])


def ranges(
    rank: int, world: int, parameters: Mapping[str, tuple[int, ...]] = PARAMETERS
) -> Iterator[tuple[str, int, int]]:
    """The parts (parameter, start, stop) of a rank when all parameters, end to end, are cut equally."""
    total = sum(map(prod, parameters.values()))
    low, high, begin = rank * total // world, (rank + 1) * total // world, 0
    for name, shape in parameters.items():
        start, stop = max(low - begin, 0), min(high - begin, prod(shape))
        if start < stop:
            yield name, start, stop
        begin += prod(shape)


def pieces(
    step: int, rank: int, world: int, parameters: Mapping[str, tuple[int, ...]] = PARAMETERS
) -> Iterator[Piece]:
    for kind in KINDS:
        for name, start, stop in ranges(rank, world, parameters):
            yield Piece(
                kind, name, start, stop, value(kind, name, parameters[name], step)[start:stop].clone()
            )


def snapshot(step: int, rank: int, world: int) -> Snapshot:
    return Snapshot().take(pieces(step, rank, world))


def write(store: CheckpointStore, step: int, world: int) -> list[ShardEntry]:
    """All shards of a step, with no manifest yet."""
    return [store.write_shard(step, rank, snapshot(step, rank, world)) for rank in range(world)]


def save(store: CheckpointStore, step: int, world: int = 2) -> CommittedCheckpoint:
    return store.commit(step, write(store, step, world), {"step": step}, PARAMETERS)


def resume(store: CheckpointStore, world: Collective | None = None) -> Checkpoint | None:
    """The newest good checkpoint, all of which is read."""
    return newest_good(store, world or Alone(), lambda checkpoint: checkpoint.verify())


def assert_holds(checkpoint: Checkpoint, step: int, world: int = 1) -> None:
    """The checkpoint, read by `world` ranks, is the state after `step`, to the bit."""
    assert checkpoint.step == step
    assert checkpoint.state == {"step": step}
    parameters = checkpoint.manifest.parameters
    for rank in range(world):
        wants = [
            Want(kind, name, start, stop, torch.zeros(stop - start, dtype=dtype))
            for kind, dtype in KINDS.items()
            for name, start, stop in ranges(rank, world, parameters)
        ]
        checkpoint.load(wants)
        for want in wants:
            expected = value(want.kind, want.parameter, parameters[want.parameter], step)
            assert torch.equal(want.out, expected[want.start : want.stop])


@dataclass
class Rank:
    """One of several ranks that are threads of this process."""

    rank: int
    size: int
    barrier: Barrier
    said: list[list[str]]

    def agree(self, sentences: list[str]) -> list[str]:
        self.said[self.rank] = sentences
        self.barrier.wait(timeout=60)
        result = [sentence for said in self.said for sentence in said]
        self.barrier.wait(timeout=60)  # all have read it before anyone speaks again
        return result


@dataclass
class Outcomes:
    """What `work` returned or raised on each rank."""

    results: dict[int, object] = field(default_factory=dict)
    errors: dict[int, BaseException] = field(default_factory=dict)


def on_ranks(size: int, work: Callable[[Rank], object]) -> Outcomes:
    """Run `work` as each of `size` ranks at once."""
    barrier, said, outcomes = Barrier(size), [[] for _ in range(size)], Outcomes()

    def run(rank: int) -> None:
        try:
            outcomes.results[rank] = work(Rank(rank, size, barrier, said))
        except BaseException as error:
            outcomes.errors[rank] = error

    threads = [Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
