"""Perplexity of texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.evaluation.likelihood import Likelihood, Progress, Request, Scorer


def windows(tokens: Sequence[int], bos: int, context: int, stride: int) -> Iterator[Request]:
    """A text in windows of at most `context` tokens: each token is scored once, after as many as fit.

    The first window scores its tokens from `<s>` on; each one after it the next `stride` tokens, after the
    `context - stride + 1` before them.
    """
    done = min(context, len(tokens))
    if done:
        yield Request([bos], list(tokens[:done]))
    while done < len(tokens):
        end = min(done + stride, len(tokens))
        yield Request(list(tokens[max(0, end - context - 1) : done]), list(tokens[done:end]))
        done = end


class Perplexity(NamedTuple):
    """Of all texts together; each token and each byte counts once."""

    logprob: float
    """Natural logarithm of their probability."""
    tokens: int
    bytes: int

    @property
    def metrics(self) -> dict[str, float]:
        """exp of the mean loss of a token and of a byte of UTF-8, and bits of a byte.

        That of a token depends on the vocabulary; those of a byte compare models of different ones.
        """
        return {
            "token_perplexity": math.exp(-self.logprob / self.tokens),
            "byte_perplexity": math.exp(-self.logprob / self.bytes),
            "bits_per_byte": -self.logprob / self.bytes / math.log(2),
        }


def requests_of(texts: Sequence[str], tokenizer: Tokenizer, context: int, stride: int) -> list[list[Request]]:
    """The windows of each text."""
    return [list(windows(tokenizer.encode(text), tokenizer.bos, context, stride)) for text in texts]


def perplexity(
    scorer: Scorer, texts: Sequence[str], parts: list[list[Request]], progress: Progress = lambda _: None
) -> Perplexity:
    """Of texts, whose windows are `parts`.  They must have a token."""
    requests = [one for part in parts for one in part]
    scores: list[Likelihood] = scorer.score(requests, progress)
    return Perplexity(
        math.fsum(one.logprob for one in scores),
        sum(len(one.continuation) for one in requests),
        sum(len(text.encode()) for text in texts),
    )
