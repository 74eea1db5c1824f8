"""Trains a small model in every layout that it is given, as one of torchrun's processes; `run` starts them.

Arguments: output folder, precision, layouts and a job's optimizer as JSON.  Rank 0 writes what each layout gave.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from internlm_trainer.config import ModelShape, OptimizerSpec, ZeroSpec
from internlm_trainer.kernels import attention
from internlm_trainer.kernels.attention import Documents
from internlm_trainer.model.internlm import InternLM, decays, hidden_matrices, initialise
from internlm_trainer.optim.optimizer import MasterOptimizer
from internlm_trainer.parallel.hybrid_zero import HybridZero
from internlm_trainer.parallel.layout import ZeroLayout

SHAPE = ModelShape(3, 64, 4, 2, 128, 300, 1e-6, 10000, True)
STEPS, ROWS, LENGTHS = 20, 8, (20, 12, 32)


def run(
    folder: Path, processes: int, precision: str, layouts: list[tuple[int, int, int]], optimizer: str = "{}"
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [__file__, str(folder), precision, json.dumps(layouts), optimizer]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


def assert_equal(ours: dict[str, Any], reference: dict[str, Any], tolerance: float) -> None:
    assert ours["losses"] == pytest.approx(reference["losses"], rel=tolerance)
    assert ours["norms"] == pytest.approx(reference["norms"], rel=10 * tolerance)
    names = sorted(reference["weights"])
    assert sorted(ours["weights"]) == names
    mine, theirs = (torch.cat([r["weights"][name] for name in names]) for r in (ours, reference))
    assert (mine - theirs).norm() <= tolerance * theirs.norm()


def train(
    degrees: tuple[int, int, int], dtype: torch.dtype, device: torch.device, spec: OptimizerSpec
) -> dict[str, object]:
    """Losses and gradient norms of 20 steps over the same 8 rows a step, and the final master weights."""
    rank, world = dist.get_rank(), dist.get_world_size()
    with torch.device("meta"):
        model = InternLM(SHAPE, attention.choose(device, dtype).attention)

    def fill(name: str, index: int, values: torch.Tensor) -> None:
        initialise(name, values, SHAPE.layers, torch.Generator(device).manual_seed(1000 + index))

    zero = HybridZero(
        model,
        [model.embedding, *model.blocks, model.norm, model.head],
        ZeroLayout(world, *degrees),
        ZeroSpec(),
        dtype=dtype,
        device=device,
        initialise=fill,
        decays=decays,
    )
    optimizer = MasterOptimizer(zero, spec, rows=lambda name: hidden_matrices(name, SHAPE))
    documents = Documents.of(LENGTHS, device)
    tokens = sum(LENGTHS)
    generator = torch.Generator().manual_seed(5)
    losses, norms = [], []
    for _ in range(STEPS):
        rows = torch.randint(0, SHAPE.vocab_size, (ROWS, tokens), generator=generator)[rank::world].to(device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for index, row in enumerate(rows):
            zero.micro_batch(last=index == len(rows) - 1)
            logits = model(row, documents)[:-1].float()
            loss = F.cross_entropy(logits, row[1:], reduction="sum") / (ROWS * (tokens - 1))
            loss.backward()
            total += loss.detach()
        dist.all_reduce(total)
        norms.append(float(zero.clip(1.0)))
        optimizer.step(1e-3)
        zero.publish()
        losses.append(float(total))
    everyone: list[list[tuple[str, int, int, torch.Tensor]]] = [[] for _ in range(world)]
    own = [(p.parameter, *p.span, p.values.cpu().clone()) for p in optimizer.pieces() if p.kind == "master"]
    dist.all_gather_object(everyone, own)
    weights = {name: torch.full(shape, torch.nan).flatten() for name, shape in zero.shapes().items()}
    for name, start, stop, values in (piece for pieces in everyone for piece in pieces):
        weights[name][start:stop] = values
    return {"losses": losses, "norms": norms, "weights": weights}


def main() -> None:
    folder, precision, degrees = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    spec = OptimizerSpec.model_validate_json(sys.argv[4] if len(sys.argv) > 4 else "{}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    for one in degrees:
        result = train(tuple(one), dtype, device, spec)
        if dist.get_rank() == 0:
            name = f"{dist.get_world_size()}-{precision}-" + "-".join(map(str, one))
            torch.save(result, folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
