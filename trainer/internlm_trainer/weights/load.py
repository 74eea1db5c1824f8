"""The model with the weights that were found, to be asked."""

from __future__ import annotations

import torch

from internlm_trainer.checkpoint import Piece
from internlm_trainer.model.internlm import InternLM
from internlm_trainer.weights.source import MASTER, Weights, fill


def load_model(
    weights: Weights, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> InternLM:
    """The model with its weights, rounded to `dtype`, on `device`; reads a block of a tensor at a time.

    Default: on a GPU in bf16 if there is one, else on the CPU in fp32.
    """
    cuda = torch.cuda.is_available()
    device = device or torch.device("cuda" if cuda else "cpu")
    dtype = dtype or (torch.bfloat16 if cuda else torch.float32)
    with torch.device("meta"):
        model = InternLM(weights.shape).to(dtype)
    model.to_empty(device=device)
    fill(
        weights,
        (Piece(MASTER, name, 0, one.numel(), one.data.view(-1)) for name, one in model.named_parameters()),
    )
    return model.eval()
