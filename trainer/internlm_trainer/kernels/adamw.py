"""AdamW's update of a flat fp32 buffer in one pass: gradient scaling, moments, weights, and the weights' rounding.

Each number is read and written once, 30 bytes a parameter in bf16 training; clipping, updating and rounding one after
the other move 44.  The arithmetic is that of `torch.optim.adamw.adamw`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    rounded: Tensor | None,
    factor: Tensor,
    skip: Tensor,
    updates: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update all in place; nothing changes where `skip` is true.

    weight: fp32 `[n]`.  gradient, moments, rounded: `[n]` of any floating type; what is computed is fp32.
    rounded: gets the new weights in its type.
    factor: 0-dim fp32 that the gradient is multiplied by.  skip: 0-dim bool.  updates: 0-dim, with this one.
    """
    done = updates.double()
    corrections = torch.stack([1 - beta**done for beta in betas]).float()
    block = 2048
    _adamw[(triton.cdiv(weight.numel(), block),)](
        weight,
        gradient,
        *moments,
        weight if rounded is None else rounded,
        factor,
        skip,
        corrections,
        weight.numel(),
        lr,
        1 - lr * weight_decay,
        1 - betas[0],
        betas[1],
        1 - betas[1],
        eps,
        rounds=rounded is not None,
        block=block,
        num_warps=8,
    )


@triton.jit
def _adamw(  # type: ignore[no-untyped-def]
    weight,
    gradient,
    first,
    second,
    rounded,
    factor,
    skip,
    corrections,
    size,
    lr,
    kept,
    rest1,
    beta2,
    rest2,
    eps,
    rounds: tl.constexpr,
    block: tl.constexpr,
):
    if tl.load(skip):
        return
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < size
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * tl.load(factor)
    w = tl.load(weight + place, mask=inside, other=0.0)
    m = tl.load(first + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(second + place, mask=inside, other=0.0).to(tl.float32)
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    root = tl.sqrt_rn(v)
    below = tl.div_rn(root, tl.sqrt_rn(tl.load(corrections + 1))) + eps
    w = w * kept - (lr / tl.load(corrections)) * tl.div_rn(m, below)
    tl.store(weight + place, w, mask=inside)
    tl.store(first + place, m.to(first.dtype.element_ty), mask=inside)
    tl.store(second + place, v.to(second.dtype.element_ty), mask=inside)
    if rounds:
        tl.store(rounded + place, w.to(rounded.dtype.element_ty), mask=inside)
