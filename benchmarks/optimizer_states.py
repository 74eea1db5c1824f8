"""What moments in bf16 cost in loss, and how often a healthy run looks like a spike: a small model on the CPU.

Trains on the bytes of Python's own standard library, once for each way to keep the moments, from the same weights on
the same rows; other seeds show how much of a difference is noise.  Writes a line of JSON a run.

    python benchmarks/optimizer_states.py --steps 1500 > states.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from internlm_trainer.config import ModelShape, OptimizerSpec, SkipSpec, ZeroSpec
from internlm_trainer.kernels.attention import Documents
from internlm_trainer.model.internlm import InternLM, decays, initialise, parameter_generator
from internlm_trainer.optim.guard import SkipGuard
from internlm_trainer.optim.optimizer import MasterOptimizer
from internlm_trainer.parallel.hybrid_zero import HybridZero
from internlm_trainer.parallel.layout import ZeroLayout

SHAPE = ModelShape(2, 96, 4, 4, 256, 260, 1e-6, 10000, True)
CPU, TOKENS, LENGTH, PEAK, WARMUP = torch.device("cpu"), 512, 128, 3e-3, 100
CASES = [(states, betas, 1) for betas in ((0.9, 0.95), (0.9, 0.999)) for states in ("fp32", "bf16")] + [
    ("fp32", (0.9, 0.95), seed) for seed in (2, 3)
]


def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on and to validate on."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    random.Random(0).shuffle(files)
    data = torch.tensor(list(b"".join(file.read_bytes() for file in files)))
    return data[TOKENS * 40 :], data[: TOKENS * 40]


def run(states: str, betas: tuple[float, float], seed: int, steps: int) -> dict[str, object]:
    model, train, valid = _model(seed), *corpus()
    zero, module = model
    spec = OptimizerSpec.model_validate({"betas": list(betas), "weightDecay": 0.1, "stateType": states})
    optimizer = MasterOptimizer(zero, spec)
    documents = Documents.of((LENGTH,) * (TOKENS // LENGTH), CPU)
    generator = torch.Generator().manual_seed(seed)
    losses, norms, began = [], [], time.monotonic()

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(module(rows[:-1], documents), rows[1:])

    for step in range(steps):
        start = int(torch.randint(len(train) - TOKENS - 1, (), generator=generator))
        zero.micro_batch(last=True)
        loss = loss_of(train[start : start + TOKENS + 1])
        loss.backward()
        norms.append(float(zero.clip(1.0)))
        optimizer.step(PEAK * min(1.0, (step + 1) / WARMUP) * (1 - 0.9 * step / steps))
        zero.publish()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        rows = [valid[i : i + TOKENS + 1] for i in range(0, len(valid) - TOKENS, TOKENS)]
        validation = sum(float(loss_of(row)) for row in rows) / len(rows)
    skips = {}
    for threshold in (4, 6, 8, 10, 15):
        guard = SkipGuard(SkipSpec.model_validate({"spikeThreshold": threshold}), CPU)
        for step, values in enumerate(zip(losses, norms, strict=True), 1):
            guard.judge(step, *map(torch.tensor, values))
        skips[threshold] = guard.read().skipped
    return {
        "states": states,
        "betas": betas,
        "seed": seed,
        "steps": steps,
        "train": round(sum(losses[-200:]) / 200, 4),
        "validation": round(validation, 4),
        "would_be_skipped": skips,
        "seconds": round(time.monotonic() - began),
    }


def _model(seed: int) -> tuple[HybridZero, InternLM]:
    with torch.device("meta"):
        model = InternLM(SHAPE)

    def fill(name: str, values: torch.Tensor) -> None:
        initialise(name, values, SHAPE.layers, parameter_generator(name, seed, values))

    units = [model.embedding, *model.blocks, model.norm, model.head]
    layout = ZeroLayout(1, 1, 1, 1)
    zero = HybridZero(
        model, units, layout, ZeroSpec(), dtype=torch.float32, device=CPU, initialise=fill, decays=decays
    )
    return zero, model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for states, betas, seed in CASES:
        print(json.dumps(run(states, betas, seed, steps)), flush=True)


if __name__ == "__main__":
    main()
