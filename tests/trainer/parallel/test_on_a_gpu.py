"""What only a GPU shows of Hybrid ZeRO: that the host waits for nothing, that offload moves memory and no number."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
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
from ports import free_port

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = ModelShape(4, 512, 8, 8, 1408, 8192, 1e-6, 10000, True)
TOKENS = 512


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A process group of one."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ |= place | {"RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


class Training:
    """A small model on one GPU."""

    def __init__(self, offload: str, micro_batches: int, dtype: torch.dtype = torch.bfloat16) -> None:
        device = torch.device("cuda", 0)
        with torch.device("meta"):
            self.model = InternLM(SHAPE, attention.choose(device, dtype).attention)

        def fill(name: str, values: torch.Tensor) -> None:
            initialise(name, values, SHAPE.layers, parameter_generator(name, 0, values))

        self.zero = HybridZero(
            self.model,
            [self.model.embedding, *self.model.blocks, self.model.norm, self.model.head],
            ZeroLayout(1, 1, 1, 1),
            ZeroSpec.model_validate({"offload": offload}),
            dtype=dtype,
            device=device,
            initialise=fill,
            decays=decays,
        )
        self.optimizer = MasterOptimizer(self.zero, OptimizerSpec())
        self.documents = Documents.of((TOKENS,), device)
        generator = torch.Generator(device).manual_seed(7)
        shape = (micro_batches, TOKENS)
        self.rows = torch.randint(0, SHAPE.vocab_size, shape, device=device, generator=generator)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, gradient norm) on the device."""
        total = torch.zeros((), device="cuda")
        for index, row in enumerate(self.rows):
            self.zero.micro_batch(last=index == len(self.rows) - 1)
            logits = self.model(row, self.documents)[:-1].float()
            loss = F.cross_entropy(logits, row[1:]) / len(self.rows)
            loss.backward()
            total += loss.detach()
        norm = self.zero.clip(1.0)
        self.optimizer.step(1e-3)
        self.zero.publish()
        return total, norm


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_host_waits_for_nothing_in_a_step(micro_batches: int) -> None:
    training = Training("none", micro_batches)
    training.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_offload_trains_alike_and_leaves_the_parameters_on_the_card(
    micro_batches: int, dtype: torch.dtype, tolerance: float
) -> None:
    """The CPU's AdamW rounds another way, and so do the atomic additions of the embedding's backward in each run."""
    found: dict[str, tuple[list[list[float]], float]] = {}
    for offload in ("none", "optimizer"):
        gc.collect()  # hooks and model refer to each other
        before = torch.cuda.memory_allocated()
        training = Training(offload, micro_batches, dtype)
        numbers = [torch.stack(training.step()).tolist() for _ in range(6)]
        torch.cuda.synchronize()
        elements = sum(bucket.layout.padded for bucket in training.zero.buckets)
        found[offload] = (numbers, (torch.cuda.memory_allocated() - before) / elements)
        del training
    (numbers, resident), (others, left) = found["none"], found["optimizer"]
    assert numbers[-1][0] < numbers[0][0]
    for one, other in zip(numbers, others, strict=True):
        assert other == pytest.approx(one, rel=tolerance)
    # Parameters, and without offload fp32 master, gradient and two moments; with it, what micro-batches add up to.
    assert resident == pytest.approx(dtype.itemsize + 16, abs=0.5)
    assert left == pytest.approx(dtype.itemsize + (0 if micro_batches == 1 else 4), abs=0.5)
