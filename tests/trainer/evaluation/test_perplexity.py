"""Perplexity is what its definition says, whatever the windows and the batches."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.evaluation.likelihood import Request, Scorer, request_of
from internlm_trainer.evaluation.perplexity import perplexity, requests_of, windows
from internlm_trainer.kernels.attention import Documents
from internlm_trainer.weights.load import load_model
from internlm_trainer.weights.recognise import open_weights


@given(st.integers(0, 50), st.integers(1, 12), st.data())
def test_windows_score_each_token_once_after_what_is_before_it(
    length: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    tokens = list(range(1, length + 1))
    found = list(windows(tokens, 0, context, stride))
    assert [token for one in found for token in one.continuation] == tokens
    for one in found:
        read = (one.context + one.continuation)[:-1]
        assert len(read) <= context
        assert one.context + one.continuation == list(range(read[0], read[0] + len(read) + 1))
        assert len(one.continuation) <= stride or one.context == [0]


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    weights = open_weights(str(folder / "checkpoints"), "SOURCE")
    return Scorer(load_model(weights, torch.device("cpu"), torch.float32), 40, 100)


@torch.no_grad()
def plainly(scorer: Scorer, request: Request) -> float:
    """By the definition: one row, the whole of it."""
    tokens = request.context + request.continuation
    logits = scorer.model(torch.tensor(tokens[:-1]), Documents.of((len(tokens) - 1,), "cpu")).log_softmax(-1)
    scored = range(len(request.context), len(tokens))
    return math.fsum(float(logits[place - 1, tokens[place]]) for place in scored)


def test_rows_that_are_packed_score_as_each_alone(scorer: Scorer) -> None:
    generator = torch.Generator().manual_seed(0)
    requests = []
    for length in (2, 3, 7, 7, 7, 20, 39, 2):
        tokens = torch.randint(3, 500, (length,), generator=generator).tolist()
        requests += [Request(tokens[:1], tokens[1:]), Request(tokens[:-1], [*tokens[-1:], 5, 6][:2])]
    requests += [Request(requests[-1].context, [word]) for word in (7, 8, 9)]
    done: list[int] = []
    found = scorer.score(requests, done.append)
    assert sum(done) == len(requests)
    for one, request in zip(found, requests, strict=True):
        assert one.logprob == pytest.approx(plainly(scorer, request), rel=1e-5)


def test_the_likeliest_word_is_greedy(scorer: Scorer) -> None:
    with torch.no_grad():
        best = int(scorer.model(torch.tensor([1, 70, 80]), Documents.of((3,), "cpu"))[-1].argmax())
    found = scorer.score([Request([1, 70, 80], [word]) for word in (best, best + 1)])
    assert [one.greedy for one in found] == [True, False]


def test_of_a_long_text_the_end_is_read(scorer: Scorer) -> None:
    long = Request([1, *range(50, 150)], [7, 8])
    assert scorer.score([long])[0].logprob == pytest.approx(
        plainly(scorer, Request(long.context[-39:], long.continuation)), rel=1e-5
    )


@pytest.mark.parametrize("stride", [40, 13])
def test_perplexity_is_the_mean_of_all_tokens_and_bytes(scorer: Scorer, folder: Path, stride: int) -> None:
    words = Tokenizer((folder / "tokenizer.model").read_bytes())
    texts = ["def f(x):\n    return x\n" * 20, "学", "import json"]
    parts = requests_of(texts, words, scorer.context, stride)
    found = perplexity(scorer, texts, parts)
    logprob = math.fsum(plainly(scorer, one) for part in parts for one in part)
    assert found.tokens == sum(len(words.encode(text)) for text in texts)
    assert found.metrics["token_perplexity"] == pytest.approx(math.exp(-logprob / found.tokens), rel=1e-5)
    assert found.metrics["byte_perplexity"] == pytest.approx(
        math.exp(-logprob / sum(len(text.encode()) for text in texts)), rel=1e-5
    )
    assert 2 ** found.metrics["bits_per_byte"] == pytest.approx(found.metrics["byte_perplexity"])


def test_spaces_before_an_answer_belong_to_it(folder: Path) -> None:
    words = Tokenizer((folder / "tokenizer.model").read_bytes())
    assert request_of(words, "return ", "x") == request_of(words, "return", " x")
