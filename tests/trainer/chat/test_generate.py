"""Tokens with a cache are those without, many prompts at once are each alone, and greedy ones are Transformers'."""

from __future__ import annotations

import random
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from internlm_trainer.checkpoint.tools import open_one
from internlm_trainer.errors import UserError
from internlm_trainer.generate import Decoder, Request, Sampler, Sampling, complete
from internlm_trainer.model.internlm import InternLM
from internlm_trainer.weights.export import export_llama
from internlm_trainer.weights.source import CheckpointWeights
from trainer.weights.models import SHAPES, random_weights, save

CONTEXT, STOP = 96, 7
GREEDY = Sampling(temperature=0)
CPU = torch.device("cpu")


def model_of(shape: str = "InternLM2") -> InternLM:
    model = InternLM(SHAPES[shape])
    model.load_state_dict(random_weights(SHAPES[shape]))
    return model.eval()


def prompts(number: int, longest: int = 30) -> list[list[int]]:
    """Of different lengths; some begin alike."""
    chance = random.Random(number)
    start = [chance.randrange(8, 512) for _ in range(10)]
    return [
        start[: chance.randrange(10)]
        + [chance.randrange(8, 512) for _ in range(chance.randrange(1, longest - 9))]
        for _ in range(number)
    ]


def requests(sampling: Sampling, number: int = 5, max_tokens: int = 20) -> list[Request]:
    return [
        Request(prompt, frozenset({STOP}), max_tokens, sampling._replace(seed=sampling.seed + index))
        for index, prompt in enumerate(prompts(number))
    ]


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers(tmp_path: Path, shape: str) -> None:
    weights = random_weights(SHAPES[shape])
    saved = CheckpointWeights(open_one(save(str(tmp_path / "checkpoints"), SHAPES[shape], weights)))
    export_llama(saved, str(tmp_path / "out"), "fp32", None, CONTEXT)
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    asked = requests(GREEDY)
    ours = Decoder(model_of(shape), CONTEXT, rows=3).generate(asked)
    for one, found in zip(asked, ours, strict=True):
        made = theirs.generate(
            torch.tensor([one.prompt]),
            max_new_tokens=one.max_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            eos_token_id=STOP,
            pad_token_id=0,
        )[0].tolist()[len(one.prompt) :]
        assert found == [token for token in made if token != STOP]
    assert len({tuple(one) for one in ours}) == len(ours)


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, Sampling(seed=3), Sampling(1.3, 1.0, 5, 1.4, 11), Sampling(0, repetition_penalty=1.3)],
)
def test_neither_cache_nor_company_changes_a_token(sampling: Sampling) -> None:
    model, asked = model_of(), requests(sampling)
    expected = [
        complete(model, one.prompt, stop=STOP, max_tokens=one.max_tokens, sampling=one.sampling)
        for one in asked
    ]
    for rows in (1, 3):
        decoder = Decoder(model, CONTEXT, rows)
        assert decoder.generate(asked) == expected
        assert decoder.generate(asked[::-1]) == expected[::-1]  # over caches that hold others


def test_a_prompt_that_goes_on_is_read_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, read = Decoder(model_of(), CONTEXT, rows=2), []
    real = decoder._read
    monkeypatch.setattr(
        decoder, "_read", lambda row, tokens, begin: (read.append((tokens, begin)), real(row, tokens, begin))
    )
    first = Request([5, 6, 7, 8], frozenset(), 10, GREEDY)
    answer = decoder.generate([first])[0]
    longer = [*first.prompt, *answer, 9, 10]
    asked = Request(longer, frozenset(), 10, GREEDY)
    found = decoder.generate([asked])[0]
    # The last token of an answer is made, and not read.
    assert read == [([5, 6, 7], 0), ([answer[-1], 9], 13)]
    assert found == Decoder(model_of(), CONTEXT).generate([asked])[0]


