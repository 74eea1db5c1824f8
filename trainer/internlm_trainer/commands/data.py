"""`internlm tokenize` and `internlm data`: text to training data, and what is in it and was taken of it."""

from __future__ import annotations

import json
import logging
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from internlm_trainer.commands.common import bar, sentences, show, store_errors
from internlm_trainer.errors import EXIT_USER_ERROR, UserError

if TYPE_CHECKING:
    from internlm_trainer.checkpoint.format import Manifest
    from internlm_trainer.data.inspect import Inspection
    from internlm_trainer.data.tokenizer import Tokenizer

app = typer.Typer(help="Tokenized data: what it holds, and what a job has taken of it.", no_args_is_help=True)
_SHOWN = 20  # broken lines
_BAR = 40


class Sample(StrEnum):
    """What a training sample is."""

    auto = "auto"
    file = "file"
    line = "line"
    json = "json"
    jsonl = "jsonl"
    parquet = "parquet"


@sentences
def tokenize(
    inputs: Annotated[list[str], typer.Argument(help="Text files or URLs; * and ** are expanded.")],
    tokenizer: Annotated[str, typer.Option(help="SentencePiece model (path or URL).")],
    output: Annotated[str, typer.Option("--out", help="A .bin file for all, or a folder for one .bin each.")],
    sample: Annotated[
        Sample, typer.Option(help="What a sample is; auto: by the file's ending.")
    ] = Sample.auto,
    text_field: Annotated[
        str, typer.Option(help="Field or column of a record that holds the text.")
    ] = "text",
    raw: Annotated[
        bool, typer.Option("--raw", help="Tokenize a record's raw JSON text, as InternLM's tool does.")
    ] = False,
    eos: Annotated[bool, typer.Option("--eos", help="End each sample with </s>.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one a core.")] = 0,
) -> None:
    """Turn text into InternLM's .bin and .bin.meta files.

    Run it again after an interruption: it goes on where it was.
    """
    from internlm_trainer import machine
    from internlm_trainer.data.progress import shown_progress
    from internlm_trainer.data.tokenize import Settings, tokenize_files
    from internlm_trainer.data.tokenizer import load_tokenizer

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with shown_progress() as progress:
        made = tokenize_files(
            inputs,
            load_tokenizer(tokenizer, "--tokenizer"),
            output,
            Settings(sample.value, text_field, raw, eos),
            progress=progress,
            workers=workers or machine.cores(),
        )
    for file in made:
        note = "" if file.made else " (was there already)"
        typer.echo(f"{file.url}: {file.samples:,} samples, {file.tokens:,} tokens{note}")


@app.command("inspect")
@sentences
def inspect_data(
    path: Annotated[str, typer.Argument(help="Folder or URL of .bin files, or one of them.")],
    tokenizer: Annotated[str, typer.Option(help="SentencePiece model: decode samples, check ids.")] = "",
    samples: Annotated[int, typer.Option(min=0, help="Samples to show.")] = 3,
    full: Annotated[bool, typer.Option("--full", help="Check every line, not a few of each file.")] = False,
) -> None:
    """Show sources, files, samples, tokens and lengths, some samples, and what is broken (exit code 65)."""
    from internlm_trainer.data.inspect import inspect
    from internlm_trainer.data.progress import shown_progress
    from internlm_trainer.data.tokenizer import load_tokenizer

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = load_tokenizer(tokenizer, "--tokenizer") if tokenizer else None
    with shown_progress() as progress:
        found = inspect(
            path,
            full=full,
            examples=samples,
            vocab_size=model.vocab_size if model else None,
            progress=progress,
        )
    _show(found, model)
    if found.broken:
        for sentence in found.broken[:_SHOWN]:
            typer.echo(f"error: {sentence}", err=True)
        if len(found.broken) > _SHOWN:
            typer.echo(f"and {len(found.broken) - _SHOWN} more", err=True)
        raise typer.Exit(EXIT_USER_ERROR)


