"""Trains a small model in every layout that it is given, as one of torchrun's processes; `run` starts them.

Arguments: output folder, precisions, layouts and a job's optimizer as JSON.  Rank 0 writes what each layout gave.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from internlm_trainer.config import ModelShape, OptimizerSpec, ZeroSpec
from internlm_trainer.kernels import attention
from internlm_trainer.kernels.attention import Documents
from internlm_trainer.model.internlm import InternLM, decays, hidden_matrices, initialise, parameter_generator
from internlm_trainer.optim.optimizer import MasterOptimizer
from internlm_trainer.parallel.hybrid_zero import HybridZero
from internlm_trainer.parallel.layout import ZeroLayout

SHAPE = ModelShape(3, 64, 4, 2, 128, 300, 1e-6, 10000, True)
STEPS, ROWS, LENGTHS = 20, 8, (20, 12, 32)


def run(
    folder: Path,
    processes: int,
    precisions: list[str],
    layouts: list[tuple[int, int, int]],
    optimizer: str = "{}",
    devices: str | None = None,
) -> None:
    """Each of `layouts` in `processes`; `devices`: CUDA_VISIBLE_DEVICES."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [__file__, str(folder), ",".join(precisions), json.dumps(layouts), optimizer]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def train(
    degrees: tuple[int, int, int], dtype: torch.dtype, device: torch.device, spec: OptimizerSpec
) -> dict[str, object]:
    """Losses and gradient norms of 20 steps over the same 8 rows a step, and the final master weights."""
    rank, world = dist.get_rank(), dist.get_world_size()
    with torch.device("meta"):
        model = InternLM(SHAPE, attention.choose(device, dtype).attention)

    def fill(name: str, values: torch.Tensor) -> None:
        initialise(name, values, SHAPE.layers, parameter_generator(name, 0, values))

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
    folder, precisions, degrees = Path(sys.argv[1]), sys.argv[2].split(","), json.loads(sys.argv[3])
    spec = OptimizerSpec.model_validate_json(sys.argv[4] if len(sys.argv) > 4 else "{}")
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    for precision, one in itertools.product(precisions, degrees):
        result = train(tuple(one), types[precision], device, spec)
        if dist.get_rank() == 0:
            name = f"{dist.get_world_size()}-{precision}-" + "-".join(map(str, one))
            torch.save(result, folder / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
