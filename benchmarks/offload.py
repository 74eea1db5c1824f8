"""Time and memory of a step with and without `parallel.zero.offload`, on one GPU.

    python benchmarks/offload.py MICRO_BATCHES none|optimizer

Run each setting in a process of its own: memory is the allocator's peak.
"""

from __future__ import annotations

import os
import socket
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from internlm_trainer.config import ModelShape, OptimizerSpec, ZeroSpec
from internlm_trainer.kernels import attention
from internlm_trainer.kernels.attention import Documents
from internlm_trainer.model.internlm import InternLM, decays, initialise, parameter_generator
from internlm_trainer.optim.optimizer import MasterOptimizer
from internlm_trainer.parallel.hybrid_zero import HybridZero
from internlm_trainer.parallel.layout import ZeroLayout

SHAPE = ModelShape(24, 2048, 16, 16, 5632, 32000, 1e-6, 10000, True)
TOKENS, STEPS = 2048, 4


def main() -> None:
    micro_batches, offload = int(sys.argv[1]), sys.argv[2]
    device = torch.device("cuda", 0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    with torch.device("meta"):
        model = InternLM(SHAPE, attention.choose(device, torch.bfloat16).attention)

    def fill(name: str, values: torch.Tensor) -> None:
        initialise(name, values, SHAPE.layers, parameter_generator(name, 0, values))

    zero = HybridZero(
        model,
        [model.embedding, *model.blocks, model.norm, model.head],
        ZeroLayout(1, 1, 1, 1),
        ZeroSpec.model_validate({"offload": offload}),
        dtype=torch.bfloat16,
        device=device,
        initialise=fill,
        decays=decays,
    )
    optimizer = MasterOptimizer(zero, OptimizerSpec())
    documents = Documents.of((TOKENS,), device)
    rows = torch.randint(0, SHAPE.vocab_size, (micro_batches, TOKENS), device=device)

    def step() -> None:
        for index, row in enumerate(rows):
            zero.micro_batch(last=index == micro_batches - 1)
            (F.cross_entropy(model(row, documents)[:-1].float(), row[1:]) / micro_batches).backward()
        zero.clip(1.0)
        optimizer.step(1e-4)
        zero.publish()

    step()
    step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / STEPS
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters / 1e9:.2f}B parameters, {micro_batches} micro-batches of {TOKENS} tokens, offload {offload}: "
        f"{seconds * 1e3:.0f} ms a step, peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, "
        f"{torch.get_num_threads()} CPU threads"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
