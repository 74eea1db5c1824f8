"""The model under Hybrid ZeRO and its optimizer, put together as a job describes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from internlm_trainer import config
from internlm_trainer.config import TrainSpec
from internlm_trainer.errors import UserError
from internlm_trainer.kernels import attention
from internlm_trainer.kernels.products import PLAIN
from internlm_trainer.model.internlm import (
    Block,
    InternLM,
    decays,
    hidden_matrices,
    initialise,
    parameter_generator,
)
from internlm_trainer.optim.optimizer import MasterOptimizer
from internlm_trainer.parallel.compile import apply_compile
from internlm_trainer.parallel.hybrid_zero import HybridZero
from internlm_trainer.parallel.layout import ZeroLayout
from internlm_trainer.parallel.recompute import apply_recompute
from internlm_trainer.processes import Processes

if TYPE_CHECKING:
    from internlm_trainer.parallel.float8 import Float8

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}


class Assembly(NamedTuple):
    """What trains."""

    model: InternLM
    zero: HybridZero
    optimizer: MasterOptimizer
    attention: attention.Choice
    float8: Float8 | None
    """How the blocks multiply, in fp8."""


def assemble(spec: TrainSpec, world: Processes) -> Assembly:
    """A model with the weights that its seed draws; every rank calls it.  Raises UserError for a missing library."""
    training, shape, dtype = spec.training, config.model_shape(spec.model), DTYPES[spec.training.precision]
    choice = attention.choose(world.device, dtype)
    float8 = _float8(world) if training.precision == "fp8" else None
    with torch.device("meta"):
        model = InternLM(shape, choice.attention, float8 or PLAIN)

    def fill(parameter: str, values: Tensor) -> None:
        initialise(parameter, values, shape.layers, parameter_generator(parameter, training.seed, values))

    zero = HybridZero(
        model,
        [model.embedding, *model.blocks, model.norm, model.head],
        ZeroLayout(world.size, *spec.parallel.zero.degrees(world.size), world.local_size),
        spec.parallel.zero,
        dtype=dtype,
        device=world.device,
        initialise=fill,
        decays=decays,
    )
    if float8:
        for block in model.blocks:
            assert isinstance(block, Block)
            float8.attach(block, block.multiplied, lambda: zero.updates)
    apply_recompute(model.blocks, shape, spec.parallel.recompute)
    apply_compile(model.blocks, spec.parallel.compile, world.device, config.row_tokens(spec))
    optimizer = world.together(
        lambda: MasterOptimizer(zero, training.optimizer, rows=lambda name: hidden_matrices(name, shape))
    )
    return Assembly(model, zero, optimizer, choice, float8)


def _float8(world: Processes) -> Float8:
    def make() -> Float8:
        try:
            from internlm_trainer.parallel.float8 import Float8, check_device
        except ModuleNotFoundError:
            raise UserError(
                "training.precision: fp8 needs Triton, which is not installed: install it, or use bf16"
            ) from None
        check_device(world.device)
        return Float8()

    return world.together(make)
