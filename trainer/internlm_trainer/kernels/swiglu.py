"""SwiGLU on the joint outputs of its two layers, forward and backward in one pass each, which also finds the largest
number that comes out: what follows in float8 needs it before it can round anything."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@torch.library.triton_op("internlm::swiglu", mutates_args=())
def swiglu(joint: Tensor) -> tuple[Tensor, Tensor]:
    """`silu(gate) * up`, `[tokens, size]`, of contiguous `[tokens, 2 size]`, gate first; and fp32 maxima of the
    absolute values of its parts."""
    tokens, size = len(joint), joint.shape[1] // 2
    if not joint.is_cuda:
        gate, up = joint.float().chunk(2, dim=-1)
        out = (F.silu(gate) * up).to(joint.dtype)
        return out, out.abs().amax(-1).float()
    out = joint.new_empty(tokens, size)
    parts = triton.cdiv(size, BLOCK)
    largest = torch.empty((tokens, parts), dtype=torch.float32, device=joint.device)
    torch.library.wrap_triton(_forward)[(tokens, parts)](joint, out, largest, size, block=BLOCK, num_warps=4)
    return out, largest


@torch.library.triton_op("internlm::swiglu_backward", mutates_args=())
def swiglu_backward(joint: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `joint`, by that of what `swiglu` gave, contiguous `[tokens, size]`; and maxima of its parts."""
    tokens, size = gradient.shape
    if not joint.is_cuda:
        gate, up = joint.float().chunk(2, dim=-1)
        sigmoid, slope = gate.sigmoid(), gradient.float()
        into_gate = slope * up * sigmoid * (1 + gate * (1 - sigmoid))
        out = torch.cat((into_gate, slope * gate * sigmoid), dim=-1).to(joint.dtype)
        return out, out.abs().amax(-1).float()
    out = torch.empty_like(joint)
    parts = triton.cdiv(size, BLOCK)
    largest = torch.empty((tokens, parts), dtype=torch.float32, device=joint.device)
    torch.library.wrap_triton(_backward)[(tokens, parts)](
        joint, gradient, out, largest, size, block=BLOCK, num_warps=4
    )
    return out, largest


@triton.jit
def _forward(joint, out, largest, size, block: tl.constexpr):  # type: ignore[no-untyped-def]
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * block + tl.arange(0, block)
    inside = column < size
    gate = tl.load(joint + token * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(joint + token * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    value = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
    tl.store(out + token * size + column, value, mask=inside)
    tl.store(largest + token * tl.num_programs(1) + part, tl.max(tl.abs(value.to(tl.float32)), 0))


@triton.jit
def _backward(joint, gradient, out, largest, size, block: tl.constexpr):  # type: ignore[no-untyped-def]
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * block + tl.arange(0, block)
    inside = column < size
    gate = tl.load(joint + token * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(joint + token * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(gradient + token * size + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    into_gate = (slope * up * sigmoid * (1 + gate * (1 - sigmoid))).to(out.dtype.element_ty)
    into_up = (slope * gate * sigmoid).to(out.dtype.element_ty)
    tl.store(out + token * 2 * size + column, into_gate, mask=inside)
    tl.store(out + token * 2 * size + size + column, into_up, mask=inside)
    both = tl.maximum(tl.abs(into_gate.to(tl.float32)), tl.abs(into_up.to(tl.float32)))
    tl.store(largest + token * tl.num_programs(1) + part, tl.max(both, 0))
