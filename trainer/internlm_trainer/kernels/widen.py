"""Gradients into fp32 buffers.  PyTorch's own operations between types reach less than half of an H200's bandwidth."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def widen(target: Tensor, source: Tensor, *, add: bool) -> None:
    """Add `source` to `target`, or put it there: to the bit what `add_` and `copy_` do.

    Both `[n]` and contiguous, of any floating types; sums are rounded once, to the target's.
    """
    block = 4096
    grid = (triton.cdiv(target.numel(), block),)
    _widen[grid](target, source, target.numel(), adds=add, block=block, num_warps=8)


@triton.jit
def _widen(target, source, size, adds: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < size
    x = tl.load(source + place, mask=inside, other=0.0).to(target.dtype.element_ty)
    if adds:
        x += tl.load(target + place, mask=inside, other=0.0)
    tl.store(target + place, x, mask=inside)
