"""What commands share that take weights: the argument, and what is opened for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeVar

import typer

from internlm_trainer.errors import UserError

if TYPE_CHECKING:
    from internlm_trainer.data.tokenizer import Tokenizer
    from internlm_trainer.generate import Decoder
    from internlm_trainer.weights.source import Weights

NONE = "none"
T = TypeVar("T")
Source = Annotated[
    str,
    typer.Argument(
        help="A job's checkpoint.path or PATH/step-N in it, or a folder in Hugging Face's or InternLM's format.",
        show_default=False,
    ),
]


def tokenizer_of(weights: Weights, asked: str | None) -> Tokenizer | None:
    """The tokenizer asked for, or that of the weights.  Raises UserError unless it has the model's vocabulary."""
    from internlm_trainer.data.tokenizer import check_vocabulary, load_tokenizer

    if asked == NONE:
        return None
    url = asked or weights.tokenizer
    if url is None:
        raise UserError(
            f"{weights.url} does not tell its tokenizer; give --tokenizer a SentencePiece model, or none to go without"
        )
    field = "--tokenizer"
    tokenizer = load_tokenizer(url, field)
    check_vocabulary(tokenizer, weights.shape.vocab_size, url, field)
    return tokenizer


def context_of(weights: Weights, asked: int | None) -> int:
    """The longest sequence asked for, or that of the weights."""
    found = asked or weights.context
    if found is None:
        raise UserError(f"{weights.url} does not tell its longest sequence; give --context, such as 2048")
    return found


def of_newest(source: str, work: Callable[[Weights], T]) -> tuple[Weights, T]:
    """`work` on the weights asked for; where a running job removes its newest checkpoint meanwhile, on the next."""
    from internlm_trainer.checkpoint import BadCheckpoint
    from internlm_trainer.weights.recognise import open_weights

    tried: BadCheckpoint | None = None
    while True:
        try:
            weights = open_weights(source, "SOURCE")
            return weights, work(weights)
        except BadCheckpoint as error:
            if tried and tried.name == error.name:
                raise
            tried = error


class Opened(NamedTuple):
    """A model that can be asked.

    name: the last part of its URL that is no step's, by which it is called over HTTP.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    name: str


def open_model(
    source: str, tokenizer: str | None, context: int | None, rows: int = 1, compiled: bool = False
) -> Opened:
    """The model asked for, with room for `rows` conversations."""
    from internlm_trainer.checkpoint.format import parse_step
    from internlm_trainer.generate import Decoder
    from internlm_trainer.weights.load import load_model

    def work(weights: Weights) -> Opened:
        words, tokens = _asked_of(weights, tokenizer, context)
        decoder = Decoder(load_model(weights), tokens, rows, compiled)
        parts = [part for part in source.split("/") if part and parse_step(part) is None]
        return Opened(decoder, words, parts[-1] if parts else "model")

    return of_newest(source, work)[1]


def check_chat(source: str, tokenizer: str | None, context: int | None) -> None:
    """Raises what `open_model` would, and UserError for a model that is not made for a chat; reads no weights."""
    from internlm_trainer.chat.messages import form_of

    _, (words, _) = of_newest(source, lambda weights: _asked_of(weights, tokenizer, context))
    form_of(words)


def _asked_of(weights: Weights, tokenizer: str | None, context: int | None) -> tuple[Tokenizer, int]:
    words = tokenizer_of(weights, tokenizer)
    if words is None:
        raise UserError("--tokenizer none: a model that is asked needs one")
    return words, context_of(weights, context)
