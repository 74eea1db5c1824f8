"""OpenAI's own client, and what else may come over the line, against `internlm serve` in a process of its own."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer
from openai import OpenAI

from internlm_trainer.chat.engine import Busy, Engine
from internlm_trainer.chat.messages import Call, Message, form_of, prompt
from internlm_trainer.chat.server import Server
from internlm_trainer.chat.talk import Speaker
from internlm_trainer.chat.tools import CALCULATOR, run
from internlm_trainer.commands.opened import open_model
from internlm_trainer.generate import Request, Sampling
from trainer.chat.chatml import chatml_tokenizer
from trainer.chat.conftest import command
from trainer.chat.trained import CONTEXT, COUNT, I_AM, NUMBERS, RESULT, SUM, WHO

GREEDY: dict[str, Any] = {"model": "small", "temperature": 0}
TOOLS: Any = [{"type": "function", "function": CALCULATOR.spec}]


@pytest.fixture(scope="module")
def client(endpoint: str) -> OpenAI:
    return OpenAI(base_url=endpoint, api_key="none", max_retries=0)


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_the_model_is_listed(client: OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["small"]
    assert client.models.retrieve("small").object == "model"


def test_a_chat_is_answered_whole_and_streamed(client: OpenAI, trained: str) -> None:
    whole = client.chat.completions.create(messages=user(WHO), **GREEDY)
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", I_AM, "stop")
    words = open_model(trained, None, None).tokenizer
    read = len(prompt(form_of(words), words, [Message("user", WHO)], ()))
    assert whole.usage
    made = len(words.encode(I_AM))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (read, made)
    assert whole.usage.total_tokens == read + made
    chunks = list(
        client.chat.completions.create(
            messages=user(WHO), stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    *parts, last = chunks
    assert "".join(one.choices[0].delta.content or "" for one in parts) == I_AM
    assert len([one for one in parts if one.choices[0].delta.content]) > 5
    assert [one.choices[0].finish_reason for one in parts if one.choices[0].finish_reason] == ["stop"]
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len({one.id for one in chunks}) == 1


def test_what_was_said_and_the_forms_of_it_are_read(client: OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "Who are "}, {"type": "text", "text": "you?"}]
    found = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **GREEDY)
    assert found.choices[0].message.content == I_AM
    said: Any = [*user(WHO), {"role": "assistant", "content": I_AM}, *user("What is more?")]
    longer = client.chat.completions.create(messages=said, max_tokens=3, **GREEDY)
    assert longer.usage
    assert found.usage
    assert longer.usage.prompt_tokens > found.usage.prompt_tokens + found.usage.completion_tokens


def test_length_and_stop_words_end_an_answer(client: OpenAI) -> None:
    cut = client.chat.completions.create(messages=user(COUNT), max_tokens=9, **GREEDY)
    assert cut.choices[0].finish_reason == "length"
    assert NUMBERS.startswith(cut.choices[0].message.content or "?")
    assert cut.usage
    assert cut.usage.completion_tokens == 9
    stopped = client.chat.completions.create(messages=user(COUNT), stop=[" 12", "nothing"], **GREEDY)
    assert stopped.choices[0].message.content == NUMBERS[: NUMBERS.index(" 12")]
    assert stopped.choices[0].finish_reason == "stop"
    streamed = client.chat.completions.create(messages=user(COUNT), stop=" 12", stream=True, **GREEDY)
    text = "".join(one.choices[0].delta.content or "" for one in streamed)
    assert text == NUMBERS[: NUMBERS.index(" 12")]


def test_the_client_of_the_documentation_streams_the_answer(endpoint: str) -> None:
    page = (Path(__file__).parents[3] / "docs" / "serve.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    program = example.replace("http://127.0.0.1:23333/v1", endpoint)
    assert program != example
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{I_AM}\n", done.stderr


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_read(client: OpenAI, stream: bool) -> None:
    if stream:
        chunks = list(client.chat.completions.create(messages=user(SUM), tools=TOOLS, stream=True, **GREEDY))
        deltas = [one.choices[0].delta for one in chunks]
        (called,) = [call for one in deltas for call in one.tool_calls or ()]
        said = "".join(one.content or "" for one in deltas)
        finish = chunks[-1].choices[0].finish_reason
    else:
        (choice,) = client.chat.completions.create(messages=user(SUM), tools=TOOLS, **GREEDY).choices
        (called,) = choice.message.tool_calls or ()  # type: ignore[assignment]
        said, finish = choice.message.content or "", choice.finish_reason
    assert (said, finish) == ("I compute it.", "tool_calls")
    function = called.function
    assert function
    assert (function.name, function.arguments) == ("calculator", '{"expression": "12 * 12"}')
    result = run({CALCULATOR.name: CALCULATOR}, Call(function.name or "", function.arguments or ""))
    messages: Any = [
        *user(SUM),
        {"role": "assistant", "content": said, "tool_calls": [called.model_dump(exclude={"index"})]},
        {"role": "tool", "tool_call_id": called.id, "content": result},
    ]
    answer = client.chat.completions.create(messages=messages, tools=TOOLS, **GREEDY)
    assert answer.choices[0].message.content == RESULT


def test_text_and_tokens_are_completed(client: OpenAI, trained: str) -> None:
    opened = open_model(trained, None, None)
    words = opened.tokenizer
    ids = [words.bos, *words.encode("I am")]
    request = Request(ids, frozenset({words.eos}), 16, Sampling(0))
    expected = words.decode(opened.decoder.generate([request])[0])
    for text in ("I am", ["I am"], ids):
        found = client.completions.create(prompt=text, **GREEDY)
        assert found.choices[0].text == expected
    streamed = client.completions.create(prompt="I am", stream=True, **GREEDY)
    assert "".join(one.choices[0].text for one in streamed) == expected


def test_a_seed_repeats_an_answer_and_none_does_not(client: OpenAI) -> None:
    def answer(**more: Any) -> str:
        return (
            client.completions.create(model="small", prompt="", temperature=2, top_p=1, **more)
            .choices[0]
            .text
        )

    assert answer(seed=3) == answer(seed=3)
    assert len({answer() for _ in range(4)}) > 1


def test_many_ask_at_once_and_each_gets_its_own(client: OpenAI) -> None:
    asked = [(WHO, I_AM), (COUNT, NUMBERS)] * 5
    with ThreadPoolExecutor(len(asked)) as pool:
        found = pool.map(lambda one: client.chat.completions.create(messages=user(one[0]), **GREEDY), asked)
        assert [one.choices[0].message.content for one in found] == [answer for _, answer in asked]


def test_a_client_that_leaves_makes_room(client: OpenAI) -> None:
    for _ in range(4):  # more than there are rows
        stream = client.chat.completions.create(messages=user(COUNT), stream=True, **GREEDY)
        next(iter(stream))
        stream.close()
    assert client.chat.completions.create(messages=user(WHO), **GREEDY).choices[0].message.content == I_AM


REFUSED = [
    ({"model": "large"}, openai.NotFoundError, "there is no model 'large'; this server has 'small'"),
    ({"n": 2}, openai.BadRequestError, "does not know n 2; leave it out"),
    ({"temperature": -1}, openai.BadRequestError, "temperature: Input should be greater than or equal to 0"),
    ({"messages": []}, openai.BadRequestError, "messages: List should have at least 1 item"),
    ({"messages": [{"role": "owner", "content": "?"}]}, openai.BadRequestError, "messages.0.role"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, openai.BadRequestError, "tools.0.function.name"),
    ({"messages": user("word " * 900)}, openai.BadRequestError, f"tokens, and the model reads {CONTEXT}"),
    ({"messages": user("x" * 5_000_000)}, openai.APIStatusError, "Too Large"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "kind", "sentence"), REFUSED, ids=[str(one[2])[:30] for one in REFUSED])
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_said_in_openais_form(
    client: OpenAI, given: dict[str, Any], kind: type[openai.APIStatusError], sentence: str, stream: bool
) -> None:
    with pytest.raises(kind, match=re.escape(sentence)) as raised:
        client.chat.completions.create(**{"messages": user(WHO), **GREEDY, **given}, stream=stream)
    body = raised.value.body
    assert isinstance(body, dict)
    assert body["type"] == "invalid_request_error"
    assert body["message"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"[]", 400),
        ("/v1/completions", b'{"model": "small", "prompt": []}', 400),
        ("/v1/completions", b'{"model": "small", "prompt": [512]}', 400),
        ("/v1/completions", b'{"model": "small", "prompt": ["a", "b"]}', 400),
        ("/v1/embeddings", b"{}", 404),
        ("/v1/models", b"{}", 405),
    ],
)
def test_other_requests_have_an_error_too(endpoint: str, path: str, body: bytes, status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(endpoint.removesuffix("/v1") + path, body)
    assert raised.value.code == status
    assert json.loads(raised.value.read())["error"]["message"]


def test_ctrl_c_ends_the_server_with_what_it_answers(trained: str) -> None:
    with command(r"answers at http://(\S+?)/v1", "serve", trained, "--port", "0", "--name", "mine") as (
        process,
        address,
    ):
        connection = http.client.HTTPConnection(address, timeout=60)
        body = {"model": "mine", "messages": user(COUNT), "stream": True}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.readline().startswith(b"data: ")
        process.send_signal(signal.SIGINT)
        answer.read()
        assert process.wait(60) == 0


def test_an_address_that_is_taken_is_a_sentence(endpoint: str, trained: str) -> None:
    port = re.search(r":(\d+)/", endpoint)
    assert port
    with (
        pytest.raises(
            pytest.fail.Exception, match=rf"--port {port[1]}: Address already in use; give another"
        ),
        command("(never)", "serve", trained, "--port", port[1]),
    ):
        pass


@pytest.fixture
def engine(trained: str) -> Engine:
    opened = open_model(trained, None, None)
    return Engine(opened.decoder, waiting=1)


def request(max_tokens: int = 400) -> Request:
    return Request([1, 2, 3], frozenset(), max_tokens, Sampling(0))


def test_too_many_requests_are_refused_and_those_that_left_are_not_begun(engine: Engine) -> None:
    first = engine.answer(request())
    next(first)  # it has the only row
    second = engine.answer(request())
    with pytest.raises(Busy, match="1 requests wait already"):
        engine.answer(request())
    second.close()
    assert len(list(first)) == 399
    third = engine.answer(request(5))
    assert len(list(third)) == 5
    assert second.made.empty()
    engine.close()


def test_a_model_that_fails_fails_all_requests(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("the card is full")

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    under_way = engine.answer(request())
    next(under_way)
    monkeypatch.setattr(engine.decoder, "step", fails)
    with pytest.raises(RuntimeError, match="the card is full"):
        list(under_way)
    with pytest.raises(RuntimeError, match="the card is full"):
        next(engine.answer(request()))


def test_a_server_whose_model_has_stopped_is_not_healthy(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("the card is full")

    async def healths() -> list[tuple[int, Any]]:
        speaker = Speaker(engine.answer, chatml_tokenizer(), CONTEXT, None)
        async with TestClient(TestServer(Server(speaker, engine, "small").application())) as client:
            found = []
            for _ in range(2):
                answer = await client.get("/health")
                found.append((answer.status, await answer.json()))
                with suppress(RuntimeError):
                    list(engine.answer(request(5)))
        return found

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(engine.decoder, "step", fails)
    (before, well), (after, ill) = asyncio.run(healths())
    assert (before, well) == (200, {"status": "ok"})
    assert after == 503
    assert ill["error"]["message"] == "the model has stopped: the card is full; restart this server"
