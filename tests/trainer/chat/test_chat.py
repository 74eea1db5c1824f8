"""A model is talked to with a cache, and says what it says without one; and what Transformers says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from internlm_trainer.chat.messages import Message, form_of, prompt
from internlm_trainer.chat.reading import Piece
from internlm_trainer.chat.talk import Answer, Asking, Chat, Speaker
from internlm_trainer.cli import app
from internlm_trainer.commands.opened import open_model
from internlm_trainer.config import ModelShape
from internlm_trainer.data.tokenizer import Tokenizer, train_tokenizer
from internlm_trainer.generate import Sampling, complete
from internlm_trainer.model.internlm import InternLM
from internlm_trainer.weights.export import export_llama
from internlm_trainer.weights.load import load_model
from internlm_trainer.weights.recognise import open_weights
from trainer.weights.models import SHAPES, random_weights, save

GREEDY = Sampling(temperature=0)
CONTEXT = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoints` of a model with grouped queries, and `tokenizer.model`."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(train_tokenizer([Path(json.__file__).read_text()], 512))
    shape = SHAPES["InternLM2"]
    save(str(folder / "checkpoints"), shape, random_weights(shape), tokenizer=str(tokenizer), seqLen=CONTEXT)
    return folder


def model_of(folder: Path) -> InternLM:
    return load_model(open_weights(str(folder / "checkpoints"), "SOURCE"), torch.device("cpu"), torch.float32)


def chat_of(folder: Path, context: int | None = None) -> Chat:
    opened = open_model(str(folder / "checkpoints"), None, context)
    decoder, words = opened.decoder, opened.tokenizer
    return Chat(Speaker(decoder.answer, words, decoder.context, form_of(words)))


def ask(chat: Chat, question: str, max_tokens: int) -> tuple[str, Answer]:
    """The text as it came, and the whole."""
    *pieces, answer = chat.ask(question, Asking(GREEDY, max_tokens))
    assert isinstance(answer, Answer)
    text = "".join(one.text for one in pieces if isinstance(one, Piece))
    assert answer.message.content == text
    return text, answer


@torch.no_grad()
def test_a_chat_is_that_of_transformers_over_several_turns(folder: Path) -> None:
    weights, tokenizer = (
        open_weights(str(folder / "checkpoints"), "SOURCE"),
        Tokenizer((folder / "tokenizer.model").read_bytes()),
    )
    export_llama(weights, str(folder / "out"), "fp32", tokenizer, CONTEXT)
    theirs, words = (
        kind.from_pretrained(str(folder / "out")) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    chat = chat_of(folder)
    ids: list[int] = []
    for question in ("Who?", "Why is it so?"):
        text, answer = ask(chat, question, 12)
        messages = [{"role": "user", "content": question}]
        ids += words.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt(form_of(tokenizer), tokenizer, chat.messages[:-1], ()) == ids
        assert answer.prompt_tokens == len(ids)
        made = theirs.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, temperature=None, top_p=None
        )[0].tolist()[len(ids) :]
        stop = {tokenizer.id_of("<eoa>"), tokenizer.eos}
        ended = [token for token in made if token not in stop]
        assert chat.messages[-1] == Message("assistant", text, (), tuple(ended))
        assert text == tokenizer.decode(ended)
        ids += [*ended, tokenizer.id_of("<eoa>"), *tokenizer.encode("\n")]


def internlm_chat(*arguments: object, typed: str = "") -> Result:
    return CliRunner().invoke(app, ["chat", *map(str, arguments), "--max-tokens", "8"], input=typed)


def test_the_command_answers_what_is_typed_and_remembers_it(folder: Path) -> None:
    source = folder / "checkpoints"
    typed = internlm_chat(source, "--temperature", 0, typed="Who?\n\nWhy?\n/reset\nWho?\n")
    assert typed.exit_code == 0, typed.output
    asked = internlm_chat(
        source, "--temperature", 0, "-q", "Who?", "-q", "Why?", "-q", "/reset", "-q", "Who?"
    )
    assert typed.output == asked.output
    first = internlm_chat(source, "--temperature", 0, "-q", "Who?").output
    assert typed.output.startswith(first)
    assert typed.output.endswith(first)
    alone = internlm_chat(source, "--temperature", 0, "-q", "Why?").output
    assert not typed.output.removeprefix(first).startswith(alone)  # the question was not the first


def test_plain_text_is_continued(folder: Path) -> None:
    shown = internlm_chat(folder / "checkpoints", "--complete", "--temperature", 0, "-q", "def f")
    tokenizer = Tokenizer((folder / "tokenizer.model").read_bytes())
    prompt = [tokenizer.bos, *tokenizer.encode("def f")]
    expected = complete(model_of(folder), prompt, stop=tokenizer.eos, max_tokens=8, sampling=GREEDY)
    assert shown.output == tokenizer.decode(expected) + "\n"


def test_a_question_that_does_not_fit_is_a_sentence_and_a_full_context_is_forgotten(folder: Path) -> None:
    long = internlm_chat(folder / "checkpoints", "-q", "why? " * 100)
    assert long.exit_code == 65
    assert "tokens, and the model reads 200" in long.output
    chat = chat_of(folder, 60)
    first, _ = ask(chat, "Who?", 30)
    # Had it been remembered, the answer would be another.
    assert ask(chat, "Who?", 30)[0] == first
    assert len(chat.messages) == 2


def test_load_model_rounds_as_asked(folder: Path) -> None:
    weights = open_weights(str(folder / "checkpoints"), "SOURCE")
    model = load_model(weights, torch.device("cpu"), torch.bfloat16)
    assert isinstance(weights.shape, ModelShape)
    for name, values in random_weights(weights.shape).items():
        assert torch.equal(model.state_dict()[name], values.bfloat16())
