"""Finding and reading the files of a task, as their publishers lay them out: csv, json, jsonl and Parquet."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from internlm_trainer.errors import UserError
from internlm_trainer.storage import open_fs, user_errors

Record = Mapping[str, Any]

_SPLITS = {
    "test": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "dev",
    "train": "train",
}
_WORDS = "|".join(sorted(_SPLITS, key=len, reverse=True))
_NAMED = re.compile(rf"(?:(?P<subject>.*)[-_.])?(?P<split>{_WORDS})", re.IGNORECASE)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
# Folders that say nothing of what is in them.
_PLAIN = {"data", "v1", "v1_1"}
# Where a set is published in several forms, the first of these is read.
_KINDS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".csv")
# MMLU's files have no header.
_COLUMNS = ["question", "A", "B", "C", "D", "answer"]


class Part(NamedTuple):
    """What a file's name tells: which split and subject it is of, and its kind."""

    split: str
    """`test`, `validation`, `dev`, `train`, or nothing where there is only one."""
    subject: str
    kind: str


def part_of(name: str) -> Part | None:
    """What a path relative to the task's folder tells; None for a file of another kind."""
    path = PurePosixPath(name)
    kind = next((one for one in _KINDS if path.name.endswith(one)), None)
    if kind is None:
        return None
    stem = _SHARD.sub("", path.name.removesuffix(kind))
    folders = [folder for folder in reversed(path.parts[:-1]) if folder.lower() not in _PLAIN]
    above = next((folder for folder in folders if folder.lower() not in _SPLITS), "")
    if found := _NAMED.fullmatch(stem):
        return Part(_SPLITS[found["split"].lower()], found["subject"] or above, kind)
    split = next((_SPLITS[folder.lower()] for folder in folders if folder.lower() in _SPLITS), "")
    return Part(split, stem, kind)


class RecordFile(NamedTuple):
    """A file of a task."""

    url: str
    part: Part

    def records(self) -> list[Record]:
        """All of its records.  Raises UserError for what cannot be read as what its name says."""
        fs, path = open_fs(self.url)
        with user_errors(self.url, "the file"):
            content: bytes = fs.cat_file(path)
        try:
            return _parsed(content, self.part.kind)
        except (ValueError, OSError, EOFError, csv.Error) as error:
            raise UserError(f"{self.url}: cannot be read as {self.part.kind[1:]}: {error}") from error


def find(url: str) -> list[RecordFile]:
    """The files below a folder (path or URL), sorted; of one that is there in several kinds, one.

    Raises UserError for a folder that is not there or holds none.
    """
    fs, root = open_fs(url)
    with user_errors(url, "--data"):
        paths = sorted(fs.find(root))
    best: dict[tuple[str, str], int] = {}
    found = []
    for path in paths:
        part = part_of(path.removeprefix(root).lstrip("/"))
        if part:
            found.append(RecordFile(fs.unstrip_protocol(path), part))
            known = best.setdefault(part[:2], len(_KINDS))
            best[part[:2]] = min(known, _KINDS.index(part.kind))
    if not found:
        raise UserError(f"--data: {url} holds no {', '.join(kind[1:] for kind in _KINDS)} files")
    return [file for file in found if _KINDS.index(file.part.kind) == best[file.part[:2]]]


def read(url: str, what: str) -> list[Record]:
    """The records of one file.  Raises UserError, which begins with `what` for a file of no known kind."""
    part = part_of(url)
    if part is None:
        raise UserError(
            f"{what}: {url} is none of {', '.join(kind[1:] for kind in _KINDS)}; rename or convert it"
        )
    return RecordFile(url, part).records()


def texts(pattern: str) -> list[str]:
    """The texts that a path, URL or pattern names: the field `text` of records, otherwise a whole file is one.

    Raises UserError for a pattern that matches nothing, and for a file or a record without a text.
    """
    fs, path = open_fs(pattern)
    with user_errors(pattern, "--text"):
        paths = sorted(
            name for name, info in fs.glob(path, detail=True).items() if info["type"] != "directory"
        )
    if not paths:
        raise UserError(f"--text: {pattern} matches no file; correct it")
    return [text for name in paths for text in _texts(fs.unstrip_protocol(name), name)]


def _texts(url: str, name: str) -> list[str]:
    part = part_of(name)
    if part and part.kind != ".csv":
        records = RecordFile(url, part).records()
        found = [record.get("text") for record in records]
        if wrong := [number for number, text in enumerate(found, start=1) if not isinstance(text, str)]:
            raise UserError(f"--text: {url}, record {wrong[0]}: has no text in the field 'text'")
        return [text for text in found if isinstance(text, str) and text]
    fs, path = open_fs(url)
    with user_errors(url, "--text"):
        try:
            text: str = fs.cat_file(path).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"--text: {url} is not UTF-8 text; convert it") from error
    return [text] if text else []


def _parsed(content: bytes, kind: str) -> list[Record]:
    if kind == ".parquet":
        import pyarrow.parquet

        rows: list[Record] = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
        return rows
    if kind.endswith(".gz"):
        content = gzip.decompress(content)
    text = content.decode("utf-8-sig")
    if kind == ".csv":
        return _table(text)
    if kind == ".json":
        found = json.loads(text)
    else:
        found = [json.loads(line) for line in text.split("\n") if line.strip()]
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError("it is no list of objects")
    return found


def _table(text: str) -> list[Record]:
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    # Column names are written in any case; A to D are the choices.
    header = [cell if len(cell) == 1 else cell.strip().lower() for cell in rows[0]] if rows else []
    if "question" not in header:
        header, rows = _COLUMNS, [[], *rows]
    if wrong := [number for number, row in enumerate(rows[1:], start=1) if len(row) != len(header)]:
        raise ValueError(f"record {wrong[0]} has {len(rows[wrong[0]])} columns, not {len(header)}")
    return [dict(zip(header, row, strict=True)) for row in rows[1:]]
