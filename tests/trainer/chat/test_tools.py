"""What a model is told of tools, what is understood of its calls, and what they may do."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from transformers import AutoTokenizer

from internlm_trainer.chat.messages import INTERPRETER, Call, Message, form_of, prompt
from internlm_trainer.chat.reading import Piece, Reader, Scanner, Text
from internlm_trainer.chat.talk import MOST_ROUNDS, Answer, Asking, Chat, Result, Speaker
from internlm_trainer.chat.tools import CALCULATOR, calculate, load_tools, run, tool_of
from internlm_trainer.data.tokenizer import Tokenizer, train_tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.generate import Made, Request
from internlm_trainer.weights.tokenizer_files import tokenizer_files
from trainer.chat.chatml import chatml_tokenizer


@pytest.fixture(scope="module")
def internlm_words() -> Tokenizer:
    return Tokenizer(train_tokenizer([Path(json.__file__).read_text()], 512))


@pytest.fixture(scope="module")
def chatml_words() -> Tokenizer:
    return chatml_tokenizer()


def weather(city: str, days: Annotated[int, Field(ge=1, le=7)] = 1) -> dict[str, object]:
    """The weather forecast of a city."""
    if city == "Atlantis":
        raise LookupError("there is no such city")
    return {"city": city, "days": days}


WEATHER = tool_of(weather)
TOOLS = {tool.name: tool for tool in (CALCULATOR, WEATHER)}
CONVERSATION = [
    Message("system", "Be brief."),
    Message("user", "What is 2 + 2?"),
    Message("assistant", "I compute it.", (Call("calculator", '{"expression": "2 + 2"}'),)),
    Message("tool", "4"),
    Message("assistant", "It is 4."),
    Message("user", "Thanks"),
]


def theirs_of(folder: Path, words: Tokenizer) -> AutoTokenizer:
    for name, data in tokenizer_files(words, 256):
        (folder / name).write_bytes(data)
    return AutoTokenizer.from_pretrained(str(folder))


def test_the_prompt_with_tools_is_that_of_the_exported_chat_template(
    tmp_path: Path, chatml_words: Tokenizer
) -> None:
    theirs = theirs_of(tmp_path, chatml_words)
    assert theirs.convert_tokens_to_ids("<|im_start|>") == 511
    messages = [{"role": one.role, "content": one.content} for one in CONVERSATION]
    messages[2]["tool_calls"] = [  # type: ignore[assignment]
        {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
        for call in CONVERSATION[2].calls
    ]
    form = form_of(chatml_words)
    for begin in (0, 1):
        for tools in ([], [WEATHER.spec], [CALCULATOR.spec, WEATHER.spec]):
            ids = theirs.apply_chat_template(
                messages[begin:],
                tools=[{"type": "function", "function": spec} for spec in tools] or None,
                add_generation_prompt=True,
                return_dict=False,
            )
            ours = prompt(form, chatml_words, CONVERSATION[begin:], tools)
            assert theirs.decode(ours) == theirs.decode(ids)
    text = theirs.decode(prompt(form, chatml_words, CONVERSATION, [WEATHER.spec]))
    assert text.startswith(
        "<s><|im_start|>system\nBe brief.<|im_end|>\n"
        '<|im_start|>system name=<|plugin|>\n[{"name": "weather", "description": "The weather forecast of a city."'
    )
    assert (
        '<|im_start|>assistant\nI compute it.<|action_start|><|plugin|>\n{"name": "calculator", "parameters": '
        '{"expression": "2 + 2"}}<|action_end|><|im_end|>\n<|im_start|>environment name=<|plugin|>\n4<|im_end|>\n'
    ) in text


def test_the_plain_prompt_has_a_system_message_as_the_template_does(
    tmp_path: Path, internlm_words: Tokenizer
) -> None:
    theirs = theirs_of(tmp_path, internlm_words)
    said = [one for one in CONVERSATION if one.role != "tool" and not one.calls]
    messages = [{"role": one.role, "content": one.content} for one in said]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert expected == (
        "<s><|System|>:Be brief.\n<|User|>:What is 2 + 2?<eoh>\n<|Bot|>:It is 4.<eoa>\n"
        "<s><|User|>:Thanks<eoh>\n<|Bot|>:"
    )
    assert theirs.decode(prompt(form_of(internlm_words), internlm_words, said, ())) == expected


def test_a_model_without_words_for_tools_is_told_of_them_in_text(internlm_words: Tokenizer) -> None:
    form = form_of(internlm_words)
    text = internlm_words.decode(prompt(form, internlm_words, CONVERSATION, [WEATHER.spec]))
    assert text.startswith("<|System|>:Be brief.\nYou can call these tools")
    assert json.dumps(WEATHER.spec) in text
    assert (
        'I compute it.\nAction: calculator\nAction Input: {"expression": "2 + 2"}<eoa>\n<|System|>:Response: 4\n'
        in text
    )


def read(
    words: Tokenizer, ids: list[int], stops: tuple[str, ...] = (), tools: bool = True
) -> tuple[list[Piece], Reader]:
    reader = Reader(words, stops, tools, form_of(words).plugin)
    pieces: list[Piece] = []
    for token in ids:
        pieces += reader.feed(token)
        if reader.stopped:
            break
    return [*pieces, *reader.end()], reader


def joined(pieces: list[Piece], kind: str) -> str:
    return "".join(one.text for one in pieces if one.kind == kind)


REACT = [
    ("The sky is blue: Act!", "", "The sky is blue: Act!", []),
    ("Thought: I know.\nFinal Answer: 4", "I know.\n", "4", []),
    (
        'Thought: compute\nAction: calculator\nAction Input: {"expression": "2}"} and so on\nResponse: 5',
        "compute\n",
        "",
        [Call("calculator", '{"expression": "2}"}')],
    ),
    ("Action: calculator\nAction Input: 2 + 2", "", "", [Call("calculator", "2 + 2")]),
    ("Sure.\nAction: nothing\n", "", "Sure.\n", [Call("nothing", "{}")]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "thought", "said", "calls"), REACT)
def test_react_is_understood_piece_by_piece(
    internlm_words: Tokenizer, text: str, thought: str, said: str, calls: list[Call]
) -> None:
    pieces, reader = read(internlm_words, internlm_words.encode(text))
    assert (joined(pieces, "thought"), joined(pieces, "text"), reader.calls) == (thought, said, calls)
    assert reader.content == said


def test_calls_of_internlm2_are_understood(chatml_words: Tokenizer) -> None:
    id_of, encode = chatml_words.id_of, chatml_words.encode
    start, end = id_of("<|action_start|>"), id_of("<|action_end|>")
    plugin, interpreter = id_of("<|plugin|>"), id_of("<|interpreter|>")
    assert None not in (start, end, plugin, interpreter)
    call = encode('\n{"name": "weather", "parameters": {"city": "Köln"}}')
    code = encode("\n```python\nprint(1)\n```")
    ids = [*encode("Let me see"), start, plugin, *call, end, start, interpreter, *code, end]
    pieces, reader = read(chatml_words, ids)  # type: ignore[arg-type]
    assert joined(pieces, "text") == reader.content == "Let me see"
    assert reader.calls == [
        Call("weather", '{"city": "Köln"}'),
        Call(INTERPRETER, '{"code": "print(1)\\n"}'),
    ]
    _, cut = read(chatml_words, ids[:-12])  # type: ignore[arg-type]
    assert cut.calls[0] == reader.calls[0]
    _, broken = read(chatml_words, [start, plugin, *encode("hm"), end])  # type: ignore[list-item]
    assert broken.calls == [Call("", "hm")]


@pytest.mark.parametrize("size", [1, 2, 7])
@given(text=st.text("abcEND\n", max_size=30), markers=st.sampled_from([["END"], ["bc", "cE"], ["aab", "ab"]]))
def test_a_marker_is_found_at_its_first_place_however_the_text_is_cut(
    size: int, text: str, markers: list[str]
) -> None:
    scanner, before, found = Scanner(markers), "", None
    for place in range(0, len(text), size):
        new, found = scanner.feed(text[place : place + size])
        before += new
        if found:
            break
    places = {text.find(one): one for one in markers if one in text}
    if not places:
        assert (before + scanner.held, found) == (text, None)
    elif size == 1:  # else a later marker may end the same piece, and the first in place is taken
        ends = min((place + len(one), place) for place, one in places.items())
        assert before == text[: ends[1]]
    else:
        assert found
        assert text.startswith(before + found)


def test_a_stop_word_ends_an_answer_and_none_of_it_is_shown(internlm_words: Tokenizer) -> None:
    ids = internlm_words.encode("one two\n\nthree")
    pieces, reader = read(internlm_words, ids, ("\n\n",), tools=False)
    assert joined(pieces, "text") == "one two"
    assert reader.stopped
    pieces, reader = read(internlm_words, ids, ("three!",), tools=False)
    assert joined(pieces, "text") == "one two\n\nthree"
    assert not reader.stopped


@given(st.text(max_size=40))
@settings(max_examples=40)
def test_text_comes_whole_and_by_whole_characters(text: str) -> None:
    words = chatml_tokenizer()
    shown = Text(words)
    parts = [shown.add(token) for token in words.encode(text)]
    assert all("\ufffd" not in part or "\ufffd" in text for part in parts)
    assert "".join(parts) + shown.end() == text


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3 * 4", 14),
        ("2^10", 1024),
        ("-(1 - 4) ** 2", -9),
        ("7 // 2 % 2", 1),
        ("sqrt(2) ** 2", 2.0),
        ("max(1, pi)", math.pi),
        ("round(1264, -2) + round(2.567, 2) + round(1.2)", 1303.57),
        ("2 ** 4096 // 2 ** 4095 + 2 ** -1 + 1 ** 99999", 3.5),
        ("(-1) ** 9 ** 999", -1),
    ],
)
def test_the_calculator_calculates(expression: str, value: float) -> None:
    assert calculate(expression) == pytest.approx(value)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "(1).__class__",
        "[1, 2]",
        "'a' * 10",
        "True + 1",
        "9 ** 9 ** 9",
        "(2 ** 4095 + 1) ** 10000",
        "2 ** -9 ** 999",
        "2 ** 5000 * 2 ** 5000",
        "round(5, -1000000000)",
        "round(5, -10 ** 1000)",
        "1 << 10 ** 10",
        "factorial(10 ** 6)",
        "9" + " * 9 ** 999" * 40,
        "(-8) ** 0.5",
        "lambda: 1",
        "sqrt(x=2)",
        "1 +",
        "1" * 501,
    ],
)
def test_the_calculator_runs_nothing_else(expression: str) -> None:
    answer = run(TOOLS, Call("calculator", json.dumps({"expression": expression})))
    assert answer.startswith("error: ")


PARTS = st.sampled_from(["0", "1", "-7", "0.5", "1e308", "1e999", "10 ** 9", "9 ** 999", "-2 ** 4096", "pi"])
NAMES = ("sqrt", "exp", "log", "floor", "ceil", "sin", "degrees", "abs", "round", "min", "max")
EXPRESSIONS = st.recursive(
    PARTS,
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**"]), inner)
        | st.builds("{}({})".format, st.sampled_from(NAMES), inner)
        | st.builds("{}({}, {})".format, st.sampled_from(NAMES), inner, inner)
    ),
    max_leaves=10,
)


@given(EXPRESSIONS)
@settings(max_examples=300)
def test_whatever_the_calculator_is_asked_it_ends_with_a_number_or_a_sentence(expression: str) -> None:
    answer = run(TOOLS, Call("calculator", json.dumps({"expression": expression})))
    assert answer.startswith("error: ") or float(answer[:300]) is not None
    assert len(answer) < 4100


CALLS = [
    (Call("weather", '{"city": "Oslo", "days": 3}'), '{"city": "Oslo", "days": 3}'),
    (Call("weather", '{"city": "Oslo", "days": 9}'), "error: the arguments do not fit: days: Input should be less"),
    (Call("weather", '{"city": "Oslo", "days": "3"}'), "error: the arguments do not fit: days: Input should be"),
    (Call("weather", '{"city": "Oslo", "days": true}'), "error: the arguments do not fit: days: Input should be"),
    (Call("weather", '{"city": 7}'), "error: the arguments do not fit: city: Input should be a valid string"),
    (Call("weather", "{}"), "error: the arguments do not fit: city: Missing required argument"),
    (Call("weather", '{"city": "Oslo", "when": 1}'), "error: the arguments do not fit: when: Unexpected"),
    (Call("weather", "Oslo"), "error: the arguments do not fit: Invalid JSON"),
    (Call("weather", '{"city": "Atlantis"}'), "error: LookupError: there is no such city"),
    (Call("time", "{}"), "error: there is no tool 'time'; there are calculator, weather"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "answer"), CALLS)
def test_arguments_are_checked_and_mistakes_are_told_to_the_model(call: Call, answer: str) -> None:
    assert run(TOOLS, call).startswith(answer)


def mean(values: list[float], since: date | None = None, times: int | float = 1) -> str:
    """The mean."""
    return f"{sum(values) / len(values) * times} {since}"


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ('{"values": [1, 2]}', "1.5 None"),
        ('{"values": [1, 2.0], "since": "2024-02-29", "times": 2.0}', "3.0 2024-02-29"),
        ('{"values": ["1"]}', "error: the arguments do not fit: values.0: Input should be a valid number"),
        (
            '{"values": [1], "since": 0}',
            "error: the arguments do not fit: since: Input should be a valid date",
        ),
    ],
)
def test_what_the_schema_allows_is_taken_and_nothing_else(arguments: str, answer: str) -> None:
    assert run({"mean": tool_of(mean)}, Call("mean", arguments)).startswith(answer)


def test_tools_are_loaded_from_modules_and_files(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from math import sqrt\n\ndef double(x: float) -> float:\n    '''Twice x.'''\n    return 2 * x\n\n"
        "def _hidden(x: int) -> int:\n    return x\n"
    )
    assert [tool.name for tool in load_tools(str(tmp_path / "mine.py"))] == ["double"]
    (double,) = load_tools(f"{tmp_path / 'mine.py'}:double")
    assert double.spec == {
        "name": "double",
        "description": "Twice x.",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "number"}},
            "required": ["x"],
            "additionalProperties": False,
        },
    }
    assert load_tools("calculator") == [CALCULATOR]
    assert load_tools("internlm_trainer.chat.tools:calculate")[0].name == "calculate"


@pytest.mark.parametrize(
    ("given", "content", "sentence"),
    [
        ("mine.py", None, "mine.py is not there"),
        ("no.such.module", None, "No module named 'no'"),
        ("mine.py:f", "x = 1", "has no function f"),
        ("mine.py", "x = 1", "defines no functions"),
        ("mine.py", "def f(x: int): pass", "f has no docstring"),
        ("mine.py", "def f(x: int, /):\n    'F.'", "f has parameters without names"),
        ("mine.py", "1 / 0", "does not load: ZeroDivisionError"),
    ],
)
def test_what_is_no_tool_is_a_sentence(
    tmp_path: Path, given: str, content: str | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    with pytest.raises(UserError, match=sentence):
        load_tools(f"{tmp_path}/{given}" if given.startswith("mine") else given)


def source_of(words: Tokenizer, answers: list[list[int]], asked: list[str]) -> object:
    """A model that says these answers, one after the other, and the last for ever."""

    def source(request: Request) -> Iterator[Made]:
        asked.append(words.decode(request.prompt))
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        for token in answer:
            yield Made(0, token, None)
        yield Made(0, None, "stop")

    return source


def chat_of(words: Tokenizer, answers: list[str | list[int]], asked: list[str]) -> Chat:
    ids = [words.encode(one) if isinstance(one, str) else one for one in answers]
    speaker = Speaker(source_of(words, ids, asked), words, 4000, form_of(words))  # type: ignore[arg-type]
    return Chat(speaker, [CALCULATOR, WEATHER], "Be brief.")


def test_calls_are_run_and_their_results_are_read(internlm_words: Tokenizer) -> None:
    asked: list[str] = []
    call = 'Thought: compute\nAction: calculator\nAction Input: {"expression": "12 * 12"}'
    chat = chat_of(internlm_words, [call, "Thought: done\nFinal Answer: It is 144."], asked)
    events = list(chat.ask("What is 12 * 12?", Asking()))
    asked_call = Call("calculator", '{"expression": "12 * 12"}')
    assert asked_call in events
    assert Result(asked_call, "144") in events
    assert isinstance(events[-1], Answer)
    assert events[-1].message.content == "It is 144."
    assert asked[1].endswith(f"{call}<eoa>\n<|System|>:Response: 144\n<|Bot|>:")
    assert [one.role for one in chat.messages] == ["system", "user", "assistant", "tool", "assistant"]
    list(chat.ask("And now?", Asking()))
    assert "Final Answer: It is 144.<eoa>" in asked[2]


def test_a_model_that_only_calls_has_to_answer_at_last(chatml_words: Tokenizer) -> None:
    asked: list[str] = []
    words = [chatml_words.id_of(f"<|{one}|>") for one in ("action_start", "plugin", "action_end")]
    call = [
        words[0],
        words[1],
        *chatml_words.encode('\n{"name": "calculator", "parameters": {"expression": "1"}}'),
        words[2],
    ]
    events = list(chat_of(chatml_words, [call], asked).ask("?", Asking()))  # type: ignore[list-item]
    assert sum(isinstance(one, Result) for one in events) == MOST_ROUNDS
    assert isinstance(events[-1], Answer)
    assert len(asked) == MOST_ROUNDS + 1


def test_an_answer_that_is_left_is_remembered_as_far_as_it_came(internlm_words: Tokenizer) -> None:
    chat = chat_of(internlm_words, ["one two three four five six"], [])
    events = chat.ask("Count.", Asking())
    said = ""
    while "three" not in said:
        piece = next(events)
        assert isinstance(piece, Piece)
        said += piece.text
    events.close()  # type: ignore[attr-defined]
    assert chat.messages[-1] == Message("assistant", said)
