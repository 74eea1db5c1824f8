"""Trains a small model in every way of running its blocks that it is given, as one of torchrun's processes.

Arguments: output file, cases as JSON: [[p, g, o], recompute, compile].  Rank 0 writes what each case gave.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from internlm_trainer.config import ModelShape, OptimizerSpec, ZeroSpec
from internlm_trainer.kernels.attention import Documents
from internlm_trainer.model.internlm import InternLM, decays, initialise, parameter_generator
from internlm_trainer.optim.optimizer import MasterOptimizer
from internlm_trainer.parallel.compile import apply_compile
from internlm_trainer.parallel.hybrid_zero import HybridZero
from internlm_trainer.parallel.layout import ZeroLayout
from internlm_trainer.parallel.recompute import apply_recompute

SHAPE = ModelShape(4, 32, 4, 2, 96, 300, 1e-6, 10000, True)
TOKENS, MICRO_BATCHES = 48, 2
DOCUMENTS = [(48,), (20, 28), (12, 12, 24), (1, 46, 1), (16, 16, 16)]  # other ones in each step


def train(degrees: tuple[int, int, int], recompute: str, compile: str) -> dict[str, object]:  # noqa: A002
    """Losses of a step for each of `DOCUMENTS`, the final master weights, and what is compiled after each."""
    rank, world, cpu = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
    if compile != "none":
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    with torch.device("meta"):
        model = InternLM(SHAPE)

    def fill(name: str, values: torch.Tensor) -> None:
        initialise(name, values, SHAPE.layers, parameter_generator(name, 0, values))

    zero = HybridZero(
        model,
        [model.embedding, *model.blocks, model.norm, model.head],
        ZeroLayout(world, *degrees),
        ZeroSpec(),
        dtype=torch.float32,
        device=cpu,
        initialise=fill,
        decays=decays,
    )
    apply_recompute(model.blocks, SHAPE, recompute)
    apply_compile(model.blocks, compile, cpu, TOKENS)
    optimizer = MasterOptimizer(zero, OptimizerSpec())
    generator = torch.Generator().manual_seed(5)
    losses, graphs = [], []
    for lengths in DOCUMENTS:
        rows = torch.randint(0, SHAPE.vocab_size, (MICRO_BATCHES * world, TOKENS), generator=generator)
        for index, row in enumerate(rows[rank::world]):
            zero.micro_batch(last=index == MICRO_BATCHES - 1)
            logits = model(row, Documents.of(lengths, cpu))[:-1]
            loss = F.cross_entropy(logits, row[1:])
            loss.backward()
            losses.append(float(loss.detach()))
        assert zero.layout.parameters == 1 or not any(b.full.untyped_storage().size() for b in zero.buckets)
        zero.clip(1.0)
        optimizer.step(1e-2)
        zero.publish()
        graphs.append(compiled_graphs(compile))
    with torch.no_grad():
        model(torch.arange(7), Documents.of((7,), cpu))  # a prompt: another length
    graphs.append(compiled_graphs(compile))
    weights = torch.cat([bucket.master for bucket in zero.buckets])
    return {"losses": losses, "weights": weights, "graphs": graphs}


def compiled_graphs(compile: str) -> int:  # noqa: A002
    """Graphs that were compiled so far."""
    return 0 if compile == "none" else torch._dynamo.utils.counters["stats"]["unique_graphs"]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = [train(tuple(degrees), *how) for degrees, *how in json.loads(sys.argv[2])]
    if dist.get_rank() == 0:
        torch.save(results, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
