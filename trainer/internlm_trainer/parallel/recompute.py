"""Activation recomputation: the backward pass computes again what the forward pass did not keep.

Chen et al., arXiv:1604.06174; by operation: Korthikanti et al., arXiv:2205.05198.  Both are PyTorch's
`checkpoint`, applied from outside to a block or to parts of one, inside of what `nn.Module.__call__` runs.  So
Hybrid ZeRO's hooks do not run a second time: a block computes again with the parameters that its backward gathered.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from internlm_trainer.config import ModelShape
from internlm_trainer.config.parallel import recomputed_blocks

# A block's methods whose shapes depend on nothing but the row's length; attention lies between them.
REGIONS = ("before_attention", "after_attention")
# And which of an operation's inputs is the weight, transposed.
MATRIX_PRODUCTS = {
    torch.ops.aten.mm.default: 1,
    torch.ops.aten.addmm.default: 2,
    torch.ops.aten._scaled_mm.default: 1,
}


def apply_recompute(blocks: Iterable[nn.Module], shape: ModelShape, recompute: str) -> None:
    """Make a model's blocks recompute as `spec.parallel.recompute` says; to be called before `apply_compile`.

    No result changes, to the bit: the same operations run again on the same numbers (there is no dropout).
    """
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    blocks = list(blocks)
    if recompute == "selective":
        policy = partial(_policy, (shape.ffn_size, shape.hidden_size))
        selectively = partial(again, context_fn=partial(create_selective_checkpoint_contexts, policy))
        # What attention needs and gives is kept, whichever back end it is: it lies outside of both regions.
        for block in blocks:
            for region in REGIONS:
                setattr(block, region, partial(selectively, getattr(block, region)))
    for block, whole in zip(blocks, recomputed_blocks(recompute, len(blocks)), strict=True):
        if whole:
            setattr(block, "forward", partial(again, block.forward))  # noqa: B010 (mypy: it was a method)


def _policy(last: tuple[int, int], _context: Any, operation: Any, *inputs: Any, **_: Any) -> CheckpointPolicy:
    """Keep what matrix products give, but for the feed-forward's last, which no gradient needs.

    last: shape of its weight, transposed; no other weight has it, unless both sizes are equal.
    """
    weight = MATRIX_PRODUCTS.get(operation)
    if weight is not None and (inputs[weight].shape != last or last[0] == last[1]):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
