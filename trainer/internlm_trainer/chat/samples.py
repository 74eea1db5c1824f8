"""Conversations as training samples, of which the answers are learned.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from internlm_trainer.chat.messages import Form, Message, prompt, said
from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.errors import UserError

_ROLES = ("system", "user", "assistant")


def messages_of(record: Mapping[str, Any], place: str) -> list[Message]:
    """The conversation of a record: `messages` as in OpenAI's interface, or `instruction`, `input` and `output` as in
    Stanford Alpaca.  Raises UserError with the record's place."""
    if "messages" in record:
        found = record["messages"]
        if isinstance(found, list) and found and all(map(_is_message, found)):
            messages = [Message(one["role"], one["content"]) for one in found]
            if messages[-1].role == "assistant" and messages[0].role != "assistant":
                return messages
        raise UserError(
            f"{place}: messages is no list of objects with role ({', '.join(_ROLES)}) and content, that ends with what "
            "the assistant says"
        )
    texts = [record.get(name) or "" for name in ("instruction", "input", "output")]
    if not all(isinstance(text, str) for text in texts) or not (texts[0] and texts[2]):
        has = ", ".join(map(str, record)) or "nothing"
        raise UserError(f"{place}: has neither messages nor instruction and output; it has {has}")
    asked = "\n".join(filter(None, texts[:2]))
    return [Message("user", asked), Message("assistant", texts[2])]


def _is_message(one: object) -> bool:
    known = isinstance(one, dict) and one.get("role") in _ROLES
    return known and isinstance(one, dict) and isinstance(one.get("content"), str)


def sample_of(messages: Sequence[Message], form: Form, tokenizer: Tokenizer) -> list[int]:
    """The ids of a conversation, negative where they are only read: as chats prompt the model, to the token."""
    (end,) = form.stop - {tokenizer.eos}
    ids: list[int] = []
    for place, one in enumerate(messages):
        if one.role == "assistant":
            asked = prompt(form, tokenizer, messages[:place], ())
            ids += [-token for token in asked[len(ids) :]]
            ids += [*said(one, tokenizer), end]
    return [tokenizer.bos, *ids[1:], *tokenizer.encode("\n"), tokenizer.eos]
