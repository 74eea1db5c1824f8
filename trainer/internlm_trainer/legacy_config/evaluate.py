"""The values of a configuration that is written in Python, found without running it.

The file is parsed, and a small evaluator computes what configurations consist of: assignments of literals,
arithmetic, names that are known by then, dicts, lists and f-strings.  Everything else (imports, loops, functions,
attributes, calls) is refused with its line: a configuration is data, and reading it must not do anything.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any, NoReturn

from internlm_trainer.errors import UserError

ALLOWED = (
    "a configuration may hold assignments to names of literals, arithmetic, comparisons, names assigned above, "
    "dicts, lists, tuples, f-strings, conditional expressions, and calls of dict, int, float, str, bool, round, abs, "
    "min, max and of a text's join"
)
MAX_BYTES = 1 << 20
MAX_DEPTH = 100
MAX_ITEMS = 100_000
MAX_NUMBER = 2.0**127  # no configuration needs more, and a power could take all memory and time

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "round": round,
    "abs": abs,
    "min": min,
    "max": max,
}


class Config:
    """A configuration's values by name, and where each of them stands.

    `values`: None, booleans, numbers, strings, lists, tuples and dicts.  `lines`: the line of each name and of each
    dict's keys, by a path such as `data.micro_num`.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self.values: dict[str, Any] = {}
        self.lines: dict[str, int] = {}

    def refuse(self, path: str, sentence: str) -> NoReturn:
        """Raise UserError about a value, with its place."""
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        place = f"{self.file}:{self.lines[path]}" if path else self.file
        raise UserError(f"{place}: {sentence}")


def evaluate(source: bytes, file: str) -> Config:
    """The configuration in `source`; `file` is its name in errors.

    Raises UserError with file and line for anything but the few things that `ALLOWED` names.
    """
    if len(source) > MAX_BYTES:
        raise UserError(f"{file}: has {len(source)} bytes; a configuration has at most {MAX_BYTES}")
    try:
        tree = ast.parse(source, file)
    except SyntaxError as error:
        raise UserError(f"{file}:{error.lineno or 1}: is not Python: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{file}: is not a configuration in Python: {error or 'too deeply nested'}"
        ) from error
    return _Evaluator(file).run(tree)


