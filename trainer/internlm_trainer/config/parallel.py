"""`spec.parallel`: how the model's states are laid out over the processes."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, WithJsonSchema

from internlm_trainer.config.base import Spec


class ZeroSpec(Spec):
    """Hybrid ZeRO: over how many consecutive data-parallel ranks each kind of state is sharded.

    1: replicated on every rank; -1: over all of them. Each degree divides the next one, and the last divides the
    data-parallel size. ZeRO-1 inside nodes of 8 GPUs is (1, 1, 8); FSDP is (-1, -1, -1).
    """

    parameters: Annotated[int, Field(ge=-1, le=65536)] = 1
    """Ranks that share one copy of the parameters."""
    gradients: Annotated[int, Field(ge=-1, le=65536)] = 1
    """Ranks that share one copy of the accumulated gradients."""
    optimizer: Annotated[int, Field(ge=-1, le=65536)] = -1
    """Ranks that share one copy of the fp32 master weights and the optimizer's states."""

    accumulation: Literal["shards", "full"] = "shards"
    """Where the gradients of a step's micro-batches are added up, in fp32. `shards`: reduced within `gradients`
    ranks after every micro-batch, 4 bytes a parameter sent each time, 4 / gradients bytes a parameter kept;
    `full`: 4 bytes a parameter kept, reduced once a step. The same where `gradients` is 1."""
    reduce_precision: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients are sent and summed across ranks. `bf16` halves the bytes, and rounds each sum to 8
    bits, which moves each gradient by up to 0.4% for every rank that adds to it. With `optimizer` above 1, sums
    across its groups stay fp32, since only 1 / optimizer of the elements is left there."""
    offload: Literal["none", "optimizer"] = "none"
    """`optimizer`: keep the master weights and optimizer states in host memory, 16 bytes a parameter divided by
    `optimizer`, and update them there. It leaves 2 bytes a parameter and the gradients on a GPU (precision bf16),
    and costs the transfers and the CPU's update at every step: for few GPUs and many micro-batches."""

    def degrees(self, data_parallel_size: int) -> tuple[int, int, int]:
        """(p, g, o) with -1 replaced by the data-parallel size."""
        p, g, o = (
            data_parallel_size if degree == -1 else degree
            for degree in (self.parameters, self.gradients, self.optimizer)
        )
        return p, g, o


RECOMPUTE_PATTERN = "^(none|selective|full|[1-9][0-9]?%)$"
RECOMPUTE_SENTENCE = "must be none, selective, full, or a share of the blocks from 1% to 99%, such as 50%"


def _check_recompute(value: str) -> str:
    if not re.fullmatch(RECOMPUTE_PATTERN, value):
        raise ValueError(RECOMPUTE_SENTENCE)
    return value


Recompute = Annotated[
    str,
    AfterValidator(_check_recompute),
    WithJsonSchema(
        {
            "type": "string",
            "maxLength": 9,
            "x-kubernetes-validations": [
                {"rule": f"self.matches('{RECOMPUTE_PATTERN}')", "message": RECOMPUTE_SENTENCE}
            ],
        }
    ),
]


def recomputed_blocks(recompute: str, layers: int) -> list[bool]:
    """Which blocks a valid `recompute` recomputes as a whole: the asked share of them, evenly spread."""
    percent = 100 if recompute == "full" else int(recompute[:-1]) if recompute.endswith("%") else 0
    count = -(-layers * percent // 100)
    return [(i + 1) * count // layers > i * count // layers for i in range(layers)]


class ParallelSpec(Spec):
    """How the model's states are laid out over the processes."""

    zero: ZeroSpec = ZeroSpec()
    """Sharding of parameters, gradients and optimizer states."""
    recompute: Recompute = "none"
    """Activations that the backward pass computes again instead of keeping them. `none`: keep all; `selective`:
    keep what matrix products and attention gave, compute the rest (norms, rotary embedding, SwiGLU's product)
    again; `full`, or a share of the blocks such as `50%`: keep only the input of these blocks."""
    compile: Literal["auto", "blocks", "none"] = "auto"
    """Whether torch.compile fuses the operations of each block. `auto`: on GPUs only; `blocks`: always; `none`:
    never, the operations run as they are written."""
