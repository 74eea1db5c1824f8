"""Tools that a model may call: a calculator, functions of the user's, and Python where it is switched on."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import math
import operator
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from internlm_trainer import sandbox
from internlm_trainer.chat.messages import INTERPRETER, Call, ToolSpec
from internlm_trainer.errors import UserError

_LONGEST_RESULT = 4000  # characters that a model gets to read
_LONGEST_EXPRESSION, _MOST_BITS, _MOST_DIGITS = 500, 4096, 1233  # so many digits have 4096 bits
_FIELD = "--tools"


def _power(base: int | float, power: int | float) -> Any:
    """Refused before it is made where it has too many digits: to make them may take minutes."""
    if isinstance(base, int) and (base.bit_length() - 1) * power > _MOST_BITS:
        raise ValueError("the result has too many digits")
    return base**power


def _round(number: int | float, digits: int | None = None) -> int | float:
    """`round`, which makes 10**-digits for a whole number, however large that is."""
    if digits is not None and abs(digits) > _MOST_DIGITS:
        raise ValueError(f"numbers are rounded to at most {_MOST_DIGITS} digits")
    return round(number, digits)


# Nothing here may take long on numbers of _MOST_BITS: while it runs, nothing else in the process does.
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(math, name) for name in ("sqrt", "exp", "log", "log2", "log10", "floor", "ceil")},
    **{
        name: getattr(math, name)
        for name in ("sin", "cos", "tan", "asin", "acos", "atan", "degrees", "radians")
    },
    "abs": abs,
    "round": _round,
    "min": min,
    "max": max,
}
_CONSTANTS = {"pi": math.pi, "e": math.e}


class Tool(NamedTuple):
    """A function of this process, and how a model is told of it."""

    spec: ToolSpec
    call: TypeAdapter[Any]
    """Checks arguments by the function's signature, then calls it."""

    @property
    def name(self) -> str:
        return str(self.spec["name"])


def tool_of(function: Callable[..., Any], name: str | None = None) -> Tool:
    """A tool of a function with type hints; its docstring says what it does.  Raises UserError for one without."""
    name = name or function.__name__
    if not (told := inspect.getdoc(function)):
        raise UserError(
            f"{_FIELD}: {name} has no docstring, by which the model knows what it is for; write one"
        )
    try:
        call: TypeAdapter[Any] = TypeAdapter(function)  # type: ignore[arg-type]  # it takes functions, too
        schema = call.json_schema()
    except PydanticUserError as error:
        raise UserError(
            f"{_FIELD}: {name} has parameters that no JSON is made for: {error.message}"
        ) from error
    if schema.get("type") != "object":
        raise UserError(f"{_FIELD}: {name} has parameters without names; give each a name and a type")
    for one in schema["properties"].values():
        one.pop("title", None)
    return Tool({"name": name, "description": told, "parameters": schema}, call)


def calculate(expression: str) -> int | float:
    """Evaluate an arithmetic expression such as `sqrt(2) * (3 + 4) ** 2`; knows pi, e and the common functions."""
    if len(expression) > _LONGEST_EXPRESSION:
        raise ValueError(f"the expression is longer than {_LONGEST_EXPRESSION} characters")
    try:
        tree = ast.parse(expression.strip().replace("^", "**"), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{expression!r} is no arithmetic expression") from error
    return _value(tree.body)


def _value(node: ast.expr) -> int | float:
    """The number that a node of an expression stands for; everything but numbers and arithmetic is refused."""
    match node:
        case ast.Constant(value=bool()):
            pass
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _bounded(_OPERATORS[type(op)](_value(operand)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _bounded(_OPERATORS[type(op)](_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _bounded(_FUNCTIONS[name](*map(_value, arguments)))
    raise ValueError(
        f"{ast.unparse(node)} is no arithmetic; give numbers, + - * / // % **, {', '.join(_FUNCTIONS)}"
    )


def _bounded(value: Any) -> int | float:
    if not isinstance(value, int | float):
        raise ValueError("the result is no real number")
    if abs(value) > 1 << _MOST_BITS and not math.isinf(value):
        raise ValueError("the result has too many digits")
    return value


def calculator(expression: str) -> int | float:
    """Evaluate an arithmetic expression such as `sqrt(2) * (3 + 4) ** 2`; knows pi, e and the common functions."""
    return calculate(expression)


def python(code: str) -> str:
    """Run Python code in a new process, without network; what it prints is the result."""
    return sandbox.run_python(code).output


def python_beside(code: str) -> str:
    """Run Python code in a new process; what it prints is the result."""
    return sandbox.run_python(code, isolated=False).output


CALCULATOR = tool_of(calculator)
PYTHON, PYTHON_BESIDE = tool_of(python, INTERPRETER), tool_of(python_beside, INTERPRETER)
"""Alone, or with network and beside other processes."""


def load_tools(given: str) -> list[Tool]:
    """The tools that `calculator`, `module:function`, `file.py:function` or a whole module or file stands for.

    Of a module or file those are the functions that it defines, without the ones that begin with an underscore.
    Raises UserError.
    """
    if given == CALCULATOR.name:
        return [CALCULATOR]
    where, _, name = given.partition(":")
    module = _module(where)
    if name:
        function = getattr(module, name, None)
        if not callable(function):
            raise UserError(f"{_FIELD}: {where} has no function {name}")
        return [tool_of(function)]
    found = [
        function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    ]
    if not found:
        raise UserError(f"{_FIELD}: {where} defines no functions; write one with type hints and a docstring")
    return [tool_of(one) for one in found]


def _module(where: str) -> ModuleType:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        path = Path(where)
        if not path.is_file():
            raise UserError(
                f"{_FIELD}: {where} is not there; give calculator, module:function or a Python file"
            )
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(
            path.stem, module
        )  # where type hints of the module's own classes are looked up
        spec.loader.exec_module(module)
        return module
    except ModuleNotFoundError as error:
        raise UserError(
            f"{_FIELD}: {where}: {error}; give calculator, module:function or a Python file"
        ) from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{_FIELD}: {where} does not load: {type(error).__name__}: {error}") from error


def run(tools: Mapping[str, Tool], call: Call) -> str:
    """What the model is told of its call: the result as JSON or text, or what was wrong with it."""
    tool = tools.get(call.name)
    if tool is None:
        return f"error: there is no tool {call.name!r}; there are {', '.join(tools) or 'none'}"
    try:
        # Strict: as the schema that the model was given has it, "3" is no integer.
        result = tool.call.validate_json(call.arguments, strict=True)
    except ValidationError as error:
        problems = (
            ": ".join(filter(None, (".".join(map(str, one["loc"])), one["msg"]))) for one in error.errors()
        )
        return f"error: the arguments do not fit: {'; '.join(problems)}"
    except Exception as error:  # of the user's function; the model may try something else
        return f"error: {type(error).__name__}: {error}"
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST_RESULT else text[:_LONGEST_RESULT] + " ... (cut)"
