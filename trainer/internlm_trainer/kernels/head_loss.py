"""The head and its loss in one: logits exist for a few thousand tokens at a time and turn into their own gradient.

Neither logits nor their gradients are ever whole or in fp32.  For InternLM's 103,168 words they would take more memory
than anything else of a step, and reading and writing them more time than attention.  Computing the gradient in the
forward pass, chunk by chunk, is the idea of Liger Kernel's fused linear cross-entropy (Hsu et al., arXiv:2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Sum of the cross-entropies of `hidden @ weight.T`, 0-dim fp32, in nats.

    hidden: `[tokens, hidden_size]`, weight: `[words, hidden_size]`, both in bf16 or fp16.  The gradients of fp16 are
    rounded before a loss scale can save the small ones.
    labels: int64 `[tokens]`; those that are -100 have no loss.  chunk: tokens whose logits exist at a time.
    """
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _HeadLoss.apply(hidden, weight, labels, chunk, learns)
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, learns: bool) -> Tensor:
        losses = torch.empty(len(labels), dtype=torch.float32, device=labels.device)
        hidden_gradient = torch.empty_like(hidden) if learns else None
        weight_gradient: Tensor | None = None
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            logits = hidden[part] @ weight.T
            cross_entropy_(logits, labels[part], losses[part], gradient=learns)
            if hidden_gradient is not None:
                torch.mm(logits, weight, out=hidden_gradient[part])
                if len(labels) <= chunk:
                    weight_gradient = logits.T @ hidden
                else:
                    weight_gradient = _add_product(weight_gradient, logits.T, hidden[part])
            del logits  # before the next ones are made
        if learns:
            ctx.save_for_backward(hidden_gradient, weight_gradient)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        (factor,) = gradients
        # In place where the type stays, as nothing else holds them; in one pass where it does not.
        narrow = weight_gradient.dtype == hidden_gradient.dtype
        scaled = weight_gradient if narrow else torch.empty_like(weight_gradient, dtype=hidden_gradient.dtype)
        torch.mul(weight_gradient, factor, out=scaled)
        return hidden_gradient.mul_(factor), scaled, None, None, None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`total + a @ b` in fp32, in place, of factors in half of it."""
    if not a.is_cuda:  # PyTorch has no such product for CPUs
        product = a.float() @ b.float()
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)  # type: ignore[no-any-return]


def cross_entropy_(logits: Tensor, labels: Tensor, losses: Tensor, *, gradient: bool) -> None:
    """Write each token's loss to `losses`; with `gradient`, put the losses' gradients in place of the logits.

    logits: contiguous `[tokens, words]`, labels: int64 `[tokens]`, losses: fp32 `[tokens]`.
    """
    tokens, words = logits.shape
    _cross_entropy[(tokens,)](logits, labels, losses, words, with_gradient=gradient, block=4096, num_warps=8)


@triton.jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits, labels, losses, words, with_gradient: tl.constexpr, block: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * words
    label = tl.load(labels + token)
    columns = tl.arange(0, block)
    if label == -100:  # what PyTorch's cross-entropy ignores by default
        tl.store(losses + token, 0.0)
        if with_gradient:
            for start in range(0, words, block):
                inside = start + columns < words
                tl.store(row + start + columns, tl.zeros((block,), logits.dtype.element_ty), mask=inside)
        return
    # One pass for maximum and sum (Milakov and Gimelshein, arXiv:1805.02867).
    highest = float("-inf")
    total = 0.0
    for start in range(0, words, block):
        inside = start + columns < words
        x = tl.load(row + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        before = highest
        highest = tl.maximum(before, tl.max(x, 0))
        total = total * tl.exp(before - highest) + tl.sum(tl.exp(x - highest), 0)
    log_sum = highest + tl.log(total)
    tl.store(losses + token, log_sum - tl.load(row + label).to(tl.float32))
    if with_gradient:
        tl.debug_barrier()  # the label's logit is read before it is overwritten
        for start in range(0, words, block):
            inside = start + columns < words
            x = tl.load(row + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            slope = tl.exp(x - log_sum) - tl.where(start + columns == label, 1.0, 0.0)
            tl.store(row + start + columns, slope.to(logits.dtype.element_ty), mask=inside)
