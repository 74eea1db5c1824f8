"""A conversation: questions, answers as they are made, and the tools that are called on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Literal, NamedTuple, Protocol

from internlm_trainer.chat.messages import Call, Form, Message, ToolSpec, prompt
from internlm_trainer.chat.reading import Piece, Reader
from internlm_trainer.chat.tools import Tool, run
from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.generate import Made, Request, Sampling

MOST_ROUNDS = 8
"""How often a model may call tools for one question."""
Finish = Literal["stop", "length", "tool_calls"]


class Asking(NamedTuple):
    """How answers are made."""

    sampling: Sampling = Sampling()
    max_tokens: int = 1024
    stops: tuple[str, ...] = ()
    """Texts that end an answer."""


class Answer(NamedTuple):
    """A whole answer, and what it took."""

    message: Message
    finish: Finish
    prompt_tokens: int
    tokens: int


class Result(NamedTuple):
    """Of a tool that was called."""

    call: Call
    text: str


class Tokens(Protocol):
    """A request's tokens as they are made; closed, nobody waits for more."""

    def __iter__(self) -> Iterator[Made]: ...
    def close(self) -> None: ...


class Speaker(NamedTuple):
    """What answers: tokens for a request, and how they are made of text.

    form: of its prompts; None for a model that only continues plain text.
    """

    source: Callable[[Request], Tokens]
    tokenizer: Tokenizer
    context: int
    form: Form | None


def reply(
    speaker: Speaker, messages: Sequence[Message], tools: Sequence[ToolSpec], asking: Asking
) -> Iterator[Piece | Answer]:
    """The assistant's next message, piece by piece, then the whole.

    Raises UserError for a prompt that leaves no room for an answer in the context.
    """
    form = speaker.form
    assert form
    reader = Reader(speaker.tokenizer, asking.stops, bool(tools), form.plugin)
    return _answered(speaker, prompt(form, speaker.tokenizer, messages, tools), form.stop, asking, reader)


def continued(speaker: Speaker, text: str | list[int], asking: Asking) -> Iterator[Piece | Answer]:
    """What follows a plain text or tokens, piece by piece, then the whole.  Raises as `reply`."""
    words = speaker.tokenizer
    ids = [words.bos, *words.encode(text)] if isinstance(text, str) else text
    return _answered(speaker, ids, frozenset({words.eos}), asking, Reader(words, asking.stops))


def _answered(
    speaker: Speaker, ids: list[int], stop: frozenset[int], asking: Asking, reader: Reader
) -> Iterator[Piece | Answer]:
    if len(ids) >= speaker.context:
        raise UserError(
            f"the text has {len(ids)} tokens, and the model reads {speaker.context}; give a shorter one"
        )
    return _read(speaker.source(Request(ids, stop, asking.max_tokens, asking.sampling)), len(ids), reader)


def _read(made: Tokens, prompt_tokens: int, reader: Reader) -> Iterator[Piece | Answer]:
    finish: Finish = "stop"
    with closing(made):
        for one in made:
            if one.token is not None:
                yield from reader.feed(one.token)
            finish = one.finish or finish
            if reader.stopped:
                finish = "stop"
                break
    yield from reader.end()
    kept = None if reader.stopped else tuple(reader.ids)  # a stop word's tokens are no part of the answer
    message = Message("assistant", reader.content, tuple(reader.calls), kept)
    yield Answer(message, "tool_calls" if reader.calls else finish, prompt_tokens, len(reader.ids))


class Chat:
    """A conversation that remembers what was said, and runs the tools that the model calls."""

    def __init__(self, speaker: Speaker, tools: Sequence[Tool] = (), system: str = "") -> None:
        self.speaker = speaker
        self.tools: Mapping[str, Tool] = {one.name: one for one in tools}
        self.messages = [Message("system", system)] if system else []

    def ask(self, question: str, asking: Asking) -> Iterator[Piece | Call | Result | Answer]:
        """What the model says and does, as it happens; ends with an answer without calls, or after `MOST_ROUNDS`.

        Where the context has no room for an answer, the oldest questions are forgotten with what followed them.  A
        question is remembered with its answer, however much of that was made when the iterator was closed.
        """
        before = list(self.messages)
        self.messages.append(Message("user", question))
        said: list[str] = []
        try:
            for rounds in range(MOST_ROUNDS + 1):
                said.clear()
                # Without tools at last, so that the model has to answer.
                specs = [one.spec for one in self.tools.values()] if rounds < MOST_ROUNDS else []
                self._forget(specs, asking.max_tokens)
                answer: Answer | None = None
                for one in reply(self.speaker, self.messages, specs, asking):
                    if isinstance(one, Answer):
                        answer = one
                        continue
                    said += [one.text] if one.kind == "text" else []
                    yield one
                assert answer
                self.messages.append(answer.message)
                if not answer.message.calls:
                    yield answer
                    return
                for call in answer.message.calls:
                    yield call
                    result = Result(call, run(self.tools, call))
                    self.messages.append(Message("tool", result.text))
                    yield result
        except (GeneratorExit, KeyboardInterrupt):
            self.messages.append(Message("assistant", "".join(said)))
            raise
        except UserError:
            self.messages = before
            raise

    def _forget(self, specs: Sequence[ToolSpec], max_tokens: int) -> None:
        """Make room for an answer, of half the context at most; keeps the system's message and the newest question."""
        speaker = self.speaker
        assert speaker.form
        most = speaker.context - min(max_tokens, speaker.context // 2)
        while len(prompt(speaker.form, speaker.tokenizer, self.messages, specs)) > most:
            asked = [place for place, one in enumerate(self.messages) if one.role == "user"]
            if len(asked) == 1:
                break
            del self.messages[asked[0] : asked[1]]
