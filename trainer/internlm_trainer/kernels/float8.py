"""Matrix products in float8: the blocks' linear layers, whose three products of a step run on numbers of eight bits.

Each tensor is divided by one scale, so that its largest number becomes the type's largest (tensorwise scaling,
Micikevicius et al., arXiv:2209.05433): inputs and weights in e4m3, gradients, which spread wider, in e5m2.  Products
add up in fp32 and give the inputs' type.  Hopper multiplies float8 only where both factors lie along what is summed
over, so each tensor is rounded twice in one pass: as it lies, and turned over.

On CPUs it is the same arithmetic without the speed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from internlm_trainer.kernels.swiglu import swiglu, swiglu_backward

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """What numbers up to `largest`, 0-dim, are divided by to fill the type; fp32."""
    return largest.float().clamp(min=1e-12) / torch.finfo(dtype).max


def _largest(x: Tensor) -> Tensor:
    """By rows first: the compiler then finds it where the rows are made."""
    return x.abs().amax(-1).amax()


@torch.library.triton_op("internlm::round_float8", mutates_args=())
def round_float8(x: Tensor, scale: Tensor, wide: bool) -> tuple[Tensor, Tensor]:
    """`x / scale`, of `[rows, columns]`, in e4m3 or, if `wide`, in e5m2: as it lies, and `[columns, rows]`."""
    dtype = E5M2 if wide else E4M3
    plain = torch.empty(x.shape, dtype=dtype, device=x.device)
    turned = torch.empty(x.shape[::-1], dtype=dtype, device=x.device)
    _round_into(x, scale, plain, turned)
    return plain, turned


def _round_into(x: Tensor, scale: Tensor, plain: Tensor, turned: Tensor) -> None:
    rows, columns = x.shape
    largest = torch.finfo(plain.dtype).max
    if not x.is_cuda:  # Triton's interpreter rounds to float8 in another way
        plain.copy_((x.float() * (1 / scale)).clamp(-largest, largest))
        turned.copy_(plain.T)
        return
    grid = (triton.cdiv(rows, 64), triton.cdiv(columns, 64))
    torch.library.wrap_triton(_round)[grid](
        x, scale, plain, turned, rows, columns, x.stride(0), turned.stride(0), largest, block=64, num_warps=4
    )


@triton.jit
def _round(  # type: ignore[no-untyped-def]
    x,
    scale,
    plain,
    turned,
    rows,
    columns,
    stride,
    turned_stride,
    largest: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    column = tl.program_id(1).to(tl.int64) * block + tl.arange(0, block)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    values *= tl.div_rn(1.0, tl.load(scale))
    values = tl.minimum(tl.maximum(values, -largest), largest).to(plain.dtype.element_ty)
    tl.store(plain + row[:, None] * columns + column[None, :], values, mask=inside)
    over = (column < columns)[:, None] & (row < rows)[None, :]
    tl.store(turned + column[:, None] * turned_stride + row[None, :], tl.trans(values), mask=over)


class Weight(nn.Module):
    """The float8 copy of some layers' weights, one below the other: `[out, in]`."""

    plain: Tensor
    turned: Tensor
    scale: Tensor

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        self._weights = [layer.weight.detach() for layer in layers]
        rows, columns, device = sum(map(len, self._weights)), layers[0].in_features, layers[0].weight.device
        for name, shape, dtype in (
            ("plain", (rows, columns), E4M3),
            ("turned", (columns, rows), E4M3),
            ("scale", (), torch.float32),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    @torch.no_grad()
    def round(self) -> None:
        """Take over what the layers' weights are now."""
        norms = torch._foreach_norm(self._weights, torch.inf)
        self.scale.copy_(scale_of(torch.stack(norms).amax(), E4M3))
        start = 0
        for weight in self._weights:
            stop = start + len(weight)
            _round_into(weight, self.scale, self.plain[start:stop], self.turned[:, start:stop])
            start = stop


def linear(x: Tensor, rounded: Weight, layer: nn.Linear) -> Tensor:
    """What `layer` gives for `x`, `[tokens, in]`."""
    out: Tensor = _Linear.apply(x, rounded.plain, rounded.turned, rounded.scale, layer.bias, layer.weight)
    return out


def feed_forward(x: Tensor, up: Weight, down: Weight, w1: nn.Linear, w2: nn.Linear, w3: nn.Linear) -> Tensor:
    """`w3(silu(w1 x) * w2 x)`, `[tokens, in]`; `up` has w1 and w2, `down` w3."""
    out: Tensor = _FeedForward.apply(
        x, up.plain, up.turned, up.scale, down.plain, down.turned, down.scale, w1.weight, w2.weight, w3.weight
    )
    return out


def _multiply(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """`a @ b.T + bias`, both as they lie in memory; `fast`: sums of fewer bits than fp32, where the GPU offers that."""
    if not a.is_cuda:  # where PyTorch's own takes 500 times as long, for the same numbers
        product = (a.float() @ b.float().t()) * (a_scale * b_scale)
        return (product if bias is None else product + bias).to(dtype)
    return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=dtype, bias=bias, use_fast_accum=fast)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plain: Tensor,
        turned: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        *_weight: Tensor,
    ) -> Tensor:
        scale = scale_of(_largest(x), E4M3)
        x8, x8_turned = round_float8(x, scale, False)
        ctx.save_for_backward(x8_turned, scale, turned, weight_scale)
        ctx.biased = bias is not None
        return _multiply(x8, plain, scale, weight_scale, x.dtype, bias=bias, fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x8_turned, x_scale, turned, weight_scale = ctx.saved_tensors
        (gradient,) = gradients
        scale, dtype = scale_of(_largest(gradient), E5M2), gradient.dtype
        g8, g8_turned = round_float8(gradient, scale, True)
        into_x = _multiply(g8, turned, scale, weight_scale, dtype, fast=True)
        into_weight = _multiply(g8_turned, x8_turned, scale, x_scale, dtype)
        return into_x, None, None, None, gradient.sum(0) if ctx.biased else None, into_weight


class _FeedForward(torch.autograd.Function):
    """As a whole, so that who computes a tensor also tells its largest number."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up: Tensor,
        up_turned: Tensor,
        up_scale: Tensor,
        down: Tensor,
        down_turned: Tensor,
        down_scale: Tensor,
        *_weights: Tensor,
    ) -> Tensor:
        x_scale = scale_of(_largest(x), E4M3)
        x8, x8_turned = round_float8(x, x_scale, False)
        joint = _multiply(x8, up, x_scale, up_scale, x.dtype, fast=True)
        product, largest = swiglu(joint)
        scale = scale_of(largest.amax(), E4M3)
        p8, p8_turned = round_float8(product, scale, False)
        ctx.save_for_backward(
            x8_turned, x_scale, joint, p8_turned, scale, up_turned, up_scale, down_turned, down_scale
        )
        return _multiply(p8, down, scale, down_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x8_turned, x_scale, joint, p8_turned, p_scale, up_turned, up_scale, down_turned, down_scale = (
            ctx.saved_tensors
        )
        (gradient,) = gradients
        scale, dtype = scale_of(_largest(gradient), E5M2), gradient.dtype
        g8, g8_turned = round_float8(gradient, scale, True)
        into_product = _multiply(g8, down_turned, scale, down_scale, dtype, fast=True)
        into_w3 = _multiply(g8_turned, p8_turned, scale, p_scale, dtype)
        into_joint, largest = swiglu_backward(joint, into_product)
        del into_product  # a quarter of what is there at the worst moment
        scale = scale_of(largest.amax(), E5M2)
        g8, g8_turned = round_float8(into_joint, scale, True)
        into_x = _multiply(g8, up_turned, scale, up_scale, dtype, fast=True)
        into_w1, into_w2 = _multiply(g8_turned, x8_turned, scale, x_scale, dtype).chunk(2)
        return into_x, None, None, None, None, None, None, into_w1, into_w2, into_w3
