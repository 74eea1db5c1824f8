"""With InternLM's own tokenizer, `V7_sft.model`, which is not shipped: INTERNLM_V7_TOKENIZER names the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from internlm_trainer.chat.messages import Message, form_of, prompt
from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.weights.tokenizer_files import tokenizer_files

NEWLINE, EOH, EOA = 364, 103027, 103028
TEXTS = (
    "",
    " ",
    "\n\n\t x  y ",
    "def f(x):\n    return x ** 2  # 3.14159\n",
    "你好，世界，上海人工智能实验室",
    "caf\u00e9 \U0001f600 \u0627\u0644\u0639 日本語 Ω≈ç 12345",
    "<|User|>:Who?",
    Path(os.__file__).read_text(),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    file = os.environ.get("INTERNLM_V7_TOKENIZER")
    if not file:
        pytest.skip("INTERNLM_V7_TOKENIZER names no file: InternLM's own tokenizer is not there to be tested")
    return Tokenizer(Path(file).read_bytes())


def test_the_prompt_has_the_ids_that_internlm_was_trained_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos) == (103168, 1, 2)
    assert (tokenizer.id_of("<eoh>"), tokenizer.id_of("<eoa>")) == (EOH, EOA)
    assert tokenizer.id_of("<0x0A>") == 13
    assert tokenizer.encode("\n") == [NEWLINE]
    said = [Message("user", "Who?"), Message("assistant", "Me."), Message("user", "Why?")]
    text = tokenizer.encode
    expected = [1, *text("<|User|>:Who?"), EOH, *text("\n<|Bot|>:Me."), EOA, NEWLINE]
    expected += [1, *text("<|User|>:Why?"), EOH, *text("\n<|Bot|>:")]
    found = prompt(form_of(tokenizer), tokenizer, said, ())
    assert found == expected
    assert found[found.index(EOH) + 1] == NEWLINE
    for name, data in tokenizer_files(tokenizer, 2048):
        (tmp_path / name).write_bytes(data)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    messages = [{"role": one.role, "content": one.content} for one in said]
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == found
    for one in TEXTS:
        assert theirs(one).input_ids == [1, *text(one)]
