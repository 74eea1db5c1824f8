"""Completing a prompt with the model at hand, one row at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from internlm_trainer.kernels.attention import Documents
from internlm_trainer.model.internlm import InternLM


class Sampling(NamedTuple):
    """How tokens are drawn: nucleus sampling (Holtzman et al., arXiv:1904.09751); temperature 0 takes the likeliest."""

    temperature: float = 0.8
    top_p: float = 0.8
    seed: int = 0

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token, on the host from a seed, so that ranks that share a sharded model choose alike."""
        logits = logits.float().cpu()
        if self.temperature == 0:
            return int(logits.argmax())
        weights, words = (logits / self.temperature).softmax(-1).sort(descending=True)
        weights[weights.cumsum(-1) - weights > self.top_p] = 0.0
        return int(words[torch.multinomial(weights, 1, generator=generator)])


@torch.no_grad()
def complete(
    model: nn.Module,
    prompt: list[int],
    *,
    stop: int,
    max_tokens: int = 64,
    context: int = 2048,
    sampling: Sampling = Sampling(),
) -> list[int]:
    """Tokens that follow `prompt`, up to and without `stop`; without a cache, so for a model under training too."""
    generator = sampling.generator()
    device = next(model.parameters()).device
    tokens = list(prompt)
    for _ in range(max_tokens):
        seen = tokens[-context:]
        logits = model(torch.tensor(seen, device=device), Documents.of((len(seen),), device))[-1]
        word = sampling.draw(logits, generator)
        if word == stop:
            break
        tokens.append(word)
    return tokens[len(prompt) :]


class _KeyValueCache:
    """A block's attention to all tokens so far: it keeps the keys and values of up to `context` of them."""

    def __init__(self, context: int) -> None:
        self.context, self.length = context, 0
        self.keys = self.values = torch.empty(0)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, _: Documents) -> Tensor:
        if not self.length:
            self.keys, self.values = (x.new_empty(self.context, *x.shape[1:]) for x in (k, v))
        new = slice(self.length, self.length + len(k))
        self.keys[new], self.values[new] = k, v
        self.length = new.stop
        q, k, v = (x.transpose(0, 1)[None] for x in (q, self.keys[: new.stop], self.values[: new.stop]))
        grouped = q.shape[1] != k.shape[1]
        seen = (
            torch.arange(new.stop, device=q.device)
            <= torch.arange(new.start, new.stop, device=q.device)[:, None]
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=grouped)
        return out[0].transpose(0, 1)


class Conversation:
    """A model that remembers what it has read, up to `context` tokens; it takes over the model's attention."""

    def __init__(self, model: InternLM, context: int) -> None:
        self.model, self.context = model, context
        self.read: list[int] = []
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self.read = []
        for block in self.model.blocks:
            block.attention = _KeyValueCache(self.context)  # type: ignore[assignment]

    @torch.no_grad()
    def _next(self, tokens: list[int]) -> Tensor:
        """Logits after `tokens`, which follow what was read."""
        device = self.model.norm.weight.device
        place = Documents.of((len(tokens),), device)
        begin, self.read = len(self.read), self.read + tokens
        logits: Tensor = self.model(
            torch.tensor(tokens, device=device), place._replace(positions=place.positions + begin)
        )
        return logits[-1]

    def answer(
        self, prompt: list[int], stop: Collection[int], max_tokens: int, sampling: Sampling
    ) -> Iterator[int]:
        """Read on, then give the tokens that follow, one by one, up to and without one of `stop`.

        Ends when the context is full; a `prompt` that does not fit is for the caller to refuse.
        """
        assert len(self.read) + len(prompt) <= self.context
        generator = sampling.generator()
        logits = self._next(prompt)
        for _ in range(max_tokens):
            word = sampling.draw(logits, generator)
            if word in stop:
                break
            yield word
            if len(self.read) == self.context:
                break
            logits = self._next([word])
