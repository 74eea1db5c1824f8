"""An export is prompted by LMDeploy as in training; what its 0.17.0 made of such exports is written down here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from internlm_trainer.chat.messages import Message, form_of, prompt
from internlm_trainer.data.tokenizer import Tokenizer, train_tokenizer
from internlm_trainer.weights.tokenizer_files import generation_config, tokenizer_files
from trainer.chat.chatml import chatml_tokenizer

CONVERSATION = [
    Message("system", "Be brief."),
    Message("user", "Who?"),
    Message("assistant", " Me.\n"),
    Message("user", " Why"),
]
INTERNLM = "<s><|System|>:Be brief.\n<|User|>:Who?<eoh>\n<|Bot|>: Me.\n<eoa>\n<s><|User|>: Why<eoh>\n<|Bot|>:"
CHATML = (
    "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
    "<|im_start|>assistant\n Me.\n<|im_end|>\n<|im_start|>user\n Why<|im_end|>\n<|im_start|>assistant\n"
)


def internlm_tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer([Path(json.__file__).read_text()], 512))


@pytest.mark.parametrize(("make", "expected"), [(internlm_tokenizer, INTERNLM), (chatml_tokenizer, CHATML)])
def test_lmdeploy_prompts_with_the_tokens_of_training_and_stops_where_the_chat_does(
    tmp_path: Path, make: Callable[[], Tokenizer], expected: str
) -> None:
    words = make()
    for name, data in tokenizer_files(words, 256):
        (tmp_path / name).write_bytes(data)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    messages = [{"role": one.role, "content": one.content} for one in CONVERSATION]
    # It renders the export's template to a text, encodes that with special tokens, and drops the second of two <s>.
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == expected
    first, *ids = theirs.encode(text, add_special_tokens=True)
    form = form_of(words)
    assert first == words.bos
    assert ids == prompt(form, words, CONVERSATION, ())
    # It stops at the tokenizer's end of text and at all of generation_config.json's.
    assert {theirs.eos_token_id, *generation_config(words, 256)["eos_token_id"]} == form.stop
