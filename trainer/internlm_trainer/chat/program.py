"""A chat from a program, by the calls that InternLM's models have: `chat` and `stream_chat`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence

from internlm_trainer.chat.messages import Message, form_of
from internlm_trainer.chat.reading import Piece
from internlm_trainer.chat.talk import Asking, Chat, Speaker
from internlm_trainer.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.generate import Decoder, Sampling
from internlm_trainer.weights.load import load_model
from internlm_trainer.weights.recognise import open_weights

History = list[tuple[str, str]]
"""Questions, each with its answer."""


def load(url: str, tokenizer: str | None = None, context: int | None = None) -> tuple[Decoder, Tokenizer]:
    """The model and the tokenizer of a checkpoint, or of a folder in Hugging Face's or InternLM's format.

    tokenizer, context: for weights that do not tell them.  On a GPU in bf16 if there is one, else on the CPU in fp32.
    Raises UserError, and BadCheckpoint and StorageUnavailable of `internlm_trainer.checkpoint`.
    """
    weights = open_weights(url, "url")
    words, tokens = tokenizer or weights.tokenizer, context or weights.context
    if words is None or tokens is None:
        raise UserError(f"{url} does not tell its {'context' if words else 'tokenizer'}; give it to load")
    found = load_tokenizer(words, "tokenizer")
    check_vocabulary(found, weights.shape.vocab_size, words, "tokenizer")
    return Decoder(load_model(weights), tokens), found


def chat(
    model: Decoder,
    tokenizer: Tokenizer,
    query: str,
    history: Sequence[tuple[str, str]] = (),
    *,
    meta_instruction: str = "",
    max_new_tokens: int = 1024,
    do_sample: bool = True,
    temperature: float = 0.8,
    top_p: float = 0.8,
    seed: int | None = None,
) -> tuple[str, History]:
    """The answer to `query`, and the history with both.

    meta_instruction: what the model is told before all.  do_sample: False takes the likeliest word each time.  seed:
    of the draws; default: another each time.  Raises UserError for a vocabulary without a chat's words, and for a
    question that does not fit; of a history that does not, the oldest is left out of what the model reads.
    """
    *_, last = stream_chat(
        model,
        tokenizer,
        query,
        history,
        meta_instruction=meta_instruction,
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    return last


def stream_chat(
    model: Decoder,
    tokenizer: Tokenizer,
    query: str,
    history: Sequence[tuple[str, str]] = (),
    *,
    meta_instruction: str = "",
    max_new_tokens: int = 1024,
    do_sample: bool = True,
    temperature: float = 0.8,
    top_p: float = 0.8,
    seed: int | None = None,
) -> Iterator[tuple[str, History]]:
    """As `chat`, each time that the answer has grown: as far as it has come, and the history with it; then the whole.

    The model answers one at a time: take all, or close the iterator, before the next question.
    """
    talk = Chat(Speaker(model.answer, tokenizer, model.context, form_of(tokenizer)), system=meta_instruction)
    for asked, answered in history:
        talk.messages += [Message("user", asked), Message("assistant", answered)]
    draws = secrets.randbits(32) if seed is None else seed
    sampling = Sampling(temperature if do_sample else 0.0, top_p, seed=draws)
    response = ""
    for event in talk.ask(query, Asking(sampling, max_new_tokens)):
        response += event.text if isinstance(event, Piece) else ""
        yield response, [*history, (query, response)]
