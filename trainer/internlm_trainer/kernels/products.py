"""What the blocks do with their weights, as PyTorch does it."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Products:
    """How a model multiplies with the weights of its blocks; `internlm_trainer.parallel.float8` has another way."""

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """What `layer` gives for `[tokens, in]`."""
        out: Tensor = layer(x)
        return out

    def swiglu(self, x: Tensor, w1: nn.Linear, w2: nn.Linear, w3: nn.Linear) -> Tensor:
        """`w3(silu(w1 x) * w2 x)`."""
        out: Tensor = w3(F.silu(w1(x)) * w2(x))
        return out


PLAIN = Products()