class _Evaluator:
    def __init__(self, file: str) -> None:
        self._config = Config(file)
        self._names = self._config.values
        self._depth = 0

    def run(self, tree: ast.Module) -> Config:
        for statement in tree.body:
            match statement:
                case ast.Expr(ast.Constant(str())):  # a comment in quotes
                    pass
                case ast.Assign(targets, value) if all(isinstance(target, ast.Name) for target in targets):
                    for target in targets:
                        assert isinstance(target, ast.Name)
                        self._assign(target.id, value)
                case ast.AnnAssign(ast.Name(name), _, ast.expr() as value):
                    self._assign(name, value)
                case _:
                    raise self._refusal(statement, _describe(statement))
        return self._config

    def _assign(self, name: str, node: ast.expr) -> None:
        self._names[name] = self._value(node)
        lines = self._config.lines
        for path in [path for path in lines if path.startswith(f"{name}.")]:
            del lines[path]  # of the value that stood there before
        self._note_lines(name, node)

    def _note_lines(self, path: str, node: ast.expr) -> None:
        self._config.lines[path] = node.lineno
        match node:
            case ast.Call(ast.Name("dict"), _, keywords):
                entries: list[tuple[Any, ast.expr]] = [(keyword.arg, keyword.value) for keyword in keywords]
            case ast.Dict(keys, values):
                entries = [
                    (key.value if isinstance(key, ast.Constant) else None, value)
                    for key, value in zip(keys, values, strict=True)
                ]
            case _:
                return
        for key, value in entries:
            if isinstance(key, str):
                self._note_lines(f"{path}.{key}", value)

    def _value(self, node: ast.expr) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._refusal(node, f"is nested more than {MAX_DEPTH} deep")
        try:
            return self._bounded(node, self._compute(node))
        except UserError:
            raise
        except (ArithmeticError, TypeError, ValueError, LookupError) as error:
            raise self._refusal(node, f"has no value: {type(error).__name__}: {error}") from error
        finally:
            self._depth -= 1

    def _compute(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(None | bool() | int() | float() | str() as value):
                return value
            case ast.Name(name):
                if name not in self._names:
                    raise self._refusal(node, f"the name {name} is not assigned above")
                return self._names[name]
            case ast.List(items):
                return [self._value(item) for item in items]
            case ast.Tuple(items):
                return tuple(self._value(item) for item in items)
            case ast.Dict(keys, values) if all(key is not None for key in keys):
                return {
                    self._value(key): self._value(value)
                    for key, value in zip(keys, values, strict=True)
                    if key
                }
            case ast.Call(ast.Name(function), arguments, keywords):
                return self._call(node, function, arguments, keywords)
            case ast.Call(ast.Attribute(ast.Constant(str() as text), "join"), [items], []):
                return self._join(items, text, self._value(items))
            case ast.BinOp(left, op, right) if type(op) in _BINARY:
                return self._binary(node, op, self._value(left), self._value(right))
            case ast.UnaryOp(op, operand) if type(op) in _UNARY:
                return _UNARY[type(op)](self._value(operand))
            case ast.BoolOp(op, operands):
                return self._boolean(op, operands)
            case ast.Compare(left, ops, others):
                return self._compare(left, ops, others)
            case ast.IfExp(test, body, other):
                return self._value(body if self._value(test) else other)
            case ast.Subscript(value, ast.expr() as index) if not isinstance(index, ast.Slice):
                return self._value(value)[self._value(index)]
            case ast.JoinedStr(parts):
                return self._join(node, "", [self._text(part) for part in parts])
            case _:
                raise self._refusal(node, _describe(node))

    def _call(
        self, node: ast.expr, function: str, arguments: list[ast.expr], keywords: list[ast.keyword]
    ) -> Any:
        named = {keyword.arg: self._value(keyword.value) for keyword in keywords}
        known = function == "dict" or function in _CALLS
        if not known or function in self._names or None in named or (function != "dict" and named):
            raise self._refusal(node, f"calls {function} in a way that is not understood")
        values = [self._value(argument) for argument in arguments]
        if function == "dict":
            return {**dict(*values), **named}
        return _CALLS[function](*(self._scalar(node, value) for value in values))

    def _binary(self, node: ast.expr, op: ast.operator, left: Any, right: Any) -> Any:
        if isinstance(left, (int, float)) and isinstance(right, (int, float)):
            if isinstance(op, ast.Pow) and (abs(left) > MAX_NUMBER or abs(right) > 127):
                raise self._refusal(node, "is too large a power")
            return _BINARY[type(op)](left, right)
        if isinstance(op, ast.Add) and type(left) is type(right) and isinstance(left, (str, list, tuple)):
            return left + right
        raise self._refusal(node, "computes with what are no numbers")

    def _boolean(self, op: ast.boolop, operands: list[ast.expr]) -> Any:
        value: Any = None
        for operand in operands:
            value = self._value(operand)
            if bool(value) is isinstance(op, ast.Or):
                break
        return value

    def _compare(self, left: ast.expr, ops: list[ast.cmpop], others: list[ast.expr]) -> bool:
        value = self._scalar(left, self._value(left))
        for op, other in zip(ops, others, strict=True):
            following = self._value(other)
            within = isinstance(op, (ast.In, ast.NotIn)) and isinstance(following, (list, tuple, dict))
            for one in following if within else [following]:
                self._scalar(other, one)
            if not _COMPARE[type(op)](value, following):
                return False
            value = following
        return True

    def _text(self, part: ast.expr) -> str:
        match part:
            case ast.Constant(str() as text):
                return text
            case ast.FormattedValue(value, -1, None):
                return str(self._scalar(value, self._value(value)))
            case _:
                raise self._refusal(part, "is an f-string with a format")

    def _join(self, node: ast.expr, separator: str, parts: list[str]) -> str:
        text = ""
        for number, part in enumerate(parts):
            text = self._bounded(node, text + (separator if number else "") + part)
        return text

    def _bounded(self, node: ast.expr, value: Any) -> Any:
        """Refuse values that no configuration needs: reading one must take neither memory nor time."""
        if isinstance(value, complex) or (isinstance(value, (int, float)) and not abs(value) <= MAX_NUMBER):
            raise self._refusal(node, "is too large a number, or none")
        if isinstance(value, (str, list, tuple, dict)) and len(value) > MAX_ITEMS:
            raise self._refusal(node, "is too long")
        return value

    def _scalar(self, node: ast.expr, value: Any) -> Any:
        """Refuse lists where they could only do harm: few lines can nest them so deep that no end is in sight."""
        if isinstance(value, (list, tuple, dict)):
            raise self._refusal(node, "is a list or a dict where a number or a string must be")
        return value

    def _refusal(self, node: ast.AST, what: str) -> UserError:
        return UserError(f"{self._config.file}:{getattr(node, 'lineno', 1)}: {what}; {ALLOWED}")


_WORDS = {
    ast.Import: "imports a module",
    ast.ImportFrom: "imports from a module",
    ast.FunctionDef: "defines a function",
    ast.ClassDef: "defines a class",
    ast.For: "is a loop",
    ast.While: "is a loop",
    ast.If: "is an if statement",
    ast.With: "is a with statement",
    ast.Try: "is a try statement",
    ast.Delete: "deletes a name",
    ast.Assert: "is an assertion",
    ast.Assign: "assigns to something that is no name",
    ast.AnnAssign: "declares without a value, or assigns to something that is no name",
    ast.AugAssign: "changes a name in place",
    ast.Attribute: "reads an attribute",
    ast.Lambda: "is a function",
    ast.ListComp: "is a comprehension",
    ast.DictComp: "is a comprehension",
    ast.SetComp: "is a comprehension",
    ast.GeneratorExp: "is a comprehension",
    ast.Call: "calls something that is no name",
    ast.Starred: "unpacks a list",
    ast.Dict: "unpacks a dict",
    ast.Subscript: "takes a slice",
}


def _describe(node: ast.AST) -> str:
    return _WORDS.get(type(node), f"has a Python construct ({type(node).__name__}) that is not understood")
