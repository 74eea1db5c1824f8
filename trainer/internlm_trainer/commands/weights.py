"""`internlm export`, `models` and `chat`: weights for others, from others, and tried out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from internlm_trainer.commands.common import bar, print_json, sentences, show, store_errors
from internlm_trainer.commands.opened import Source, context_of, of_newest, tokenizer_of
from internlm_trainer.errors import UserError

if TYPE_CHECKING:
    from internlm_trainer.weights.source import Weights


class Format(StrEnum):
    """Of exported weights."""

    hf = "hf"
    internlm = "internlm"


class Dtype(StrEnum):
    """Of exported weights."""

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


@sentences
def export(
    source: Source,
    to: Annotated[str, typer.Argument(metavar="OUT", help="New folder (path or URL).", show_default=False)],
    format: Annotated[
        Format,
        typer.Option(
            help="hf: a LlamaForCausalLM for Transformers, LMDeploy, vLLM. internlm: InternLM's files."
        ),
    ] = Format.hf,
    dtype: Annotated[
        Dtype, typer.Option(help="Type of the weights; training keeps them in fp32.")
    ] = Dtype.bf16,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="SentencePiece model for hf, or none. Default: the one the weights were trained with."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Longest sequence, in tokens, for hf. Default: what the source was trained with."
        ),
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks that read it, for internlm.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages that read it, for internlm.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")] = False,
) -> None:
    """Write weights for others: Hugging Face's format, or InternLM's.

    Memory stays below 1 GB, whatever the size of the model. A folder that is interrupted opens nowhere; the same
    command writes it anew.
    """
    from internlm_trainer.weights.export import export_internlm, export_llama, total_bytes

    if format == Format.hf and (tp, pp) != (1, 1):
        raise UserError(
            "--tp and --pp are for --format internlm; Hugging Face's files are not split that way"
        )

    def write(weights: Weights) -> list[str]:
        with bar("exporting", total_bytes(weights, dtype)) as advance:
            if format == Format.internlm:
                return export_internlm(weights, to, dtype, tp, pp, advance)
            words = tokenizer_of(weights, tokenizer)
            return export_llama(weights, to, dtype, words, context_of(weights, context), advance)

    with store_errors():
        weights, files = of_newest(source, write)
    if as_json:
        print_json({"source": weights.url, "format": format.value, "dtype": dtype.value, "files": files})
    else:
        typer.echo(f"{weights.url}: {', '.join(files)} in {to}")


@sentences
def chat(
    source: Source,
    tokenizer: Annotated[
        str | None, typer.Option(help="SentencePiece model. Default: the one the weights were trained with.")
    ] = None,
    question: Annotated[
        list[str] | None, typer.Option("--question", "-q", help="Ask this and end; may be repeated.")
    ] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="Continue plain text, for models that were not made for chat.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest word each time.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest words of so much probability.")
    ] = 0.8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 1024,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens that are remembered. Default: what it was trained with.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Talk to a model in the terminal, from a checkpoint or a folder in Hugging Face's or InternLM's format.

    Answers appear as they are made. /reset forgets what was said; Ctrl-C ends an answer, Ctrl-D the chat.
    """
    import torch

    from internlm_trainer.chat import Chat, continued, load_model
    from internlm_trainer.generate import Sampling
    from internlm_trainer.weights.recognise import open_weights

    with store_errors():
        weights = open_weights(source, "SOURCE")
        words, tokens = tokenizer_of(weights, tokenizer), context_of(weights, context)
        if words is None:
            raise UserError("--tokenizer none: a chat needs one")
        cuda = torch.cuda.is_available()
        device = torch.device("cuda" if cuda else "cpu")
        model = load_model(weights, device, torch.bfloat16 if cuda else torch.float32)
    talk = None if complete else Chat(model, words, tokens)
    for number, asked in enumerate(question or _typed()):
        sampling = Sampling(temperature, top_p, seed + number)
        if talk and asked.strip() == "/reset":
            talk = Chat(model, words, tokens)
            continue
        if talk:
            answer = talk.ask(asked, max_tokens, sampling)
        else:
            answer = continued(model, words, tokens, asked, max_tokens, sampling)
        with suppress(KeyboardInterrupt):
            for piece in answer:
                typer.echo(piece, nl=False)
        typer.echo()


def _typed() -> Iterator[str]:
    """What is typed, line by line, until Ctrl-D or Ctrl-C."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line.strip():
            yield line


@sentences
def models() -> None:
    """List InternLM's releases: what they are, where they are, and the preset that trains them."""
    from internlm_trainer.weights.zoo import LICENSES, RELEASES, parameter_count

    table = Table("release", "size", "context", "preset", "where", "license", box=None, header_style="bold")
    for one in RELEASES:
        size = f"{parameter_count(one.preset) / 1e9:.2f} B"
        table.add_row(one.name, size, f"{one.context:,}", one.preset, one.where, one.license)
    show(table)
    typer.echo(
        "All are in Hugging Face's format. model.init.from and internlm export read hf:// with huggingface_hub "
        f"installed, or any folder or bucket that they were copied to. {LICENSES}"
    )
