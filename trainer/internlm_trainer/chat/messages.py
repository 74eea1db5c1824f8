"""What is said in a chat, and as which tokens a model reads it.

There are two forms of prompt: InternLM's turns `<s><|User|>:...<eoh>\\n<|Bot|>:...<eoa>\\n`, and ChatML's
`<|im_start|>user\\n...<|im_end|>\\n` of InternLM2 and later.  Tools are given as InternLM2 reads them, in a message of
`<|plugin|>`; to models without such a word in ReAct's form (Yao et al., arXiv:2210.03629), in plain text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.errors import UserError

Role = Literal["system", "user", "assistant", "tool"]
ToolSpec = dict[str, Any]
"""`name`, `description` and `parameters` (JSON schema) of a function, as in OpenAI's interface."""

INTERPRETER = "python_interpreter"
"""The tool that runs code, which InternLM2 has a form of its own for."""
_INTERPRETER_PROMPT = (
    "You can run Python: send a code block. It runs in a new process, and what it prints is the result."
)


class Call(NamedTuple):
    """Of a tool by the model; arguments: a JSON text as the model wrote it."""

    name: str
    arguments: str


class Message(NamedTuple):
    """One turn.

    calls: of an assistant.  ids: its tokens as they were made, which no text tells exactly.
    """

    role: Role
    content: str
    calls: tuple[Call, ...] = ()
    ids: tuple[int, ...] | None = None


class Plugin(NamedTuple):
    """InternLM2's words around calls of tools."""

    start: int
    end: int
    plugin: int
    interpreter: int


