"""Raw text: which files, and the samples in them."""

from __future__ import annotations

import io
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from internlm_trainer.errors import UserError
from internlm_trainer.storage import glob_regex, open_fs, user_errors

SampleKind = Literal["file", "line", "json", "jsonl", "parquet"]
"""A sample is a whole file, a line, a record of a JSON list, a line of JSON, or a row of a Parquet file."""


@dataclass(frozen=True)
class TextFile:
    """A file of text; `name` is its path below the pattern's fixed part, the same on every machine."""

    fs: Any
    path: str
    name: str
    size: int

    def read(self) -> bytes:
        """The whole content."""
        content: bytes = self.fs.cat_file(self.path)
        return content


def expand_variables(pattern: str, field: str, environment: Mapping[str, str] | None = None) -> str:
    """`${NAME}` replaced by the environment's value, and `${PYTHON_STDLIB}` by the folder of this
    Python's own sources.  Raises UserError for a variable that is not set.
    """
    known = {
        "PYTHON_STDLIB": sysconfig.get_path("stdlib"),
        **(os.environ if environment is None else environment),
    }

    def value(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise UserError(
                f"{field}: the environment variable {match[1]} is not set; set it or write the path out"
            )
        return known[match[1]]

    return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", value, pattern)


def find_files(
    patterns: Sequence[str], exclude: Sequence[str], field: str = "data.prepare"
) -> list[TextFile]:
    """The files that any of `patterns` matches and none of `exclude`, each once, sorted by name.

    A pattern that excludes a folder excludes all that is in it.  Raises UserError if a pattern matches
    nothing or nothing is left.
    """
    found: dict[str, TextFile] = {}
    for index, pattern in enumerate(patterns):
        where = f"{field}.text[{index}]"
        url = expand_variables(pattern, where)
        with user_errors(url, where):
            fs, path = open_fs(url)
            matches = fs.glob(path, detail=True)
            if not matches:
                raise UserError(f"{where}: {url} matches no file; correct the pattern")
            files = {name: info for name, info in matches.items() if info["type"] != "directory"}
            if not files:
                raise UserError(
                    f"{where}: {url} matches only folders; add /** or a file pattern such as /*.txt"
                )
        root = fixed_part(path)
        for name, info in files.items():
            short = name.removeprefix(root).lstrip("/")
            found.setdefault(name, TextFile(fs, name, short, int(info["size"])))
    left_out = [
        glob_regex(expand_variables(pattern, f"{field}.exclude[{index}]"))
        for index, pattern in enumerate(exclude)
    ]
    kept = [file for file in found.values() if not any(_matches(regex, file.path) for regex in left_out)]
    if not kept:
        raise UserError(
            f"{field}.exclude leaves out all {len(found)} files of {field}.text; correct its patterns"
        )
    return sorted(kept, key=lambda file: (file.name, file.path))


def fixed_part(path: str) -> str:
    """The folders of a pattern before the first one with a wildcard."""
    parts = path.split("/")
    fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts) - 1)
    return "/".join(parts[:fixed])


def _matches(regex: re.Pattern[str], path: str) -> bool:
    parts = path.split("/")
    return any(regex.match("/".join(parts[:end])) for end in range(1, len(parts) + 1))


class NotTextError(UserError):
    """A file that is not UTF-8."""


def samples_of(
    content: Iterable[bytes],
    kind: SampleKind,
    name: str,
    text_field: str = "text",
    raw: bool = False,
    first_line: int = 1,
) -> Iterator[str]:
    """The texts of the samples of a text file, or of its lines from number `first_line` on.

    content: the lines, each with its newline; an open binary file is such.  name: how errors call it.

    A line is stripped, and blank ones are no samples.  Of a JSON record the field `text_field` is taken;
    `raw` takes its JSON text instead, as InternLM's tokenizing tool does (a jsonl line then keeps its
    newline).  Raises NotTextError if it is not UTF-8 and UserError, with the line, if it is no such JSON.
    """
    if kind == "json":
        yield from json_samples(b"".join(content), name, text_field, raw)
        return
    if kind == "file":
        # Newlines stay what they are in a file that is one sample.
        if text := "".join(text for _, text in _decoded(content, name)):
            yield text
        return
    for number, line in _lines(content, name, first_line):
        if kind == "line":
            if stripped := line.strip():
                yield stripped
        elif raw:
            yield line
        elif line.strip():
            place = f"{name}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{place}: not JSON ({error}); correct it, or tokenize it as text") from error
            yield _text_of(record, place, text_field)


def _decoded(content: Iterable[bytes], name: str, first_line: int = 1) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(content, start=first_line):
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise NotTextError(
                f"{name}, line {number}: not UTF-8 text; convert the file, or leave it out"
            ) from error


def _lines(content: Iterable[bytes], name: str, first_line: int) -> Iterator[tuple[int, str]]:
    """Lines as Python reads a text file: `\\r\\n` and a single `\\r` end a line like `\\n`."""
    for number, line in _decoded(content, name, first_line):
        if "\r" not in line:
            yield number, line
        else:
            yield from ((number, part) for part in io.StringIO(line, newline=None))


def json_samples(content: bytes, name: str, text_field: str = "text", raw: bool = False) -> Iterator[str]:
    """The texts of a file that is a JSON list of records; as `samples_of` otherwise."""
    text = "".join(text for _, text in _decoded(io.BytesIO(content), name))
    try:
        records = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"{name}: not JSON ({error}); a file of one record a line must be named .jsonl"
        ) from error
    if not isinstance(records, list):
        raise UserError(
            f"{name}: a JSON file must hold a list of records; one record a line makes a .jsonl file"
        )
    for number, record in enumerate(records, start=1):
        yield json.dumps(record) if raw else _text_of(record, f"{name}, record {number}", text_field)


def _text_of(record: object, place: str, text_field: str) -> str:
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = (
            f"it has {', '.join(map(repr, record)) or 'none'}"
            if isinstance(record, dict)
            else "it is no object"
        )
        raise UserError(
            f"{place}: no text in the field {text_field!r} ({has}); name the field that holds the text"
        )
    return text
