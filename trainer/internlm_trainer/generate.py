"""Completing a prompt with the model at hand: one row at a time, without a key-value cache."""

from __future__ import annotations

import torch
from torch import nn

from internlm_trainer.kernels.attention import Documents


@torch.no_grad()
def complete(
    model: nn.Module,
    prompt: list[int],
    *,
    stop: int,
    max_tokens: int = 64,
    context: int = 2048,
    temperature: float = 0.8,
    top_p: float = 0.8,
    seed: int = 0,
) -> list[int]:
    """Tokens that follow `prompt`, up to and without `stop`, by nucleus sampling (Holtzman et al., 1904.09751).

    Sampling is on the host from a seed, so that ranks that share a sharded model choose alike.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    tokens = list(prompt)
    for _ in range(max_tokens):
        seen = tokens[-context:]
        logits = model(torch.tensor(seen, device=device), Documents.of((len(seen),), device))[-1]
        weights, words = (logits.float().cpu() / temperature).softmax(-1).sort(descending=True)
        weights[weights.cumsum(-1) - weights > top_p] = 0.0
        word = int(words[torch.multinomial(weights, 1, generator=generator)])
        if word == stop:
            break
        tokens.append(word)
    return tokens[len(prompt) :]
