"""OpenAI's HTTP interface: what is asked, and in which form it is answered.  Pure: no I/O."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator

from internlm_trainer.chat.messages import Call, Message, Role, ToolSpec
from internlm_trainer.chat.talk import Answer, Asking
from internlm_trainer.generate import Sampling

Json = dict[str, Any]
_SMALLEST = Sampling()
_MOST_STOPS = 16

# What is accepted where it asks for nothing.
_NOT_SUPPORTED: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "functions": ([],),
}


class RequestError(ValueError):
    """A request that is not answered: what is wrong, and with which field."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> Json:
    """An error as OpenAI's clients read it."""
    kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}.get(
        status, "invalid_request_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _text(content: object) -> object:
    """A content that comes in parts, as one text."""
    if isinstance(content, list) and all(
        isinstance(one, dict) and one.get("type") == "text" for one in content
    ):
        return "".join(str(one.get("text", "")) for one in content)
    return "" if content is None else content


class _Function(BaseModel):
    name: str
    arguments: str


class _ToolCall(BaseModel):
    function: _Function


class _Said(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_text)] = ""
    tool_calls: list[_ToolCall] | None = None

    def message(self) -> Message:
        role: Role = "system" if self.role == "developer" else self.role
        calls = tuple(Call(one.function.name, one.function.arguments) for one in self.tool_calls or ())
        return Message(role, self.content, calls)


class _ToolFunction(BaseModel):
    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    description: str = ""
    parameters: Json = {"type": "object", "properties": {}}


class _Tool(BaseModel):
    type: Literal["function"] = "function"
    function: _ToolFunction


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Common(BaseModel):
    """What both kinds of request may have; top_k and repetition_penalty as LMDeploy has them."""

    model: str
    stream: bool = False
    stream_options: _StreamOptions | None = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: str | Annotated[list[str], Field(max_length=_MOST_STOPS)] | None = None

    def usage_asked(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _asking(self, max_tokens: int) -> Asking:
        given = {
            name: getattr(self, name)
            for name in ("temperature", "top_p", "top_k", "repetition_penalty")
            if getattr(self, name) is not None
        }
        seed = secrets.randbits(32) if self.seed is None else self.seed
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Asking(Sampling(**given, seed=seed), max_tokens, tuple(filter(None, stops)))


T = TypeVar("T", bound=_Common)


class ChatRequest(_Common):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[_Said], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    tools: list[_Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None

    def said(self) -> list[Message]:
        return [one.message() for one in self.messages]

    def offered(self) -> list[ToolSpec]:
        return [] if self.tool_choice == "none" else [one.function.model_dump() for one in self.tools or ()]

    def asking(self, context: int) -> Asking:
        return self._asking(self.max_completion_tokens or self.max_tokens or context)


class CompletionRequest(_Common):
    """Of `/v1/completions`: one prompt, as text or tokens."""

    prompt: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _only(cls, prompt: object) -> object:
        """A list of one prompt is that prompt."""
        return (
            prompt[0]
            if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int)
            else prompt
        )

    def asking(self) -> Asking:
        return self._asking(self.max_tokens or 16)


def parse(kind: type[T], body: bytes, model: str) -> T:
    """A request's content.  Raises RequestError."""
    try:
        content = json.loads(body)
    except ValueError as error:
        raise RequestError(f"the body is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise RequestError("the body is no JSON object")
    for name, allowed in _NOT_SUPPORTED.items():
        if content.get(name) is not None and content[name] not in allowed:
            raise RequestError(
                f"this server does not know {name} {json.dumps(content[name])}; leave it out", name
            )
    try:
        request = kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RequestError(f"{place}: {first['msg']}", place) from error
    if request.model != model:
        raise RequestError(
            f"there is no model {request.model!r}; this server has {model!r}", "model", 404, "model_not_found"
        )
    return request


def usage(answer: Answer) -> Json:
    """Tokens that were read and made."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": answer.prompt_tokens + answer.tokens,
    }


def tool_calls(calls: tuple[Call, ...]) -> list[Json]:
    """Calls, each with an identifier that the tool's message may refer to."""
    return [
        {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]


class ChatForm:
    """How answers of `/v1/chat/completions` look, whole or in chunks.  Thoughts are `reasoning_content`."""

    whole, part, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def first(self) -> Json | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, kind: str, text: str) -> Json:
        return {"delta": {"content" if kind == "text" else "reasoning_content": text}}

    def last(self, answer: Answer) -> Json:
        calls = [{"index": index, **call} for index, call in enumerate(tool_calls(answer.message.calls))]
        return {"delta": {"tool_calls": calls} if calls else {}}

    def all(self, answer: Answer, thought: str) -> Json:
        message: Json = {"role": "assistant", "content": answer.message.content}
        if thought:
            message["reasoning_content"] = thought
        if answer.message.calls:
            message["tool_calls"] = tool_calls(answer.message.calls)
            message["content"] = message["content"] or None
        return {"message": message}


class CompletionForm:
    """How answers of `/v1/completions` look."""

    whole, part, prefix = "text_completion", "text_completion", "cmpl-"

    def first(self) -> Json | None:
        return None

    def piece(self, _: str, text: str) -> Json:
        return {"text": text}

    def last(self, _: Answer) -> Json:
        return {"text": ""}

    def all(self, answer: Answer, _: str) -> Json:
        return {"text": answer.message.content}
