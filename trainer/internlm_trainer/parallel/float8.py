"""The blocks' products in float8, applied to a model from outside; `kernels.float8` has the arithmetic.

The float8 copies of the weights are made once after each update, however many micro-batches follow, and are whole on
every rank.  Embedding, norms, attention, head and loss stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from internlm_trainer.errors import UserError
from internlm_trainer.kernels import float8
from internlm_trainer.kernels.float8 import Weight
from internlm_trainer.kernels.products import Products

CAPABILITY = (8, 9)


def check_device(device: torch.device) -> None:
    """Raises UserError for a GPU that has no float8."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise UserError(
            f"training.precision: fp8 needs a GPU of compute capability {'.'.join(map(str, CAPABILITY))} or later "
            f"(L40S, H100), and {torch.cuda.get_device_name(device)} has {'.'.join(map(str, found))}: use bf16"
        )


class Float8(Products):
    """Products in float8 while `on`, of blocks that `attach` has seen.

    Without gradients they are plain: a validation tells how good the weights are for those who use them.
    """

    def __init__(self) -> None:
        self.on = True
        """Whether it is used; else the blocks multiply in bf16."""
        self.apart = 0
        """Comparisons with bf16 in a row that were too far apart."""

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        if not self._learns():
            return super().linear(x, layer)
        return float8.linear(x, _rounded(layer), layer)

    def swiglu(self, x: Tensor, w1: nn.Linear, w2: nn.Linear, w3: nn.Linear) -> Tensor:
        if not self._learns():
            return super().swiglu(x, w1, w2, w3)
        return float8.feed_forward(x, _rounded(w1), _rounded(w3), w1, w2, w3)

    def _learns(self) -> bool:
        return self.on and torch.is_grad_enabled()

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"on": self.on, "apart": self.apart}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.on, self.apart = state["on"], state["apart"]

    def attach(
        self, block: nn.Module, multiplied: Iterable[tuple[nn.Linear, ...]], updates: Callable[[], int]
    ) -> None:
        """Give a block float8 copies of its weights, which it makes anew in the first forward after an update.

        To be called when the parameters are where they stay.
        multiplied: the layers, those together that multiply the same numbers.  updates: how many there have been.
        """
        copies = []
        for layers in multiplied:
            copies.append(Weight(*layers))
            layers[0].rounded = copies[-1]
        block.register_forward_pre_hook(partial(self._refresh, copies, [-1], updates))

    def _refresh(self, copies: list[Weight], made: list[int], updates: Callable[[], int], *_: Any) -> None:
        if self.on and made[0] != updates():
            made[0] = updates()
            for copy in copies:
                copy.round()


def _rounded(layer: nn.Linear) -> Weight:
    copy = layer.rounded
    assert isinstance(copy, Weight)
    return copy