def _show(found: Inspection, tokenizer: Tokenizer | None) -> None:
    table = Table("source", "files", "samples", "tokens", "bytes", "shortest", "mean", "longest")
    for column in table.columns[1:]:
        column.justify = "right"
    for group in found.groups:
        mean = group.tokens / max(group.samples, 1)
        numbers = (group.files, group.samples, group.tokens, group.bytes, group.shortest, mean, group.longest)
        table.add_row(group.name, *(f"{number:,.0f}" for number in numbers))
    show(table)
    typer.echo(f"{found.tokens:,} tokens in {found.samples:,} samples; {found.checked:,} lines checked")
    most = max(found.histogram, default=0)
    for power, count in enumerate(found.histogram):
        drawn = "\u2588" * -(-count * _BAR // most)
        typer.echo(f"{2**power:>10,} tokens and more {drawn} {count:,}")
    for place, ids in found.examples:
        text = repr(tokenizer.decode(abs(ids).tolist())) if tokenizer else str(ids.tolist())
        typer.echo(f"{typer.style(place, bold=True)} ({len(ids):,} tokens): {text[:500]}")


def _manifest(url: str) -> Manifest:
    """The manifest of a step's folder, or of the newest one in a job's folder."""
    from internlm_trainer.checkpoint import open_checkpoint
    from internlm_trainer.checkpoint.load import stored_steps
    from internlm_trainer.checkpoint.tools import locate

    with store_errors():
        folder, asked = locate(url)
        steps = [step for step in stored_steps(folder)[0] if asked in (None, step)]
        if steps:
            return open_checkpoint(folder, steps[-1]).manifest
    raise UserError(
        f"{url}: no finished checkpoint there; give a job's checkpoint.path or a step's folder in it"
    )


@app.command()
@sentences
def ledger(
    checkpoint: Annotated[
        str, typer.Argument(help="checkpoint.path of a job (the newest one), or a step's folder.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a job had taken of each of its sources when a checkpoint was written."""
    from internlm_trainer.data.ledger import entries

    manifest = _manifest(checkpoint)
    accounts = entries(manifest.state["loader"])
    if as_json:
        typer.echo(
            json.dumps({"step": manifest.step, "sources": [entry._asdict() for entry in accounts]}, indent=1)
        )
        return
    table = Table("source", "weight", "rows", "tokens", "skipped rows", "epochs", "row of epoch")
    for column in table.columns[1:]:
        column.justify = "right"
    for entry in accounts:
        at = "" if entry.row is None else f"{entry.row:,} of {entry.rows_of_epoch:,}"
        epoch = "" if entry.epoch is None else str(entry.epoch)
        numbers = (f"{entry.rows:,}", f"{entry.tokens:,}", f"{entry.skipped_rows:,}")
        table.add_row(entry.path, f"{entry.weight:g}", *numbers, epoch, at)
    typer.echo(f"after step {manifest.step:,} of job {manifest.job}:")
    show(table)


@app.command()
@sentences
def chat(
    file: Annotated[
        str,
        typer.Argument(
            help="Conversations, a record each (jsonl, json or parquet; path or URL).", show_default=False
        ),
    ],
    tokenizer: Annotated[str, typer.Option(help="SentencePiece model, path or URL.", show_default=False)],
    out: Annotated[str, typer.Option(help="The .bin file to write.", show_default=False)],
) -> None:
    """Make data for supervised fine-tuning: conversations of which the answers are learned.

    A record has messages, a list of role and content, or instruction, input and output.
    """
    from internlm_trainer.chat.messages import form_of
    from internlm_trainer.chat.samples import messages_of, sample_of
    from internlm_trainer.data.bin_format import write_bin
    from internlm_trainer.data.tokenizer import load_tokenizer
    from internlm_trainer.evaluation.records import read

    if not out.endswith(".bin"):
        raise UserError(f"--out: {out} must end with .bin")
    words = load_tokenizer(tokenizer, "--tokenizer")
    form = form_of(words)
    records = read(file, "FILE")
    with write_bin(out, "--out") as writer, bar("tokenizing", len(records)) as advance:
        for number, record in enumerate(records, start=1):
            writer.write(sample_of(messages_of(record, f"{file}, record {number}"), form, words))
            advance(1)
    typer.echo(f"{writer.samples:,} samples, {writer.tokens:,} tokens in {out}")
