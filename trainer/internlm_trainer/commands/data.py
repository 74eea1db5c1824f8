"""`internlm tokenize`: text to training data."""

from __future__ import annotations

import logging
from enum import StrEnum
from typing import Annotated

import typer

from internlm_trainer.commands.common import sentences


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
