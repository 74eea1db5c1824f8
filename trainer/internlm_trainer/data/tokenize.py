"""Tokenizing files that the user names, for `internlm tokenize`.

One process reads and writes, the others tokenize.  The chunks of all files go through in one order, and what they
become is written in that order, so the result does not depend on the number of processes; and a killed command goes on
where its journal ends (`partial_bin`).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from internlm_trainer.data.line_encoder import LineEncoder, Lines
from internlm_trainer.data.partial_bin import JOURNAL_SECONDS, PartialBin, finished
from internlm_trainer.data.progress import Report, TextProgress, silent
from internlm_trainer.data.text_chunks import Chunk, Position, read_chunks
from internlm_trainer.data.text_files import SampleKind, fixed_part
from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.storage import join, open_fs, stamp_of, user_errors

_KINDS: dict[str, SampleKind] = {"txt": "line", "json": "json", "jsonl": "jsonl", "parquet": "parquet"}
# Starting processes takes about a second: less text than this is done sooner without.
_POOL_BYTES = 4 << 20
_AHEAD = 4  # chunks in the making or to be written, for each process
_FORMAT = 1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedFile:
    """What became of one or several inputs; `made` now, or there before."""

    url: str
    samples: int
    tokens: int
    made: bool = True


@dataclass(frozen=True)
class Settings:
    """What a tokenized file depends on besides text and tokenizer.

    sample: what one sample is; `auto` goes by the name: a line of `.txt`, a record of `.json`, a line of `.jsonl`, a
    row of `.parquet`, otherwise the file.  text_field: where a record has its text.  raw: take a JSON record's own
    text instead, and tokenize as InternLM's tool did, byte for byte.  eos: end samples with `</s>`.
    """

    sample: Literal["auto"] | SampleKind = "auto"
    text_field: str = "text"
    raw: bool = False
    eos: bool = False


@dataclass(frozen=True)
class _Input:
    """A file to tokenize: its size, what changes when its content does, and its name in the output."""

    url: str
    kind: SampleKind
    size: int
    stamp: str
    name: str


def tokenize_files(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    out: str,
    settings: Settings | None = None,
    *,
    progress: Report = silent,
    workers: int = 1,
    journal_seconds: float = JOURNAL_SECONDS,
) -> list[TokenizedFile]:
    """Tokenize text files into `.bin` files with their metas.

    inputs: paths, URLs or patterns of them.  out: a `.bin` file for all of them, or a folder for a `.bin` for each,
    named after it (for a pattern with its folders from the first wildcard on).  Files of which nothing is left are
    left out, with a warning.  Raises UserError for whatever is wrong with the files.
    """
    settings = settings or Settings()
    found = _find(inputs, settings.sample)
    targets = _targets(found, out)
    meter = _Meter(progress, len(found), sum(file.size for file in found))
    done: list[TokenizedFile] = []
    with ExitStack() as stack:
        work = _Work(tokenizer, settings, journal_seconds, done, meter)
        stack.callback(work.close)
        encode = _encoder(tokenizer, settings, workers, meter.total_bytes, stack)
        try:
            for step, lines in _in_order(work.items(targets), encode, _AHEAD * workers):
                step(lines)
                meter.show()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that tokenizes was ended from outside, perhaps for want of memory; run the same command "
                "again, which goes on where this one ended, with fewer --workers if need be"
            ) from error
    meter.show()
    if not any(file.samples for file in done):
        raise UserError(f"{', '.join(file.url for file in found[:3])}: no text in it; give a file with text")
    return [file for file in done if file.samples]


_Step = Callable[[Lines | None], None]


class _Work:
    """What is to be done for each target, one after the other."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        settings: Settings,
        journal_seconds: float,
        done: list[TokenizedFile],
        meter: _Meter,
    ) -> None:
        self._settings, self._seconds, self._done, self._meter = settings, journal_seconds, done, meter
        self._made_by = {"format": _FORMAT, "tokenizer": tokenizer.digest, **vars(settings)}
        self._open: deque[PartialBin] = deque()

    def items(self, targets: Mapping[str, Sequence[_Input]]) -> Iterator[tuple[_Step, Chunk | None]]:
        """The chunks of all targets, each with what to do with its lines; and what to do between them."""
        for url, files in targets.items():
            sources = [{"path": file.url, "size": file.size, "stamp": file.stamp} for file in files]
            made_from = self._made_by | {"inputs": sources}
            if there := finished(url, made_from):
                yield self._skip(TokenizedFile(url, *there, made=False), files), None
                continue
            partial = PartialBin(url, made_from, self._seconds)
            self._open.append(partial)
            first, *start = partial.position or (0, 0, 0)
            if partial.position:
                log.info("%s: going on after %d samples", url, partial.samples)
            for number, file in enumerate(files):
                if number >= first:
                    position = Position(*start) if number == first else Position()
                    for chunk in read_chunks(
                        file.url, file.kind, position, self._settings.text_field, self._settings.raw
                    ):
                        yield self._add(partial, number, file, chunk), chunk
                yield self._count(file), None
            yield self._finish(partial), None

    def _skip(self, file: TokenizedFile, files: Sequence[_Input]) -> _Step:
        def step(_: Lines | None) -> None:
            self._done.append(file)
            for one in files:
                self._meter.end(one.size)

        return step

    def _add(self, partial: PartialBin, number: int, file: _Input, chunk: Chunk) -> _Step:
        def step(lines: Lines | None) -> None:
            assert lines is not None
            partial.add(lines, [number, *chunk.after])
            self._meter.add(int(chunk.share * file.size), int(lines.tokens.sum()))

        return step

    def _count(self, file: _Input) -> _Step:
        return lambda _: self._meter.end(file.size)

    def _finish(self, partial: PartialBin) -> _Step:
        def step(_: Lines | None) -> None:
            assert self._open.popleft() is partial
            if partial.samples:
                partial.finish()
            else:
                partial.discard()
                log.warning("%s is not written: there is no text for it", partial.url)
            self._done.append(TokenizedFile(partial.url, partial.samples, partial.tokens))

        return step

    def close(self) -> None:
        """Leave what is not finished so that the same command can go on with it."""
        for partial in self._open:
            if partial.samples:
                partial.save()
                partial.close()
            else:
                partial.discard()


