"""`internlm export` and `models`: weights for others, and from others."""

from __future__ import annotations

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
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="AdamW's states too, for internlm with zero1=1.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")] = False,
) -> None:
    """Write weights for others: Hugging Face's format, or InternLM's.

    Memory stays below 1.5 GB, whatever the size of the model. A folder that is interrupted opens nowhere; the same
    command writes it anew.
    """
    from internlm_trainer.weights.export import export_internlm, export_llama, total_bytes

    if format == Format.hf and ((tp, pp) != (1, 1) or optimizer):
        raise UserError(
            "--tp, --pp and --optimizer are for --format internlm; Hugging Face's files are not split and have no "
            "states"
        )

    def write(weights: Weights) -> list[str]:
        states = 3 * total_bytes(weights, "fp32") if optimizer else 0
        with bar("exporting", total_bytes(weights, dtype) + states) as advance:
            if format == Format.internlm:
                return export_internlm(weights, to, dtype, tp, pp, advance, optimizer=optimizer)
            words = tokenizer_of(weights, tokenizer)
            return export_llama(weights, to, dtype, words, context_of(weights, context), advance)

    with store_errors():
        weights, files = of_newest(source, write)
    if as_json:
        print_json({"source": weights.url, "format": format.value, "dtype": dtype.value, "files": files})
    else:
        typer.echo(f"{weights.url}: {', '.join(files)} in {to}")


@sentences
def import_(
    source: Source,
    to: Annotated[str, typer.Argument(metavar="OUT", help="New folder (path or URL).", show_default=False)],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="SentencePiece model, or none. Default: the one that lies with the weights."),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence, in tokens. Default: what the source says.")
    ] = None,
) -> None:
    """Make a checkpoint of weights in Hugging Face's or InternLM's format, which every other command reads.

    A job starts from it by model.init.from. It has no optimizer states. Memory stays below 1.5 GB.
    """
    from internlm_trainer.checkpoint import SaveFailed
    from internlm_trainer.weights.export import total_bytes
    from internlm_trainer.weights.imported import import_weights

    def write(weights: Weights) -> str:
        known = tokenizer or weights.tokenizer
        words = tokenizer_of(weights, tokenizer) if known else None
        with bar("importing", total_bytes(weights, "fp32")) as advance:
            return import_weights(weights, to, words, context or weights.context, advance)

    with store_errors():
        try:
            weights, url = of_newest(source, write)
        except SaveFailed as error:
            raise UserError(f"OUT: {error}") from error
    typer.echo(f"{weights.url}: {url}")


@sentences
def models() -> None:
    """List InternLM's releases: what they are, where they are, and the preset that trains them."""
    from internlm_trainer.weights.zoo import LICENSES, RELEASES, parameter_count

    columns = ("release", "size", "context", "preset", "license", "formats", "where: hf", "where: internlm")
    table = Table(*columns, box=None, header_style="bold")
    for one in RELEASES:
        size, formats = f"{parameter_count(one.preset) / 1e9:.2f} B", "hf, internlm" if one.original else "hf"
        original = f"OpenLMLab/{one.original}" if one.original else ""
        where = (one.where, original)
        table.add_row(one.name, size, f"{one.context:,}", one.preset, one.license, formats, *where)
    show(table)
    typer.echo(
        "hf is Hugging Face's format, on its hub: internlm import copies it to a folder or bucket of yours, and "
        "model.init.from and the other commands take the URL too. internlm is InternLM's own format, at "
        f"openxlab.org.cn/models/detail/NAME: copied to any folder or bucket, it is read there. {LICENSES}"
    )
