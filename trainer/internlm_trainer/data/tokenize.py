"""Tokenizing files that the user names, for `internlm tokenize`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from internlm_trainer.data.bin_format import write_bin
from internlm_trainer.data.progress import Report, TextProgress, silent
from internlm_trainer.data.text_files import SampleKind, samples_of
from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.storage import join, open_fs, user_errors

_KINDS: dict[str, SampleKind] = {"txt": "line", "json": "json", "jsonl": "jsonl"}
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class TokenizedFile:
    """What became of one or several inputs."""

    url: str
    samples: int
    tokens: int


def tokenize_files(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    out: str,
    *,
    text_field: str = "text",
    sample: Literal["auto"] | SampleKind = "auto",
    raw: bool = False,
    progress: Report = silent,
    threads: int = 2,
) -> list[TokenizedFile]:
    """Tokenize text files into `.bin` files with their metas.

    inputs: paths or URLs.  out: a `.bin` file for all of them, or a folder for a `.bin` for each, named
    after it.  sample: what one sample is; `auto` goes by the name: a line of `.txt`, a record of `.json`,
    a line of `.jsonl`, otherwise the file.  text_field: where a JSON record has its text.  raw: take a
    record's JSON text instead, and tokenize as InternLM's tool did, byte for byte.  Raises UserError for
    whatever is wrong with the files.
    """
    targets = _targets(inputs, out)
    meter = _Meter(progress, inputs)
    written: list[TokenizedFile] = []
    for target, sources in targets.items():
        with write_bin(target) as writer:
            for source in sources:
                texts = _texts(source, _kind(source, sample), text_field, raw, meter)
                for batch in _batches(texts):
                    for ids in tokenizer.encode_many(batch, threads, exact=not raw):
                        writer.write([tokenizer.bos, *ids])
                        meter.tokens += len(ids) + 1
                    meter.show()
                meter.files += 1
            if not writer.samples:
                raise UserError(f"{', '.join(sources)}: no text in it; give a file with text")
        written.append(TokenizedFile(target, writer.samples, writer.tokens))
    meter.show()
    return written


class _Meter:
    """Counts what was done and reports it."""

    def __init__(self, progress: Report, inputs: Sequence[str]) -> None:
        self._progress = progress
        self._total_files, self._total_bytes = len(inputs), 0
        self.files = self.bytes = self.tokens = 0
        for url in inputs:
            with user_errors(url, "input"):
                fs, path = open_fs(url)
                if fs.isdir(path):
                    raise UserError(f"input: {url} is a folder; give the files in it")
                self._total_bytes += int(fs.size(path) or 0)

    def show(self) -> None:
        self._progress(
            TextProgress(
                "tokenize", self.files, self._total_files, self.bytes, self._total_bytes, self.tokens
            )
        )


def _texts(url: str, kind: SampleKind, text_field: str, raw: bool, meter: _Meter) -> Iterator[str]:
    """The samples of a file, read as they are needed: a corpus may be larger than the memory."""
    with user_errors(url, "input"):
        fs, path = open_fs(url)
        with fs.open(path, "rb") as file:
            yield from samples_of(_counted(file, meter), kind, url, text_field, raw)


def _counted(lines: Iterable[bytes], meter: _Meter) -> Iterator[bytes]:
    for line in lines:
        meter.bytes += len(line)
        yield line


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts to encode at once: enough to keep the threads busy."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _targets(inputs: Sequence[str], out: str) -> dict[str, list[str]]:
    """The inputs of each `.bin`."""
    if not inputs:
        raise UserError("give at least one file to tokenize")
    if out.endswith(".bin"):
        return {out: list(inputs)}
    targets: dict[str, list[str]] = {}
    for url in inputs:
        name = url.rstrip("/").rsplit("/", 1)[-1]
        stem = name.rsplit(".", 1)[0] or name
        target = join(out, f"{stem}.bin")
        if target in targets:
            raise UserError(f"{targets[target][0]} and {url} would both become {target}; rename one of them")
        targets[target] = [url]
    return targets


def _kind(url: str, sample: Literal["auto"] | SampleKind) -> SampleKind:
    return _KINDS.get(url.rsplit(".", 1)[-1].lower(), "file") if sample == "auto" else sample
