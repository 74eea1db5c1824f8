"""What is wrong with a model is said before `internlm demo` begins, without reading its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from internlm_trainer.commands.opened import check_chat
from internlm_trainer.errors import UserError
from trainer.chat.chatml import chatml_tokenizer
from trainer.chat.conftest import command


@pytest.fixture
def plain(tmp_path: Path) -> str:
    """A tokenizer without the words of a chat."""
    model = chatml_tokenizer().model.replace(b"[UNUSED_TOKEN_146]", b"[UNUSED_TOKEN_999]")
    (tmp_path / "plain.model").write_bytes(model)
    return str(tmp_path / "plain.model")


def test_a_wrong_source_and_a_model_that_is_made_for_no_chat_end_the_demo(trained: str, plain: str) -> None:
    for given, sentence in (
        (["nowhere"], "error: SOURCE: nowhere"),
        ([trained, "--tokenizer", plain], "error: .*plain.model has neither .* not made for a chat"),
        ([trained, "--tools", "nothing.py"], "error: --tools: nothing.py is not there"),
    ):
        with pytest.raises(pytest.fail.Exception, match=sentence), command("(URL: )", "demo", *given):
            pass


def test_no_weights_are_read_for_the_check(trained: str, tmp_path: Path) -> None:
    copy = shutil.copytree(Path(trained).parent, tmp_path / "small")
    check_chat(str(copy), None, None)
    shards = list(copy.glob("step-*/shard-*.bin"))
    assert shards
    for shard in shards:
        shard.write_bytes(b"")
    check_chat(str(copy), None, None)
    with pytest.raises(UserError, match="--tokenizer none"):
        check_chat(str(copy), "none", None)
