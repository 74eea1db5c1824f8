"""Talking to a model: in the terminal, in a browser, over HTTP, with tools, and from a program.

For programs: `model, tokenizer = load(url)`, then `chat(model, tokenizer, query, history)` or `stream_chat`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internlm_trainer.chat.program import chat, load, stream_chat

__all__ = ["chat", "load", "stream_chat"]


def __getattr__(name: str) -> Any:
    """The calls for programs, once they are asked for: what else is in here needs no PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from internlm_trainer.chat import program

    return getattr(program, name)
