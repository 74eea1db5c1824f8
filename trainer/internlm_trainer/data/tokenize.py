"""Tokenizing files that the user names, for `internlm tokenize`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from internlm_trainer.data.bin_format import BinWriter, write_bin
from internlm_trainer.data.progress import Report, TextProgress, silent
from internlm_trainer.data.text_files import SampleKind, samples_of
from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.storage import join, open_fs, user_errors

_KINDS: dict[str, SampleKind] = {"txt": "line", "json": "json", "jsonl": "jsonl"}
_BATCH_SAMPLES = 1024


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
    after it. sample: what one sample is; `auto` goes by the name: a line of `.txt`, a record of `.json`,
    a line of `.jsonl`, otherwise the file.  text_field: where a JSON record has its text.  raw: take a
    record's JSON text instead, and tokenize as InternLM's tool did, byte for byte.  Raises UserError for
    whatever is wrong with the files.
    """
    targets = _targets(inputs, out)
    sizes = {}
    for url in inputs:
        with user_errors(url, "input"):
            fs, path = open_fs(url)
            sizes[url] = int(fs.info(path)["size"] or 0)
    done = TextProgress("tokenize", 0, len(inputs), 0, sum(sizes.values()))
    written: list[TokenizedFile] = []
    for target, sources in targets.items():
        with write_bin(target) as writer:
            for source in sources:
                _tokenize_file(source, tokenizer, writer, _kind(source, sample), text_field, raw, threads)
                done = TextProgress(
                    done.stage,
                    done.files + 1,
                    done.total_files,
                    done.bytes + sizes[source],
                    done.total_bytes,
                    sum(file.tokens for file in written) + writer.tokens,
                )
                progress(done)
            if not writer.samples:
                raise UserError(f"{', '.join(sources)}: no text in it; give a file with text")
        written.append(TokenizedFile(target, writer.samples, writer.tokens))
    return written


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


def _tokenize_file(
    url: str,
    tokenizer: Tokenizer,
    writer: BinWriter,
    kind: SampleKind,
    text_field: str,
    raw: bool,
    threads: int,
) -> None:
    with user_errors(url, "input"):
        fs, path = open_fs(url)
        content: bytes = fs.cat_file(path)
    try:
        texts = list(samples_of(content, kind, url, text_field, raw))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{url}, line {line}: not UTF-8 text; convert the file, or leave it out") from error
    for start in range(0, len(texts), _BATCH_SAMPLES):
        batch = texts[start : start + _BATCH_SAMPLES]
        for ids in tokenizer.encode_many(batch, threads, exact=not raw):
            writer.write([tokenizer.bos, *ids])
