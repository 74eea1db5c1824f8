"""Talking to a model: InternLM's prompt, answers as they are made, and what was said before."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from internlm_trainer.checkpoint import Piece
from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.generate import Conversation, Sampling
from internlm_trainer.model.internlm import InternLM
from internlm_trainer.weights.source import MASTER, Weights, fill

_BROKEN = "\ufffd"  # what decodes from the first bytes of a character


def load_model(weights: Weights, device: torch.device, dtype: torch.dtype) -> InternLM:
    """The model with its weights, rounded to `dtype`, on `device`; reads a block of a tensor at a time."""
    with torch.device("meta"):
        model = InternLM(weights.shape).to(dtype)
    model.to_empty(device=device)
    fill(
        weights,
        (Piece(MASTER, name, 0, one.numel(), one.data.view(-1)) for name, one in model.named_parameters()),
    )
    return model.eval()


class Chat:
    """A conversation in turns `<s><|User|>:...<eoh>\\n<|Bot|>:...<eoa>\\n`.

    The markers of the speakers are ordinary text, those of the ends single words of the vocabulary.  Raises UserError
    for a vocabulary without them.
    """

    def __init__(self, model: InternLM, tokenizer: Tokenizer, context: int) -> None:
        eoh, eoa = tokenizer.id_of("<eoh>"), tokenizer.id_of("<eoa>")
        if eoh is None or eoa is None:
            raise UserError(
                f"{tokenizer.name} has no <eoh> and <eoa>: the model is not made for InternLM's chat; give --complete "
                "to continue plain text"
            )
        self.tokenizer, self.eoh, self.eoa = tokenizer, eoh, eoa
        self.conversation = Conversation(model, context)
        self.ended: list[int] = []  # what ends the turn before, unread yet

    def prompt(self, question: str) -> list[int]:
        """The ids of an open turn."""
        encode = self.tokenizer.encode
        return [self.tokenizer.bos, *encode(f"<|User|>:{question}"), self.eoh, *encode("\n<|Bot|>:")]

    def ask(self, question: str, max_tokens: int, sampling: Sampling) -> Iterator[str]:
        """The answer, piece by piece.  When the context is full, what was said before is forgotten."""
        conversation, prompt = self.conversation, [*self.ended, *self.prompt(question)]
        if len(conversation.read) + len(prompt) >= conversation.context:
            conversation.forget()
            prompt = self.prompt(question)
        if len(prompt) >= conversation.context:
            raise UserError(
                f"the question has {len(prompt)} tokens, and the model reads {conversation.context}"
            )
        stop = (self.eoa, self.tokenizer.eos)
        try:
            yield from _decoded(self.tokenizer, conversation.answer(prompt, stop, max_tokens, sampling))
        finally:
            self.ended = [self.eoa, *self.tokenizer.encode("\n")]


def continued(
    model: InternLM, tokenizer: Tokenizer, context: int, text: str, max_tokens: int, sampling: Sampling
) -> Iterator[str]:
    """What follows a plain text, piece by piece.  Raises UserError for one that the model cannot read whole."""
    prompt = [tokenizer.bos, *tokenizer.encode(text)]
    if len(prompt) >= context:
        raise UserError(f"the text has {len(prompt)} tokens, and the model reads {context}")
    return _decoded(
        tokenizer, Conversation(model, context).answer(prompt, (tokenizer.eos,), max_tokens, sampling)
    )


def _decoded(tokenizer: Tokenizer, words: Iterator[int]) -> Iterator[str]:
    """What each word adds to the text; a character of several words comes with the last of them."""
    found: list[int] = []
    shown = ""
    for word in words:
        found.append(word)
        text = tokenizer.decode(found)
        if not text.endswith(_BROKEN):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(found)[len(shown) :]