def test_long_prompts_that_go_on_are_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internlm_trainer.generate._CHUNK", 4)
    model, (one, *_) = model_of(), requests(GREEDY)
    decoder = Decoder(model, CONTEXT)
    decoder.generate([one])
    longer = one._replace(prompt=[*one.prompt, *range(20, 43)])
    assert decoder.generate([longer]) == Decoder(model, CONTEXT).generate([longer])


@pytest.mark.parametrize("length", [CONTEXT - 3, CONTEXT])
def test_an_answer_ends_with_the_context_and_the_cache_is_good_after(length: int) -> None:
    model, chance = model_of(), random.Random(1)
    full = Request([chance.randrange(512) for _ in range(length)], frozenset(), 50, GREEDY)
    decoder, other = Decoder(model, CONTEXT, rows=2), requests(GREEDY)[0]
    first = decoder.generate([full, other])
    assert [len(one) for one in first] == [CONTEXT - length + 1, 20]
    assert decoder.generate([full, other]) == first
    assert first[1] == Decoder(model, CONTEXT).generate([other])[0]


def test_the_reason_of_an_end_is_told_and_an_answer_may_be_left() -> None:
    decoder = Decoder(model_of(), CONTEXT)
    asked = requests(GREEDY)[0]
    made = list(decoder.answer(asked))
    assert [one.finish for one in made] == [None] * 19 + ["length"]
    stop = made[4].token
    assert stop is not None
    stopped = list(decoder.answer(asked._replace(stop=frozenset({stop}))))
    first = [one.token for one in made].index(stop)
    assert [one.token for one in stopped] == [*(one.token for one in made[:first]), None]
    assert stopped[-1].finish == "stop"
    left = decoder.answer(asked)
    assert next(left) == made[0]
    left.close()
    assert decoder.free == 1
    assert list(decoder.answer(asked)) == made


@given(
    st.lists(st.integers(-40, 40), min_size=6, max_size=6, unique=True),  # of equals, Transformers keeps all
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([0.0, 0.4, 0.9, 1.0]),
    st.integers(0, 7),
    st.sampled_from([1.0, 1.73]),
)
@settings(max_examples=40)
def test_what_may_be_drawn_is_what_transformers_leaves(
    logits: list[int], temperature: float, top_p: float, top_k: int, penalty: float
) -> None:
    seen, row = [1, 4], torch.tensor([logits]) / 5
    rules = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
        + ([TopKLogitsWarper(top_k)] if top_k else [])
        + [TopPLogitsWarper(top_p)]
    )
    theirs = rules(torch.tensor([seen]), row.clone())[0].softmax(-1)
    sampler = Sampler(500, 6, 1, CPU)
    for number in range(500):
        sampler.begin(number, Sampling(temperature, top_p, top_k, penalty), seen)
    sampler.uniform[:, 0] = (torch.arange(500) + 0.5) / 500  # evenly over the line
    drawn = sampler.draw(row.expand(500, -1), plain=False).bincount(minlength=6) / 500
    assert (drawn - theirs).abs().max() <= 0.0041


def test_a_seed_draws_the_same_numbers_whatever_the_length() -> None:
    long, short = Sampler(1, 9, 300, CPU), Sampler(1, 9, 5, CPU)
    for one in (long, short):
        one.begin(0, Sampling(seed=4), [1])
    assert torch.equal(long.uniform[:, :5], short.uniform)


def test_decoding_compiles_into_one_graph() -> None:
    """The whole step without a break, and without another compilation as rows come and go."""
    torch._dynamo.reset()
    decoder, asked = Decoder(model_of(), CONTEXT, rows=3), requests(Sampling(seed=5), 6)
    expected = decoder.generate(asked)
    compilations = count()

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        next(compilations)
        return graph.forward

    decoder.compiled = True
    decoder._step = torch.compile(decoder._decode, backend=backend, fullgraph=True, dynamic=False)
    assert decoder.generate(asked) == expected
    assert next(compilations) == 1


def test_a_context_that_no_memory_holds_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    model = model_of()
    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(UserError, match=r"2 x 1000000 tokens of context need 2\.4 GiB.*--context"):
        Decoder(model, 1_000_000, rows=2)
