"""Files of text in pieces that can be tokenized apart from each other, from any piece on.

A chunk holds whole samples and says where the next one begins, so that whoever has written down how far it came
can go on there: at a byte of a file of lines, at a record of a JSON list, at a row of a Parquet file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from internlm_trainer.data.text_files import SampleKind, json_samples, samples_of
from internlm_trainer.errors import UserError
from internlm_trainer.storage import open_fs, user_errors

CHUNK_BYTES = 512 << 10
"""Text of a chunk: some tenths of a second of tokenizing, so that passing it on costs nothing."""


class Position(NamedTuple):
    """Where a chunk begins: the byte, for files of lines, and how many lines, records or rows come before."""

    byte: int = 0
    item: int = 0


@dataclass(frozen=True)
class Chunk:
    """Samples that follow each other in the file `name`: its bytes, or texts where they had to be parsed."""

    name: str
    kind: SampleKind
    content: bytes | list[str]
    start: Position
    after: Position
    share: float
    """How much of the file lies before `after`, in [0, 1]."""

    def texts(self, text_field: str, raw: bool) -> Iterator[str]:
        """The samples' texts.  Raises UserError, with the line, if they cannot be read."""
        if isinstance(self.content, list):
            return iter(self.content)
        return samples_of(
            io.BytesIO(self.content), self.kind, self.name, text_field, raw, first_line=self.start.item + 1
        )


def read_chunks(url: str, kind: SampleKind, start: Position, text_field: str, raw: bool) -> Iterator[Chunk]:
    """The chunks of a file from `start` on.  Raises UserError if it cannot be read."""
    with user_errors(url, "input"):
        fs, path = open_fs(url)
        with fs.open(path, "rb") as file:
            if kind == "parquet":
                yield from _parquet(file, url, start, text_field, raw)
            elif kind in ("line", "jsonl"):
                yield from _lines(file, url, kind, start, int(fs.size(path) or 0))
            elif kind == "json":
                yield from _json(file, url, start, text_field, raw)
            elif start == Position():
                # One sample: nothing can be left of it.
                content = file.read()
                yield Chunk(url, kind, content, start, Position(len(content), 1), 1.0)


def _lines(file: Any, url: str, kind: SampleKind, start: Position, size: int) -> Iterator[Chunk]:
    file.seek(start.byte)
    while content := file.read(CHUNK_BYTES):
        if not content.endswith(b"\n"):
            content += file.readline()
        after = Position(start.byte + len(content), start.item + content.count(b"\n"))
        yield Chunk(url, kind, content, start, after, after.byte / max(size, after.byte))
        start = after


def _json(file: Any, url: str, start: Position, text_field: str, raw: bool) -> Iterator[Chunk]:
    texts = list(json_samples(file.read(), url, text_field, raw))
    yield from _parsed(iter([texts[start.item :]]), url, "json", start, len(texts))


def _parquet(file: Any, url: str, start: Position, text_field: str, raw: bool) -> Iterator[Chunk]:
    """One row group at a time, of which only the text's column is read."""
    import pyarrow.parquet

    if raw:
        raise UserError(f"{url}: InternLM's tool reads no Parquet; leave out --raw")
    with _arrow_errors(url):
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
        names = table.schema_arrow.names
        if text_field not in names:
            raise UserError(
                f"{url}: no column {text_field!r} (it has {', '.join(map(repr, names))}); name the column that "
                "holds the text"
            )
        kept = table.schema_arrow.field(text_field).type
        if not (pyarrow.types.is_string(kept) or pyarrow.types.is_large_string(kept)):
            raise UserError(
                f"{url}: the column {text_field!r} holds {kept}, not strings; name the one with text"
            )
    yield from _parsed(
        _parquet_texts(table, url, start.item, text_field), url, "parquet", start, table.metadata.num_rows
    )


def _parquet_texts(table: Any, url: str, first: int, text_field: str) -> Iterator[list[str]]:
    """The texts from row `first` on, some hundred at a time."""
    row = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if row + rows <= first:
            row += rows
            continue
        with _arrow_errors(url):
            for batch in table.iter_batches(256, row_groups=[group], columns=[text_field], use_threads=False):
                texts = batch.column(0).to_pylist()
                if None in texts:
                    raise UserError(
                        f"{url}, row {row + texts.index(None) + 1}: the text is missing (null); remove such rows"
                    )
                yield texts[max(first - row, 0) :]
                row += len(texts)


@contextmanager
def _arrow_errors(url: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        # Arrow says OSError of a page that does not decompress; a store's errors have a number or a cause.
        if isinstance(error, OSError) and (error.errno is not None or error.__cause__):
            raise
        raise UserError(
            f"{url}: no whole Parquet file ({str(error).splitlines()[0]}); write or copy it again"
        ) from error


def _parsed(
    batches: Iterator[list[str]], url: str, kind: SampleKind, start: Position, total: int
) -> Iterator[Chunk]:
    texts: list[str] = []
    characters = 0
    for batch in batches:
        for text in batch:
            texts.append(text)
            characters += len(text)
            if characters >= CHUNK_BYTES:
                after = Position(0, start.item + len(texts))
                yield Chunk(url, kind, texts, start, after, after.item / total)
                start, texts, characters = after, [], 0
    if texts:
        yield Chunk(url, kind, texts, start, Position(0, start.item + len(texts)), 1.0)
