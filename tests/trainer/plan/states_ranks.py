"""Counts the bytes that Hybrid ZeRO and the optimizer hold after a step, as one of torchrun's processes.

Arguments: output file, cases as JSON: [[p, g, o], settings of `zero`, precision, micro-batches,
settings of the optimizer].
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from internlm_trainer.assembly import DTYPES
from internlm_trainer.config import model_shape
from internlm_trainer.kernels.attention import Documents
from internlm_trainer.model.internlm import InternLM, decays, hidden_matrices, initialise
from internlm_trainer.optim.optimizer import MasterOptimizer
from internlm_trainer.parallel.hybrid_zero import HybridZero
from internlm_trainer.parallel.layout import ZeroLayout
from trainer.plan.jobs import small

LEAST = 100  # bytes: every shard has more, scalars (steps, norms) have less


def held() -> int:
    """Bytes of the memory that Python's tensors have."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(size for size in storages.values() if size >= LEAST)


def measure(
    degrees: tuple[int, int, int],
    zero: dict[str, str],
    precision: str,
    micro_batches: int,
    optimizer: dict[str, str],
) -> int:
    before = held()
    world = dist.get_world_size()
    spec = small(
        world, degrees, zero=zero, precision=precision, micro_batches=micro_batches, optimizer=optimizer
    )
    shape, cpu = model_shape(spec.model), torch.device("cpu")
    with torch.device("meta"):
        model = InternLM(shape)
    state = HybridZero(
        model,
        [model.embedding, *model.blocks, model.norm, model.head],
        ZeroLayout(world, *degrees, world),
        spec.parallel.zero,
        dtype=DTYPES[precision],
        device=cpu,
        initialise=lambda name, values: initialise(name, values, shape.layers, torch.Generator()),
        decays=decays,
    )
    updates = MasterOptimizer(state, spec.training.optimizer, rows=lambda name: hidden_matrices(name, shape))
    for index in range(micro_batches):
        state.micro_batch(last=index == micro_batches - 1)
        model(torch.arange(8), Documents.of((8,), cpu)).float().square().mean().backward()
    state.clip(1.0)
    updates.step(1e-3)
    state.publish()
    return held() - before


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = [measure(tuple(degrees), *how) for degrees, *how in json.loads(sys.argv[2])]
    if dist.get_rank() == dist.get_world_size() - 1:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
