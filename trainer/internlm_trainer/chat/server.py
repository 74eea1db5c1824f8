"""`internlm serve`: a model behind OpenAI's HTTP interface, to try it out."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from aiohttp import web

from internlm_trainer.chat.engine import Busy, Engine
from internlm_trainer.chat.openai import (
    ChatForm,
    ChatRequest,
    CompletionForm,
    CompletionRequest,
    Json,
    RequestError,
    error_body,
    parse,
    usage,
)
from internlm_trainer.chat.reading import Piece
from internlm_trainer.chat.talk import Answer, Speaker, continued, reply
from internlm_trainer.errors import UserError

_LARGEST_BODY = 4 << 20
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """The routes, over a speaker whose source is the engine."""

    def __init__(self, speaker: Speaker, engine: Engine, name: str) -> None:
        self.speaker, self.engine, self.name, self.begun = speaker, engine, name, int(time.time())

    def application(self) -> web.Application:
        app = web.Application(middlewares=[_errors], client_max_size=_LARGEST_BODY)
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/models/{model}", self.model)
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/completions", self.complete)
        return app

    async def health(self, _: web.Request) -> web.Response:
        if reason := self.engine.stopped:
            raise RuntimeError(f"{reason}; restart this server")
        return web.json_response({"status": "ok"})

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: web.Request) -> web.Response:
        if (asked := request.match_info["model"]) != self.name:
            raise RequestError(f"there is no model {asked!r}", "model", 404, "model_not_found")
        return web.json_response(self._model())

    def _model(self) -> Json:
        return {"id": self.name, "object": "model", "created": self.begun, "owned_by": "internlm"}

    async def chat(self, request: web.Request) -> web.StreamResponse:
        asked = parse(ChatRequest, await request.read(), self.name)
        if not self.speaker.form:
            raise RequestError("this model was not made for a chat; ask /v1/completions to continue a text")
        asking = asked.asking(self.speaker.context)
        made = reply(self.speaker, asked.said(), asked.offered(), asking)
        return await self._answer(request, made, ChatForm(), asked.stream, asked.usage_asked())

    async def complete(self, request: web.Request) -> web.StreamResponse:
        asked = parse(CompletionRequest, await request.read(), self.name)
        words = self.speaker.tokenizer.vocab_size
        if isinstance(asked.prompt, list) and max(asked.prompt) >= words:
            raise RequestError(f"prompt: the vocabulary has {words} words", "prompt")
        made = continued(self.speaker, asked.prompt, asked.asking())
        return await self._answer(request, made, CompletionForm(), asked.stream, asked.usage_asked())

    async def _answer(
        self,
        request: web.Request,
        made: Iterator[Piece | Answer],
        form: ChatForm | CompletionForm,
        stream: bool,
        with_usage: bool,
    ) -> web.StreamResponse:
        common = {"id": f"{form.prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if not stream:
            thought = ""
            async for one in _taken(made):
                if isinstance(one, Answer):
                    choice = {
                        "index": 0,
                        **form.all(one, thought),
                        "finish_reason": one.finish,
                        "logprobs": None,
                    }
                    return web.json_response(
                        {**common, "object": form.whole, "choices": [choice], "usage": usage(one)}
                    )
                thought += one.text if one.kind == "thought" else ""
            raise RuntimeError("an answer without an end")
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)

        async def send(choice: Json | None, finish: str | None = None, **more: Any) -> None:
            choices = (
                [] if choice is None else [{"index": 0, **choice, "finish_reason": finish, "logprobs": None}]
            )
            content = {**common, "object": form.part, "choices": choices, **more}
            await response.write(f"data: {json.dumps(content)}\n\n".encode())

        try:
            if first := form.first():
                await send(first)
            async for one in _taken(made):
                if isinstance(one, Piece):
                    await send(form.piece(one.kind, one.text))
                    continue
                await send(form.last(one), one.finish)
                if with_usage:
                    await send(None, usage=usage(one))
            await response.write(b"data: [DONE]\n\n")
        except RuntimeError as error:  # too late for a status
            await response.write(f"data: {json.dumps(error_body(str(error), 503))}\n\n".encode())
        return response


async def _taken(made: Iterator[Piece | Answer]) -> AsyncIterator[Piece | Answer]:
    """What a thread of its own takes from `made`, until nobody waits for more."""
    loop, left = asyncio.get_running_loop(), threading.Event()
    taken: asyncio.Queue[Piece | Answer | BaseException | None] = asyncio.Queue()

    def take() -> None:
        end: BaseException | None = None
        try:
            for one in made:
                if left.is_set():
                    break
                loop.call_soon_threadsafe(taken.put_nowait, one)
        except Exception as error:
            end = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(taken.put_nowait, end)

    threading.Thread(target=take, name="answer", daemon=True).start()
    try:
        while (one := await taken.get()) is not None:
            if isinstance(one, BaseException):
                raise one
            yield one
    finally:
        left.set()


@web.middleware
async def _errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Everything that goes wrong, in OpenAI's form."""
    try:
        return await handler(request)
    except RequestError as error:
        status, body = error.status, error_body(str(error), error.status, error.param, error.code)
    except UserError as error:
        status, body = 400, error_body(str(error), 400, code="context_length_exceeded")
    except Busy as error:
        status, body = 429, error_body(str(error), 429)
    except web.HTTPException as error:
        status, body = error.status, error_body(f"{request.path}: {error.reason}", error.status)
    except RuntimeError as error:
        status, body = 503, error_body(str(error), 503)
    return web.json_response(body, status=status)


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is a free one.  Raises UserError for one that is taken or not this machine's."""
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: {os.strerror(error.errno or 0)}; give another"
        ) from error


async def serve(
    speaker: Speaker, engine: Engine, name: str, listener: socket.socket, begun: Callable[[], None]
) -> None:
    """Answer until SIGINT or SIGTERM."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    # A client that has gone ends its answer, which makes room for others.
    runner = web.AppRunner(
        Server(speaker, engine, name).application(),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=2,
    )
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        begun()
        await stop.wait()
    finally:
        engine.close()
        await runner.cleanup()
