"""Making sense of an answer while it is made: text, thoughts and calls of tools out of tokens.  Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

from internlm_trainer.chat.messages import INTERPRETER, Call, Plugin
from internlm_trainer.data.tokenizer import Tokenizer

_BROKEN = "\ufffd"  # what decodes from the first bytes of a character
_THOUGHT, _ACTION, _ANSWER, _RESPONSE = "Thought:", "Action:", "Final Answer:", "Response:"
_ACTION_INPUT = re.compile(r"\s*([\w.-]+)\s*Action Input:\s*(.*)", re.DOTALL)
_CODE = re.compile(r"```(?:python|py)?\n?(.*?)(?:```|$)", re.DOTALL)


class Piece(NamedTuple):
    """Of an answer as it is made; thoughts are what a ReAct model writes before it acts or answers."""

    kind: Literal["text", "thought"]
    text: str


class Text:
    """What each token adds to the text; a character of several tokens comes with the last of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode, self._ids = tokenizer.decode, list[int]()
        self._begin = self._shown = 0  # the tokens between are shown; they tell what new ones add

    def add(self, token: int) -> str:
        self._ids.append(token)
        return self._new() if not self._decode(self._ids[self._begin :]).endswith(_BROKEN) else ""

    def end(self) -> str:
        """What is left of characters that were not completed."""
        return self._new()

    def _new(self) -> str:
        before = self._decode(self._ids[self._begin : self._shown])
        now = self._decode(self._ids[self._begin :])
        self._begin, self._shown = self._shown, len(self._ids)
        return now[len(before) :]


class Scanner:
    """Finds the first of some markers in a text that comes in pieces; holds back what may be the start of one."""

    def __init__(self, markers: Sequence[str]) -> None:
        self.markers, self.held = markers, ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """What is before any marker, and the marker where one is found; what comes after it is in `held`."""
        self.held += text
        found = min(((self.held.find(one), one) for one in self.markers if one in self.held), default=None)
        if found:
            place, marker = found
            before, self.held = self.held[:place], self.held[place + len(marker) :]
            return before, marker
        kept = max(
            (
                size
                for one in self.markers
                for size in range(1, min(len(one), len(self.held) + 1))
                if self.held.endswith(one[:size])
            ),
            default=0,
        )
        cut = len(self.held) - kept
        before, self.held = self.held[:cut], self.held[cut:]
        return before, None


class Reader:
    """Reads an answer token by token, with stop words (`stops`) and, if there are tools, calls of them.

    plugin: InternLM2's words for calls; without, they are found as ReAct writes them.
    After the end, `calls` are the tools that were called, `content` what was said besides.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        tools: bool = False,
        plugin: Plugin | None = None,
    ) -> None:
        react = tools and not plugin
        self.tokenizer, self.plugin = tokenizer, plugin if tools else None
        self.ids, self.content, self.calls = list[int](), "", list[Call]()
        self.stopped = False
        """Whether a stop word was found."""
        self._text = Text(tokenizer)
        self._stop = Scanner([*stops, _RESPONSE] if react else list(stops))
        self._react = Scanner([_THOUGHT, _ACTION, _ANSWER] if react else [])
        self._kind: Literal["text", "thought"] = "text"
        self._action: str | list[int] | None = None  # a call under way: ReAct's text, or tokens
        self._begun = False

    def feed(self, token: int) -> Iterator[Piece]:
        """What a token adds."""
        self.ids.append(token)
        if self.plugin and token == self.plugin.start:
            yield from self._spoken(self._text.end())
            self._action = []
        elif self.plugin and token == self.plugin.end and isinstance(self._action, list):
            self._called()
        elif isinstance(self._action, list):
            self._action.append(token)
        else:
            yield from self._spoken(self._text.add(token))

    def end(self) -> Iterator[Piece]:
        """What was held back; ends calls that are under way."""
        if not self.stopped and not isinstance(self._action, list):
            yield from self._spoken(self._text.end())
            held, self._stop.held = self._stop.held, ""
            yield from self._said(held)
        held, self._react.held = self._react.held, ""
        yield from self._shown(held)
        self._called()

    def _spoken(self, text: str) -> Iterator[Piece]:
        if self.stopped or not text:
            return
        before, marker = self._stop.feed(text)
        self.stopped = marker is not None
        yield from self._said(before)

    def _said(self, text: str) -> Iterator[Piece]:
        marker: str | None = ""
        while marker is not None:
            if isinstance(self._action, str):
                self._action += text
                return
            before, marker = self._react.feed(text)
            yield from self._shown(before)
            text = ""
            if marker == _ACTION:
                self._action, self._react.held, text = "", "", self._react.held
            elif marker:
                self._kind, self._begun = "thought" if marker == _THOUGHT else "text", False

    def _shown(self, text: str) -> Iterator[Piece]:
        if isinstance(self._action, str):
            self._action += text
            return
        if not self._begun and self._react.markers:
            text = text.lstrip()  # what stands between a marker and its text
        if text:
            self._begun = True
            if self._kind == "text":
                self.content += text
            yield Piece(self._kind, text)

    def _called(self) -> None:
        action, self._action = self._action, None
        if isinstance(action, list):
            assert self.plugin
            text = self.tokenizer.decode(
                [token for token in action if token not in (self.plugin.plugin, self.plugin.interpreter)]
            )
            self.calls.append(_code(text) if self.plugin.interpreter in action[:1] else _plugin(text))
        elif action is not None:
            found = _ACTION_INPUT.fullmatch(action)
            name, arguments = (found[1], found[2]) if found else (action.strip(), "{}")
            self.calls.append(Call(name, _first_object(arguments)))


def _plugin(text: str) -> Call:
    """A call as InternLM2 writes it: a JSON object of `name` and `parameters`."""
    try:
        asked = json.loads(text)
        return Call(str(asked["name"]), json.dumps(asked.get("parameters", {}), ensure_ascii=False))
    except (ValueError, KeyError, TypeError, AttributeError):
        return Call("", text.strip())


def _code(text: str) -> Call:
    found = _CODE.search(text)
    return Call(INTERPRETER, json.dumps({"code": found[1] if found else text.strip()}, ensure_ascii=False))


def _first_object(text: str) -> str:
    """The JSON object that a text begins with, without what was said after it; else the text as it is."""
    begin = text.find("{")
    if begin >= 0:
        with suppress(ValueError):
            return text[begin : begin + json.JSONDecoder().raw_decode(text[begin:])[1]]
    return text.strip()
