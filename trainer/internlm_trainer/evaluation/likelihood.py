"""How likely a model takes texts for: log-likelihoods of many continuations, packed by length without padding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.kernels.attention import Documents, choose
from internlm_trainer.model.internlm import InternLM

Progress = Callable[[int], None]
# Logits in memory at once: 256 MiB in fp32.
_LOGITS = 1 << 26


class Request(NamedTuple):
    """Tokens, and those after them that are to be scored."""

    context: list[int]
    continuation: list[int]


class Likelihood(NamedTuple):
    """Of a continuation.

    logprob: natural logarithm of its probability.  greedy: whether it is what the model itself would write.
    """

    logprob: float
    greedy: bool


def request_of(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """A continuation of a text, after `<s>`.

    Spaces at the end of the context are taken for the continuation's, and both are tokenized as one text, since most
    vocabularies have words that begin with a space.
    """
    kept = context.rstrip()
    first = [tokenizer.bos, *tokenizer.encode(kept)]
    whole = [tokenizer.bos, *tokenizer.encode(context + continuation)]
    return Request(first, whole[len(first) :])


class Scorer:
    """A model that scores; `batch_tokens` at a time, and of a longer text than `context` only its end is read."""

    def __init__(self, model: InternLM, context: int, batch_tokens: int) -> None:
        self.model, self.context, self.batch_tokens = model, context, batch_tokens
        self.device = model.norm.weight.device
        attention = choose(self.device, model.norm.weight.dtype).attention
        for block in model.blocks:
            block.attention = attention  # type: ignore[assignment]

    @torch.no_grad()
    def score(self, requests: Sequence[Request], progress: Progress = lambda _: None) -> list[Likelihood]:
        """The likelihood of each request's continuation; those that read the same tokens are read once.

        progress: hears how many requests are done.
        """
        found = [Likelihood(0.0, True)] * len(requests)
        rows: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, one in enumerate(requests):
            if one.continuation:
                rows[tuple((one.context + one.continuation)[-self.context - 1 : -1])].append(number)
            else:
                progress(1)
        for batch in self._batches(rows):
            for tokens, states in zip(batch, self._states(batch, rows, requests), strict=True):
                for number in rows[tokens]:
                    found[number] = self._likelihood(states, requests[number].continuation[-self.context :])
                progress(len(rows[tokens]))
        return found

    def _batches(self, rows: dict[tuple[int, ...], list[int]]) -> Iterator[list[tuple[int, ...]]]:
        """Rows of about the same length, the longest first: if memory does not suffice, that is seen at once."""
        batch: list[tuple[int, ...]] = []
        for row in sorted(rows, key=len, reverse=True):
            if batch and len(row) + sum(map(len, batch)) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _states(
        self,
        batch: list[tuple[int, ...]],
        rows: dict[tuple[int, ...], list[int]],
        requests: Sequence[Request],
    ) -> tuple[Tensor, ...]:
        """What the head reads at the end of each row, as far as its longest continuation goes back."""
        lengths = tuple(map(len, batch))
        tokens = torch.tensor([token for row in batch for token in row], device=self.device)
        states = torch.split(self.model.hidden(tokens, Documents.of(lengths, self.device)), list(lengths))
        longest = [max(len(requests[number].continuation) for number in rows[row]) for row in batch]
        return tuple(one[-last:] for one, last in zip(states, longest, strict=True))

    def _likelihood(self, states: Tensor, continuation: list[int]) -> Likelihood:
        total, greedy = 0.0, True
        wanted = torch.tensor(continuation, device=self.device)
        step = max(1, _LOGITS // self.model.shape.vocab_size)
        for part, words in zip(
            torch.split(states[-len(wanted) :], step), torch.split(wanted, step), strict=True
        ):
            logits = self.model.head(part).float()
            chosen = logits.log_softmax(-1).gather(1, words[:, None])
            total += float(chosen.double().sum())
            greedy = greedy and bool((logits.argmax(-1) == words).all())
        return Likelihood(total, greedy)
