"""Conversations become samples that are prompted as chats are, and of which the answers are learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from internlm_trainer.chat.messages import InternLMForm, Message, form_of, prompt
from internlm_trainer.chat.samples import messages_of, sample_of
from internlm_trainer.cli import app
from internlm_trainer.data.bin_format import open_bins
from internlm_trainer.data.tokenizer import Tokenizer, train_tokenizer
from internlm_trainer.errors import UserError


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer(train_tokenizer([Path(json.__file__).read_text()], 512))


def test_one_turn_is_as_internlm_makes_it(words: Tokenizer) -> None:
    """Its description: bos, the user's text, eoh, newline and the bot's name read; the answer, eoa, newline learned."""
    form = form_of(words)
    assert isinstance(form, InternLMForm)
    found = sample_of(messages_of({"instruction": "Add.", "input": "1 2", "output": "3"}, ""), form, words)
    asked = [*words.encode("<|User|>:Add.\n1 2"), form.eoh, *words.encode("\n<|Bot|>:")]
    answer = [*words.encode("3"), form.eoa, *words.encode("\n"), words.eos]
    assert found == [words.bos, *(-token for token in asked), *answer]


def test_what_is_read_before_each_answer_is_the_prompt_of_a_chat(words: Tokenizer) -> None:
    form = form_of(words)
    talk = [
        ("system", "Be brief."),
        ("user", "Who?"),
        ("assistant", "I."),
        ("user", "Why?"),
        ("assistant", "So."),
    ]
    messages = [Message(role, text) for role, text in talk]  # type: ignore[arg-type]
    found = sample_of(messages, form, words)
    for place in (2, 4):
        before = prompt(form, words, messages[:place], ())
        answer = [*words.encode(messages[place].content), form.eoa]  # type: ignore[attr-defined]
        assert [abs(token) for token in found[: len(before)]] == before
        assert found[len(before) : len(before) + len(answer)] == answer
    learned = [token for token in found[1:] if token > 0]
    end = [form.eoa]  # type: ignore[attr-defined]
    expected = [*words.encode("I."), *end, *words.encode("So."), *end, *words.encode("\n"), words.eos]
    assert learned == expected


@pytest.mark.parametrize(
    "record",
    [
        {"text": "x"},
        {"instruction": "x"},
        {"messages": []},
        {"messages": [{"role": "user", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "bot", "content": "x"}]},
    ],
)
def test_other_records_are_refused_with_their_place(record: dict[str, object]) -> None:
    with pytest.raises(UserError, match="talk, record 3: "):
        messages_of(record, "talk, record 3")


def test_the_command_writes_what_training_reads(words: Tokenizer, tmp_path: Path) -> None:
    model, talk = tmp_path / "tokenizer.model", tmp_path / "talk.jsonl"
    model.write_bytes(words.model)
    talk.write_text(json.dumps({"instruction": "Add.", "output": "3"}) + "\n")
    out = tmp_path / "en" / "talk.bin"
    command = ["data", "chat", str(talk), "--tokenizer", str(model), "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    (file,) = open_bins(str(out), "data")
    expected = sample_of(messages_of({"instruction": "Add.", "output": "3"}, ""), form_of(words), words)
    assert json.loads(out.read_text())["tokens"] == expected
    assert file.tokens == len(expected)
