"""A small tokenizer with the words of InternLM2's chat, under the names that its model file has for them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from internlm_trainer.data import tokenizer
from internlm_trainer.data.tokenizer import CHAT_PIECES, Tokenizer, train_tokenizer

WORDS = 512


@cache
def chatml_tokenizer() -> Tokenizer:
    """The words of InternLM's chat at its end become those of InternLM2's."""
    text = [
        Path(json.__file__).read_text(),
        "environment assistant system user name parameters expression " * 9,
    ]
    few = train_tokenizer(text, WORDS - len(CHAT_PIECES) + len(tokenizer.END_PIECES))
    ends = tokenizer.END_PIECES
    try:
        tokenizer.END_PIECES = tuple(reversed(CHAT_PIECES))
        plain = few[
            : few.rindex(tokenizer._field(1, tokenizer._field(1, ends[0].encode()) + b"\x15\0\0\0\0\x18\x04"))
        ]
        return Tokenizer(tokenizer._with_end_pieces(plain, WORDS))
    finally:
        tokenizer.END_PIECES = ends