class Form(Protocol):
    """How a model is prompted.

    stop: what ends its turn.  plugin: its words for tools, or None where they are asked for in text.
    """

    stop: frozenset[int]
    plugin: Plugin | None

    def turns(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> Iterator[str | int | list[int]]:
        """Text, single words and tokens, up to where the assistant's next turn begins."""
        ...


class InternLMForm:
    """InternLM's; the markers of the speakers are ordinary text, those of the ends single words."""

    plugin: Plugin | None = None

    def __init__(self, tokenizer: Tokenizer, eoh: int, eoa: int) -> None:
        self.tokenizer, self.eoh, self.eoa = tokenizer, eoh, eoa
        self.stop = frozenset({eoa, tokenizer.eos})

    def turns(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> Iterator[str | int | list[int]]:
        before: Role | None = None
        for one in with_react(messages, tools):
            if before is None or (one.role == "user" and before != "system"):
                yield self.tokenizer.bos
            if one.role == "user":
                yield from (f"<|User|>:{one.content}", self.eoh, "\n")
            elif one.role == "assistant":
                yield from ("<|Bot|>:", said(one, self.tokenizer), self.eoa, "\n")
            else:
                yield f"<|System|>:{one.content}\n"
            before = one.role
        yield "<|Bot|>:"


class ChatMLForm:
    """InternLM2's and later ones'."""

    def __init__(self, tokenizer: Tokenizer, start: int, end: int) -> None:
        self.tokenizer, self.start, self.end = tokenizer, start, end
        self.stop = frozenset({end, tokenizer.eos})
        words = [
            tokenizer.id_of(f"<|{name}|>") for name in ("action_start", "action_end", "plugin", "interpreter")
        ]
        known = [word for word in words if word is not None]
        self.plugin = Plugin(*known) if len(known) == len(words) else None

    def turns(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> Iterator[str | int | list[int]]:
        yield self.tokenizer.bos
        if not self.plugin:
            messages, tools = with_react(messages, tools), ()
        system = 1 if messages[0].role == "system" else 0
        for one in messages[:system]:
            yield from self._turn("system", one.content)
        functions = [one for one in tools if one["name"] != INTERPRETER]
        if self.plugin and len(functions) < len(tools):
            yield from self._turn("system", _INTERPRETER_PROMPT, self.plugin.interpreter)
        if self.plugin and functions:
            yield from self._turn("system", _json(functions), self.plugin.plugin)
        name: int | None = None
        for one in messages[system:]:
            if one.role == "tool":
                yield from self._turn("environment", one.content, name)
            elif one.role == "assistant":
                yield from (self.start, "assistant\n", self._said(one), self.end, "\n")
            else:
                yield from self._turn(one.role, one.content)
            if one.calls and self.plugin:
                coded = one.calls[-1].name == INTERPRETER
                name = self.plugin.interpreter if coded else self.plugin.plugin
        yield from (self.start, "assistant\n")

    def _turn(self, role: str, content: str, name: int | None = None) -> Iterator[str | int]:
        yield from (self.start, role)
        if name is not None:
            yield from (" name=", name)
        yield from (f"\n{content}", self.end, "\n")

    def _said(self, message: Message) -> list[int]:
        ids, encode = said(message, self.tokenizer), self.tokenizer.encode
        if message.ids is None and self.plugin:
            for call in message.calls:
                if call.name == INTERPRETER:
                    word, text = self.plugin.interpreter, f"\n```python\n{_loaded(call).get('code', '')}\n```"
                else:
                    asked = _json({"name": call.name, "parameters": _loaded(call)})
                    word, text = self.plugin.plugin, f"\n{asked}"
                ids += [self.plugin.start, word, *encode(text), self.plugin.end]
        return ids


def form_of(tokenizer: Tokenizer) -> Form:
    """The form that a vocabulary is made for.  Raises UserError for one without the words for it."""
    eoh, eoa = tokenizer.id_of("<eoh>"), tokenizer.id_of("<eoa>")
    if eoh is not None and eoa is not None:
        return InternLMForm(tokenizer, eoh, eoa)
    start, end = tokenizer.id_of("<|im_start|>"), tokenizer.id_of("<|im_end|>")
    if start is not None and end is not None:
        return ChatMLForm(tokenizer, start, end)
    raise UserError(
        f"{tokenizer.name} has neither <eoh> and <eoa> nor <|im_start|> and <|im_end|>: the model is not made for a "
        "chat, only to continue plain text"
    )


def prompt(
    form: Form, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[ToolSpec]
) -> list[int]:
    """The tokens of a conversation up to where the assistant's next turn begins.

    Text is encoded from one single word to the next, as a tokenizer does that knows them.
    """
    ids: list[int] = []
    text = ""
    for part in (*form.turns(messages, tools), []):
        if isinstance(part, str):
            text += part
            continue
        ids += tokenizer.encode(text) if text else []
        ids += [part] if isinstance(part, int) else part
        text = ""
    return ids


def said(message: Message, tokenizer: Tokenizer) -> list[int]:
    """The tokens of an assistant's text."""
    return tokenizer.encode(message.content) if message.ids is None else list(message.ids)


def with_react(messages: Sequence[Message], tools: Iterable[ToolSpec]) -> Sequence[Message]:
    """The same conversation for a model that knows of no tools: how to call them is said in the first message."""
    tools = list(tools)
    if not tools and not any(one.calls or one.role == "tool" for one in messages):
        return messages
    plain = []
    for one in messages:
        if one.role == "tool":
            plain.append(Message("system", f"Response: {one.content}"))
        elif one.calls and one.ids is None:
            asked = "\n".join(f"Action: {call.name}\nAction Input: {call.arguments}" for call in one.calls)
            plain.append(Message("assistant", f"{one.content}\n{asked}".lstrip()))
        else:
            plain.append(one)
    if not tools:
        return plain
    told = "\n".join(_json(one) for one in tools)
    names = ", ".join(one["name"] for one in tools)
    rules = (
        f"You can call these tools, each described by a JSON schema of its parameters:\n{told}\n"
        "To call one, write\n"
        "Thought: what to find out, and whether a tool is needed\n"
        f"Action: the tool's name, one of {names}\n"
        "Action Input: its parameters as one JSON object\n"
        "and end there. The tool's result then follows as\n"
        "Response: the result\n"
        "When you know the answer, or need no tool, write\n"
        "Thought: why this is the answer\n"
        "Final Answer: the answer"
    )
    if plain and plain[0].role == "system":
        rules = f"{plain.pop(0).content}\n{rules}"
    return [Message("system", rules), *plain]


def _loaded(call: Call) -> dict[str, Any]:
    """Arguments as an object, whatever a model made of them."""
    try:
        found = json.loads(call.arguments)
    except ValueError:
        return {"text": call.arguments}
    return found if isinstance(found, dict) else {"value": found}


def _json(content: object) -> str:
    return json.dumps(content, ensure_ascii=False)
