"""A model is talked to with a cache, and says what it says without one; and what Transformers says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from internlm_trainer.chat import chat, load, stream_chat
from internlm_trainer.chat.messages import Message, form_of, prompt
from internlm_trainer.chat.reading import Piece
from internlm_trainer.chat.talk import Answer, Asking, Chat, Speaker
from internlm_trainer.cli import app
from internlm_trainer.commands.opened import open_model
from internlm_trainer.config import ModelShape
from internlm_trainer.data.tokenizer import Tokenizer, train_tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.generate import Sampling, complete
from internlm_trainer.model.internlm import InternLM
from internlm_trainer.weights.export import export_llama
from internlm_trainer.weights.load import load_model
from internlm_trainer.weights.recognise import open_weights
from trainer.chat.trained import I_AM, WHO
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


def test_an_answer_always_has_room_and_the_oldest_is_forgotten_first(folder: Path) -> None:
    chat = chat_of(folder, CONTEXT)
    system = Message("system", "Be brief.")
    chat.messages.append(system)
    questions = [f"Who is {number}?" for number in range(6)]
    for question in questions:
        _, answer = ask(chat, question, 30)
        assert answer.finish == "stop" or answer.tokens == 30
    assert chat.messages[0] == system
    kept = [one.content for one in chat.messages if one.role == "user"]
    assert 1 < len(kept) < len(questions)
    assert kept == questions[-len(kept) :]
    before = list(chat.messages)
    with pytest.raises(UserError, match="the model reads 200"):
        ask(chat, "why? " * 100, 30)
    assert chat.messages == before


@torch.no_grad()
def test_the_calls_for_programs_answer_as_transformers_over_several_turns(
    folder: Path, tmp_path: Path
) -> None:
    weights = open_weights(str(folder / "checkpoints"), "SOURCE")
    export_llama(
        weights, str(tmp_path), "fp32", Tokenizer((folder / "tokenizer.model").read_bytes()), CONTEXT
    )
    theirs, words = (kind.from_pretrained(str(tmp_path)) for kind in (AutoModelForCausalLM, AutoTokenizer))
    model, tokenizer = load(str(tmp_path))
    eoa = tokenizer.id_of("<eoa>")
    history: list[tuple[str, str]] = []
    for query in ("Who?", "Why is it so?"):
        said = [
            {"role": role, "content": text}
            for pair in (*history, (query, ""))
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        ids = words.apply_chat_template(said[:-1], add_generation_prompt=True, return_dict=False)
        made = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=eoa)
        expected = tokenizer.decode([token for token in made[0].tolist()[len(ids) :] if token != eoa])
        parts = list(stream_chat(model, tokenizer, query, history, max_new_tokens=12, do_sample=False))
        assert len(parts) > 2
        assert all(after.startswith(before) for (before, _), (after, _) in pairwise(parts))
        assert all(one == [*history, (query, response)] for response, one in parts)
        answered = chat(model, tokenizer, query, history, max_new_tokens=12, do_sample=False)
        assert answered == parts[-1] == (expected, [*history, (query, expected)])
        history = answered[1]


def test_the_calls_for_programs_draw_by_their_seed_and_name_what_is_missing(
    folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = load(str(folder / "checkpoints"))

    def answer(**more: Any) -> str:
        return chat(model, tokenizer, "Who?", temperature=2, top_p=1, max_new_tokens=12, **more)[0]

    assert answer(seed=3) == answer(seed=3)
    assert answer(seed=3, meta_instruction="Be brief.") != answer(seed=3)
    assert len({answer() for _ in range(4)}) > 1
    export_llama(open_weights(str(folder / "checkpoints"), "SOURCE"), str(tmp_path), "fp32", None, CONTEXT)
    with pytest.raises(UserError, match="does not tell its tokenizer; give it to load"):
        load(str(tmp_path))
    model, _ = load(str(tmp_path), str(folder / "tokenizer.model"), 64)
    assert model.context == 64


def test_the_program_of_the_documentation_is_answered(trained: str) -> None:
    page = (Path(__file__).parents[3] / "docs" / "chat.md").read_text()
    (example,) = (one for one in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "stream_chat" in one)
    program = example.replace("s3://checkpoints/internlm-7b", trained)
    assert program != example
    model, tokenizer = load(trained)
    first, history = chat(model, tokenizer, WHO, do_sample=False)
    assert first == I_AM
    second, _ = chat(model, tokenizer, "And what can you do?", history, do_sample=False)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == f"{first}\n{second}\n", done.stderr


def test_what_reads_prompts_needs_no_pytorch() -> None:
    program = (
        "import sys, internlm_trainer.chat.messages, internlm_trainer.cli; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_load_model_rounds_as_asked(folder: Path) -> None:
    weights = open_weights(str(folder / "checkpoints"), "SOURCE")
    model = load_model(weights, torch.device("cpu"), torch.bfloat16)
    assert isinstance(weights.shape, ModelShape)
    for name, values in random_weights(weights.shape).items():
        assert torch.equal(model.state_dict()[name], values.bfloat16())
