"""Configurations in Python: what they say, and what is refused, without running any of it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_trainer.errors import UserError
from internlm_trainer.legacy_config import evaluate


def value_of(expression: str) -> Any:
    return evaluate(
        f"A = 6\nB = 'x'\nC = {{'k': [1, (2, 3)]}}\nvalue = {expression}\n".encode(), "c.py"
    ).values["value"]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2**16", 65536),
        ("512 * 1024 * 1024", 2**29),
        ("8 / 3", 8 / 3),
        ("-A // 4 + 7 % 4", 1),
        ("int(50 / 2)", 25),
        ("1e-4", 1e-4),
        ("dict(a=A, b=dict(c=None), **{})", None),
        ("dict(a=A, b=dict(c=None))", {"a": 6, "b": {"c": None}}),
        ("C['k'][1][0]", 2),
        ("f'boto3:s3://{B}.{A}/p'", "boto3:s3://x.6/p"),
        ("'/'.join([B, 'snapshot'])", "x/snapshot"),
        ("A if A > 5 and not False else None", 6),
        ("1 < A <= 6 != 7", True),
        ("B in ['x', 'y']", True),
        ("[1] + [2]", [1, 2]),
        ("max(A, 7.5)", 7.5),
        ("None or 'default'", "default"),
    ],
)
def test_what_configurations_consist_of_has_its_value(expression: str, value: Any) -> None:
    if value is None:
        with pytest.raises(
            UserError, match=r"^c\.py:4: calls dict in a way that is not understood; a configuration"
        ):
            value_of(expression)
    else:
        assert value_of(expression) == value


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("import os", "imports a module"),
        ("from os import system", "imports from a module"),
        ("__import__('os').system('touch /tmp/x')", "Python construct (Expr)"),
        ("A = __import__('os')", "calls __import__"),
        ("A = open('/etc/passwd')", "calls open"),
        ("A = eval('1')", "calls eval"),
        ("A = ().__class__", "reads an attribute"),
        ("A = 'x'.format(1)", "calls something that is no name"),
        ("A = [x for x in (1, 2)]", "is a comprehension"),
        ("A = lambda: 1", "is a function"),
        ("A = (b := 1)", "NamedExpr"),
        ("def f(): pass", "defines a function"),
        ("for x in (1,): A = x", "is a loop"),
        ("if True:\n  A = 1", "is an if statement"),
        ("A = {1, 2}", "(Set)"),
        ("A = b'x'", "(Constant)"),
        ("A = B", "the name B is not assigned above"),
        ("A = 1 / 0", "has no value: ZeroDivisionError"),
        ("A = {}['k']", "has no value: KeyError"),
        ("A = int('x')", "has no value: ValueError"),
        ("A = 'x' * 10**9", "computes with what are no numbers"),
        ("A = '%s' % 1", "computes with what are no numbers"),
        ("A, B = 1, 2", "assigns to something that is no name"),
        ("A = {}\nA['k'] = 1", "assigns to something that is no name"),
        ("A = f'{1:>1000000000}'", "f-string with a format"),
        ("A = float('nan')", "too large a number, or none"),
        ("A = (-1) ** 0.5", "too large a number, or none"),
        ("A = 2 ** 10 ** 10", "too large a power"),
        ("A = 9 ** 99 ** 9", "too large a"),
        ("dict = 1\nA = dict()", "calls dict"),
        ("A =", "is not Python"),
        ("A = [" + "[" * 150 + "]" * 150 + "]", "nested"),
        ("A = " + "-" * 5000 + "1", ""),
        ("A = '\0'", "null byte"),
    ],
)
def test_everything_else_is_refused_with_its_line(statement: str, says: str) -> None:
    with pytest.raises(UserError) as refused:
        evaluate(f"'''A text.'''\n{statement}\n".encode(), "c.py")
    assert str(refused.value).startswith("c.py:"), refused.value
    assert says in str(refused.value)


def test_few_lines_that_would_take_all_memory_are_refused() -> None:
    doubled = "A = 'x'\n" + "A = A + A\n" * 100
    nested = "A = [0]\n" + "A = [A, A]\n" * 60 + "B = f'{A}'\n"
    compared = "A = [0]\nB = [0]\n" + "A = [A, A]\nB = [B, B]\n" * 60 + "C = A == B\n"
    for bomb in (doubled, nested, compared):
        with pytest.raises(UserError):
            evaluate(bomb.encode(), "c.py")


def test_a_file_that_is_no_text_or_too_long_is_refused() -> None:
    for source in (b"\xff\xfe\x00A = 1", b"A = 1\n" * 200_000):
        with pytest.raises(UserError, match=r"^c\.py"):
            evaluate(source, "c.py")


def test_each_field_knows_its_line() -> None:
    config = evaluate(b"A = 1\ndata = dict(\n    x=1,\n    y={\n        'z': 2,\n    },\n)\n", "c.py")
    assert config.lines == {"A": 1, "data": 2, "data.x": 3, "data.y": 4, "data.y.z": 5}
    with pytest.raises(UserError, match=r"^c\.py:4: wrong$"):
        config.refuse("data.y.unknown", "wrong")


SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(-1e30, 1e30) | st.text(max_size=20)
)


@given(
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    )
)
def test_a_literal_has_the_value_that_python_gives_it(value: Any) -> None:
    assert evaluate(f"A = {value!r}".encode(), "c.py").values["A"] == value


@given(st.text(alphabet="AB=()[]{}:,.+-*/%'\"\n 12dictforinlambda_", max_size=60))
def test_whatever_the_text_it_is_a_configuration_or_a_sentence(text: str) -> None:
    try:
        evaluate(text.encode(), "c.py")
    except UserError as error:
        sentence = str(error)
    else:
        sentence = "c.py is fine"
    assert sentence.startswith("c.py")
