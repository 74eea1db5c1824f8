"""On a GPU: nothing in the optimizer's part of a step waits for the device, and it gives what a CPU gives."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from internlm_trainer.config import LossScaleSpec, ModelShape, OptimizerSpec, SkipSpec, ZeroSpec
from internlm_trainer.model.internlm import InternLM, decays, hidden_matrices, initialise, parameter_generator
from internlm_trainer.optim.guard import Counts, SkipGuard
from internlm_trainer.optim.loss_scale import LossScale
from internlm_trainer.optim.optimizer import MasterOptimizer
from internlm_trainer.parallel.hybrid_zero import HybridZero
from internlm_trainer.parallel.layout import ZeroLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = ModelShape(1, 64, 2, 1, 96, 300, 1e-6, 10000, True)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train(device: torch.device, spec: OptimizerSpec, *, watch: bool) -> tuple[torch.Tensor, Counts, float]:
    """Master weights after 6 updates, one of them an overflow; `watch`: an error where anything waits."""
    with torch.device("meta"):
        model = InternLM(SHAPE)

    def fill(name: str, values: torch.Tensor) -> None:
        host = torch.empty(values.shape)
        initialise(name, host, SHAPE.layers, parameter_generator(name, 0, host))
        values.copy_(host)

    units = [model.embedding, *model.blocks, model.norm, model.head]
    layout = ZeroLayout(1, 1, 1, 1)
    zero = HybridZero(
        model,
        units,
        layout,
        ZeroSpec(),
        dtype=torch.float32,
        device=device,
        initialise=fill,
        decays=decays,
    )
    optimizer = MasterOptimizer(zero, spec, rows=lambda name: hidden_matrices(name, SHAPE))
    guard = SkipGuard(
        SkipSpec.model_validate({"window": 8}), device, LossScale(LossScaleSpec(initial=8), 1, device)
    )
    loss = torch.ones((), device=device)
    for step in range(1, 7):
        for index, bucket in enumerate(zero.buckets):
            generator = torch.Generator().manual_seed(100 * step + index)
            bucket.master_grad.copy_(torch.randn(len(bucket.master), generator=generator))
            if step == 3:
                bucket.master_grad[0] = torch.inf
        torch.cuda.set_sync_debug_mode("error" if watch else "default")
        try:
            norm = zero.clip(1.0, guard.scale)
            optimizer.step(1e-3, guard.judge(step, loss, norm))
            zero.publish()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    weights = torch.cat([bucket.master.cpu() for bucket in zero.buckets])
    assert guard.scale is not None
    return weights, guard.read(), float(guard.scale)


@pytest.mark.parametrize("state_type", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_updates_wait_for_nothing_and_are_those_of_a_cpu(name: str, state_type: str) -> None:
    spec = OptimizerSpec.model_validate({"name": name, "stateType": state_type})
    torch.backends.cuda.matmul.allow_tf32 = False
    train(torch.device("cuda"), spec, watch=False)  # libraries are loaded, memory is taken
    weights, counts, scale = train(torch.device("cuda"), spec, watch=True)
    expected, same_counts, same_scale = train(torch.device("cpu"), spec, watch=False)
    assert counts == same_counts == Counts(1, 0, 3)
    assert scale == same_scale == 4.0
    # Moments that differ in fp32's last bit may be rounded to another bf16 number.
    assert (weights - expected).norm() <= (1e-6 if state_type == "fp32" else 1e-4) * expected.norm()


@pytest.mark.skipif(importlib.util.find_spec("amp_C") is None, reason="needs apex with its CUDA extensions")
def test_the_kernels_of_apex_give_what_those_of_pytorch_give() -> None:
    """Within fp32's rounding: apex is built with --use_fast_math, so its roots and quotients are not exact."""
    pytorch, apex = (OptimizerSpec.model_validate({"backend": backend}) for backend in ("torch", "apex"))
    train(torch.device("cuda"), apex, watch=False)
    weights, counts, scale = train(torch.device("cuda"), apex, watch=True)
    expected, same_counts, same_scale = train(torch.device("cuda"), pytorch, watch=False)
    assert (counts, scale) == (same_counts, same_scale)
    assert (weights - expected).norm() <= 1e-6 * expected.norm()
