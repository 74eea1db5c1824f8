"""`internlm demo`: a model in the browser.  A script that Streamlit runs anew for each thing that a visitor does.

The model and its thread are shared by all visitors; what each said is in the session's state.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import streamlit as st

from internlm_trainer.chat.engine import Busy, Engine
from internlm_trainer.chat.messages import INTERPRETER, Call, Message, form_of
from internlm_trainer.chat.reading import Piece
from internlm_trainer.chat.talk import Answer, Asking, Chat, Result, Speaker
from internlm_trainer.chat.tools import Tool
from internlm_trainer.checkpoint import BadCheckpoint, StorageUnavailable
from internlm_trainer.commands.chat import chosen_tools
from internlm_trainer.commands.opened import open_model
from internlm_trainer.errors import UserError
from internlm_trainer.generate import Sampling

_CURSOR = "\u258c"
_STYLE = """<style>
[data-testid="stMainBlockContainer"] {padding-top: 4.2rem; padding-bottom: 1rem;}
[data-testid="stChatMessage"] {padding: 0.6rem 0.2rem;}
[data-testid="stMarkdownContainer"] table {display: block; max-width: 100%; overflow-x: auto;}
[data-testid="stSidebarUserContent"] h3 {padding-top: 0;}
[data-testid="stBottomBlockContainer"] {padding-bottom: 1.2rem;}
</style>"""
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!$:~<>|])")
_LONGEST_LABEL = 48


class Block(NamedTuple):
    """A part of an answer as it is shown: `text`, a `thought`, a `call` with its result, or an `error`."""

    kind: str
    text: str
    name: str = ""
    result: str | None = None


class Settings(NamedTuple):
    """What a visitor has chosen."""

    system: str
    temperature: float
    top_p: float
    max_tokens: int


@st.cache_resource(show_spinner="Loading the model \u2026")
def shared(given: str) -> tuple[Speaker, list[Tool], str]:
    """The model, its tools and its name."""
    options = json.loads(given)
    tools = chosen_tools(*options.pop("tools"))
    opened = open_model(**options)
    decoder, words = opened.decoder, opened.tokenizer
    return Speaker(Engine(decoder).answer, words, decoder.context, form_of(words)), tools, opened.name


def sidebar(name: str, context: int, tools: list[Tool]) -> Settings:
    """The settings, and how to begin anew."""
    with st.sidebar:
        st.subheader(name)
        system = st.text_area("System prompt", height=90, placeholder="What the model is told first")
        temperature = st.slider(
            "Temperature", 0.0, 2.0, 0.8, 0.05, help="0 takes the likeliest word each time."
        )
        top_p = st.slider(
            "Top-p", 0.05, 1.0, 0.8, 0.05, help="Draw from the likeliest words of so much probability."
        )
        longest = min(context, 8192)
        length = st.slider("Maximal length", 1, longest, min(1024, longest), help="Of an answer, in tokens.")
        if st.button("Reset", icon=":material/restart_alt:", width="stretch"):
            st.session_state.clear()
        if tools:
            st.caption("Tools: " + ", ".join(tool.name for tool in tools))
        st.caption(f"It remembers {context:,} tokens. For trying a model out; models may say what is wrong.")
    return Settings(system, temperature, top_p, length)


def show(block: Block) -> None:
    if block.kind == "call":
        code, language = called_with(block)
        with st.expander(label(block), icon=":material/build:"):
            st.code(code, language=language, wrap_lines=True)
            if block.result is not None:
                st.code(block.result, language=None, wrap_lines=True)
    elif block.kind == "thought":
        st.caption(block.text)
    elif block.kind == "error":
        st.error(block.text)
    else:
        st.markdown(block.text)


def label(call: Block) -> str:
    """A call in one line, of which nothing is taken for Markdown."""
    told = "\u2026" if call.result is None else f"\u2192 {' '.join(call.result.split())}"
    told = told if len(told) <= _LONGEST_LABEL else f"{told[: _LONGEST_LABEL - 1]}\u2026"
    return _MARKDOWN.sub(r"\\\1", f"{call.name} {told}")


def called_with(call: Block) -> tuple[str, str]:
    """What a tool was called with, and the language that it is shown as: Python code as such, else JSON."""
    if call.name == INTERPRETER:
        with suppress(ValueError, TypeError, KeyError):
            return str(json.loads(call.text)["code"]), "python"
    return call.text, "json"


def grow(blocks: list[Block], event: object) -> None:
    """Put what has happened into the answer."""
    if isinstance(event, Piece):
        if blocks and blocks[-1].kind == event.kind:
            blocks[-1] = blocks[-1]._replace(text=blocks[-1].text + event.text)
        else:
            blocks.append(Block(event.kind, event.text))
    elif isinstance(event, Call):
        blocks.append(Block("call", event.arguments, event.name))
    elif isinstance(event, Result):
        blocks[-1] = blocks[-1]._replace(result=event.text)
    elif isinstance(event, Answer) and event.finish == "length":
        blocks.append(Block("thought", "(cut off at the maximal length)"))


def answer(speaker: Speaker, tools: list[Tool], settings: Settings, question: str) -> None:
    """Ask, and show what comes as it comes; what came is kept if the visitor does not wait for the end."""
    state: Any = st.session_state
    blocks: list[Block] = []
    state.turns.append((question, blocks, list(state.history)))
    chat = Chat(speaker, tools, settings.system)
    chat.messages += state.history
    sampling = Sampling(settings.temperature, settings.top_p, seed=secrets.randbits(32))
    with st.chat_message("user"):
        st.markdown(question)
    with st.chat_message("assistant"):
        events: Iterator[object] | None = None
        try:
            events = chat.ask(question, Asking(sampling, settings.max_tokens))
            slot, shown = st.empty(), 0
            slot.markdown(_CURSOR)
            for event in events:
                grow(blocks, event)
                while len(blocks) > shown + 1:  # all but the last stay as they are
                    with slot.container():
                        show(blocks[shown])
                    slot, shown = st.empty(), shown + 1
                if blocks:
                    last = blocks[-1]
                    with slot.container():
                        show(last._replace(text=last.text + _CURSOR) if last.kind == "text" else last)
        except (UserError, Busy, RuntimeError) as error:
            blocks.append(Block("error", str(error)))
        finally:
            with suppress(AttributeError):
                events.close()  # type: ignore[union-attr]
            state.history = [one for one in chat.messages if one.role != "system"]


def main() -> None:
    """One run of the script."""
    st.set_page_config(page_title="InternLM", page_icon=":material/forum:", layout="centered")
    st.html(_STYLE)
    try:
        speaker, tools, name = shared(sys.argv[1])
    except (UserError, BadCheckpoint, StorageUnavailable, RuntimeError) as error:
        st.error(f"The model does not open: {error}")
        st.stop()
    settings = sidebar(name, speaker.context, tools)
    state: Any = st.session_state
    state.setdefault("turns", [])
    state.setdefault("history", list[Message]())
    asked = st.chat_input("Ask something")
    if state.get("again"):
        asked, _, state.history = state.turns.pop()
        state.again = False
    for question, blocks, _ in state.turns:
        with st.chat_message("user"):
            st.markdown(question)
        with st.chat_message("assistant"):
            for block in blocks:
                show(block)
    below = st.empty()
    if asked:
        below.button("Stop", icon=":material/stop_circle:", type="tertiary")
        answer(speaker, tools, settings, asked)
        st.rerun()
    if state.turns:

        def again() -> None:
            state.again = True

        below.button("Regenerate", icon=":material/refresh:", type="tertiary", on_click=again)
    else:
        st.markdown("#### What would you like to know?")
        st.caption(name)  # on a phone, the sidebar is closed


if __name__ == "__main__":  # as Streamlit runs it
    main()