def _in_order(
    items: Iterator[tuple[_Step, Chunk | None]], encode: Callable[[Chunk], Future[Lines]], ahead: int
) -> Iterator[tuple[_Step, Lines | None]]:
    """Each step with its chunk's lines, in order, while the next chunks are encoded.

    An error in reading is raised when everything before it has been given.
    """
    pending: deque[tuple[_Step, Future[Lines] | None]] = deque()
    error: Exception | None = None
    ended = False
    while pending or not ended:
        while not ended and len(pending) < ahead:
            try:
                step, chunk = next(items)
            except StopIteration:
                ended = True
            except Exception as caught:
                error, ended = caught, True
            else:
                pending.append((step, encode(chunk) if chunk else None))
        if pending:
            step, lines = pending.popleft()
            yield step, lines.result() if lines else None
    if error:
        raise error


# ---- processes that tokenize


_encoder_here: Callable[[Chunk], Lines]


def _encoder(
    tokenizer: Tokenizer, settings: Settings, workers: int, total_bytes: int, stack: ExitStack
) -> Callable[[Chunk], Future[Lines]]:
    """Encodes chunks in other processes, or at once in this one if there is little to do."""
    if workers == 1 or total_bytes < _POOL_BYTES:
        here = _chunk_encoder(tokenizer, settings, workers)

        def encode(chunk: Chunk) -> Future[Lines]:
            future: Future[Lines] = Future()
            try:
                future.set_result(here(chunk))
            except Exception as error:
                future.set_exception(error)
            return future

        return encode
    pool = stack.enter_context(
        ProcessPoolExecutor(
            workers,
            multiprocessing.get_context("spawn"),
            _start_worker,
            (tokenizer.model, tokenizer.name, settings),
        )
    )
    stack.callback(pool.shutdown, cancel_futures=True)
    return lambda chunk: pool.submit(_encode, chunk)


def _chunk_encoder(tokenizer: Tokenizer, settings: Settings, threads: int = 1) -> Callable[[Chunk], Lines]:
    encoder = LineEncoder(tokenizer, eos=settings.eos, exact=not settings.raw)
    return lambda chunk: encoder.encode(list(chunk.texts(settings.text_field, settings.raw)), threads)


def _start_worker(model: bytes, name: str, settings: Settings) -> None:
    global _encoder_here
    _encoder_here = _chunk_encoder(Tokenizer(model, name), settings)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(chunk: Chunk) -> Lines:
    return _encoder_here(chunk)


# ---- inputs and targets


class _Meter:
    """Counts what was done and reports it."""

    def __init__(self, progress: Report, total_files: int, total_bytes: int) -> None:
        self._progress = progress
        self.total_files, self.total_bytes = total_files, total_bytes
        self._files = self._before = self._bytes = self._tokens = 0

    def add(self, bytes_of_file: int, tokens: int) -> None:
        """So far that much of the file at hand was done; tokens were added."""
        self._bytes = self._before + bytes_of_file
        self._tokens += tokens

    def end(self, size: int) -> None:
        """A file of `size` bytes is done."""
        self._files += 1
        self._before += size
        self._bytes = self._before

    def show(self) -> None:
        self._progress(
            TextProgress(
                "tokenize", self._files, self.total_files, self._bytes, self.total_bytes, self._tokens
            )
        )


def _find(inputs: Sequence[str], sample: Literal["auto"] | SampleKind) -> list[_Input]:
    """The files, in the order in which they were given; those of a pattern by name."""
    if not inputs:
        raise UserError("give at least one file to tokenize")
    found: dict[str, _Input] = {}
    for url in inputs:
        with user_errors(url, "input"):
            fs, path = open_fs(url)
            pattern = any(sign in path for sign in "*?[") and not fs.exists(path)
            infos = fs.glob(path, detail=True) if pattern else {path: fs.info(path)}
            root = fixed_part(path) if pattern else path.rpartition("/")[0]
            files = {name: info for name, info in infos.items() if info["type"] != "directory"}
        if not files:
            told = "matches no file; correct the pattern" if pattern else "is a folder; give the files in it"
            raise UserError(f"input: {url} {told}")
        for name in sorted(files):
            info = files[name]
            full = fs.unstrip_protocol(name) if pattern and "://" in url else name if pattern else url
            kind = _kind(name) if sample == "auto" else sample
            short = name.removeprefix(root).lstrip("/")
            found.setdefault(full, _Input(full, kind, int(info["size"] or 0), stamp_of(info), short))
    return list(found.values())


def _targets(files: Sequence[_Input], out: str) -> dict[str, list[_Input]]:
    """The inputs of each `.bin`."""
    if out.endswith(".bin"):
        return {out: list(files)}
    targets: dict[str, list[_Input]] = {}
    for file in files:
        folder, _, name = file.name.rpartition("/")
        stem = name.rsplit(".", 1)[0] or name
        target = join(out, folder, f"{stem}.bin")
        if target in targets:
            raise UserError(
                f"{targets[target][0].url} and {file.url} would both become {target}; rename one of them"
            )
        targets[target] = [file]
    return targets


def _kind(name: str) -> SampleKind:
    return _KINDS.get(name.rsplit(".", 1)[-1].lower(), "file")
