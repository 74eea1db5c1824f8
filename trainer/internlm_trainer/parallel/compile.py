"""torch.compile for the parts of each block before and after attention.

They are compiled once for all blocks: their shapes are fixed by the row's length.  Attention stays outside, with
the documents that differ in every row, and so do Hybrid ZeRO's hooks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from internlm_trainer.parallel.recompute import REGIONS

log = logging.getLogger(__name__)


def apply_compile(blocks: Iterable[nn.Module], setting: str, device: torch.device, row_tokens: int) -> None:
    """Compile `blocks` as `spec.parallel.compile` says, for rows of `row_tokens` tokens.

    Rows of other lengths (completions) run as the operations are written, and so does everything where
    compilation fails.  Fused operations round in other places: results differ in the last bits.
    """
    if setting == "none" or (setting == "auto" and device.type != "cuda"):
        log.info("torch.compile: off (%s)", "on CPUs" if setting == "auto" else "parallel.compile is none")
        return
    log.info(
        "torch.compile: each block (%s)", "on GPUs" if setting == "auto" else "parallel.compile is blocks"
    )
    compiler = _Compiler(row_tokens)
    for block in blocks:
        for region in REGIONS:
            setattr(block, region, compiler.compile(getattr(block, region)))


class _Compiler:
    def __init__(self, row_tokens: int) -> None:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # takes a second

        self.row_tokens, self.works = row_tokens, True
        self.failures = (TorchDynamoException, FailOnRecompileLimitHit)

    def compile(self, eager: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(eager, dynamic=False, fullgraph=True)

        def region(x: Tensor, *others: Tensor) -> Any:
            if self.works and x.shape[0] == self.row_tokens:
                try:
                    return compiled(x, *others)
                except self.failures as error:
                    reason = str(error).strip().splitlines()[0]
                    log.warning("torch.compile failed, the blocks run without it: %s", reason)
                    self.works = False
            return eager(x, *others)

        return region
