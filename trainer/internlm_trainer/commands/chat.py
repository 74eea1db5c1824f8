"""`internlm chat`, `serve` and `demo`: a model tried out in the terminal, over HTTP, or in the browser."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from internlm_trainer.commands.common import sentences, store_errors
from internlm_trainer.commands.opened import Source, check_chat, open_model
from internlm_trainer.errors import UserError

if TYPE_CHECKING:
    from internlm_trainer.chat.messages import Form
    from internlm_trainer.chat.tools import Tool
    from internlm_trainer.data.tokenizer import Tokenizer

TokenizerUrl = Annotated[
    str | None, typer.Option(help="SentencePiece model. Default: the one the weights were trained with.")
]
Context = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens that a conversation may have. Default: what it was trained with."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile for the GPU: the first answer takes a minute longer.")
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest word each time.")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest words of so much probability.")
]
TopK = Annotated[int, typer.Option(min=0, help="Draw from so many likeliest words; 0 is no limit.")]
Penalty = Annotated[float, typer.Option(min=0.01, help="Above 1, words that were there become less likely.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Of an answer.")]
Host = Annotated[str, typer.Option(help="Address; 0.0.0.0 is all of this machine's.")]
Rows = Annotated[int, typer.Option(min=1, help="Requests that are answered at a time; others wait.")]
System = Annotated[str, typer.Option(help="What the model is told before the first question.")]
Tools = Annotated[
    list[str] | None,
    typer.Option(
        help="Lets the model call calculator, module:function, or file.py's functions; may be repeated."
    ),
]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code", help="Lets the model run Python here, in a process with limits and without network."
    ),
]
NoIsolation = Annotated[
    bool,
    typer.Option(
        "--no-isolation", help="With --allow-code: the code may reach the network and other processes."
    ),
]


@sentences
def chat(
    source: Source,
    tokenizer: TokenizerUrl = None,
    question: Annotated[
        list[str] | None, typer.Option("--question", "-q", help="Ask this and end; may be repeated.")
    ] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="Continue plain text, for models that were not made for chat.")
    ] = False,
    system: System = "",
    tools: Tools = None,
    allow_code: AllowCode = False,
    no_isolation: NoIsolation = False,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.8,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    max_tokens: MaxTokens = 1024,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be repeated.")] = None,
    context: Context = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    compiled: Compile = False,
) -> None:
    """Talk to a model in the terminal, from a checkpoint or a folder in Hugging Face's or InternLM's format.

    Answers appear as they are made. /reset forgets what was said; Ctrl-C ends an answer, Ctrl-D the chat.
    """
    from internlm_trainer.chat.messages import form_of
    from internlm_trainer.chat.talk import Asking, Chat, Speaker, continued
    from internlm_trainer.generate import Sampling

    found = chosen_tools(tools, allow_code, not no_isolation)
    with store_errors():
        opened = open_model(source, tokenizer, context, compiled=compiled)
    form = None if complete else form_of(opened.tokenizer)
    speaker = Speaker(opened.decoder.answer, opened.tokenizer, opened.decoder.context, form)
    talk = None if complete else Chat(speaker, found, system)
    for number, asked in enumerate(question or _typed()):
        if talk and asked.strip() == "/reset":
            talk = Chat(speaker, found, system)
            continue
        sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed + number)
        asking = Asking(sampling, max_tokens, tuple(stop or ()))
        if talk:
            answer = talk.ask(asked, asking)
        else:
            answer = continued(speaker, asked, asking)
        with suppress(KeyboardInterrupt):
            for event in answer:
                _show(event)
        typer.echo()


@sentences
def serve(
    source: Source,
    tokenizer: TokenizerUrl = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Of the model in requests. Default: the last part of SOURCE.")
    ] = None,
    rows: Rows = 4,
    context: Context = None,
    compiled: Compile = False,
) -> None:
    """Serve a model with OpenAI's HTTP interface, to try it out.

    For many users, export the model and serve it with LMDeploy, which is made for that (docs/serve.md). Ctrl-C ends it.
    """
    import asyncio

    from internlm_trainer.chat import server
    from internlm_trainer.chat.engine import Engine
    from internlm_trainer.chat.talk import Speaker

    listener = server.listen(host, port)
    with store_errors():
        opened = open_model(source, tokenizer, context, rows, compiled)
    typer.echo(
        "this is for trying a model out; to serve it to others: internlm export, then lmdeploy serve api_server",
        err=True,
    )
    called, engine = name or opened.name, Engine(opened.decoder)
    words = opened.tokenizer
    speaker = Speaker(engine.answer, words, opened.decoder.context, form_or_none(words))
    url = f"http://{host}:{listener.getsockname()[1]}/v1"
    begun = partial(typer.echo, f"{called} answers at {url}")
    asyncio.run(server.serve(speaker, engine, called, listener, begun))


@sentences
def demo(
    source: Source,
    tokenizer: TokenizerUrl = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8501,
    tools: Tools = None,
    allow_code: AllowCode = False,
    no_isolation: NoIsolation = False,
    rows: Rows = 4,
    context: Context = None,
    compiled: Compile = False,
) -> None:
    """Chat with a model in the browser: Ctrl-C ends it. Needs the extra `demo` (Streamlit)."""
    if not find_spec("streamlit"):
        raise UserError("internlm demo needs Streamlit; install it with pip install 'internlm-k8s[demo]'")
    # Mistakes are told here, not in the browser.
    chosen_tools(tools, allow_code, not no_isolation)
    with store_errors():
        check_chat(source, tokenizer, context)
    options = {
        "source": source,
        "tokenizer": tokenizer,
        "context": context,
        "rows": rows,
        "compiled": compiled,
    }
    given = json.dumps({**options, "tools": [tools, allow_code, not no_isolation]})
    script = find_spec("internlm_trainer.commands.demo_page")
    assert script
    assert script.origin
    settings = {
        "server.address": host,
        "server.port": port,
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
        "theme.base": "light",
        "theme.primaryColor": "#2456c7",
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    program = [sys.executable, "-m", "streamlit", "run", script.origin, *flags, "--", given]
    os.execv(sys.executable, program)  # noqa: S606 - in place of this process, so that signals reach it


def form_or_none(tokenizer: Tokenizer) -> Form | None:
    """The form of a vocabulary's chat, where it has one."""
    from internlm_trainer.chat.messages import form_of

    try:
        return form_of(tokenizer)
    except UserError:
        return None


def chosen_tools(given: list[str] | None, code: bool, isolated: bool) -> list[Tool]:
    """The tools of the options `--tools`, `--allow-code` and, unless `isolated`, `--no-isolation`."""
    from internlm_trainer.chat.tools import PYTHON, PYTHON_BESIDE, load_tools
    from internlm_trainer.sandbox import isolation

    found = [tool for one in given or () for tool in load_tools(one)]
    if not code:
        return found
    if not isolated:
        return [*found, PYTHON_BESIDE]
    isolation()  # a machine without it says so before the first call
    return [*found, PYTHON]


def _show(event: object) -> None:
    from internlm_trainer.chat.messages import Call
    from internlm_trainer.chat.reading import Piece
    from internlm_trainer.chat.talk import Result

    if isinstance(event, Piece):
        typer.secho(event.text, nl=False, dim=event.kind == "thought" or None)
    elif isinstance(event, Call):
        typer.secho(f"\n[{event.name} {event.arguments}]", dim=True)
    elif isinstance(event, Result):
        typer.secho(f"[= {event.text}]", dim=True)


def _typed() -> Iterator[str]:
    """What is typed, line by line, until Ctrl-D or Ctrl-C."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line
