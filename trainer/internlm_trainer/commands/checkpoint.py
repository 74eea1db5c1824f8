"""`internlm checkpoint ls|verify|diff|export`: checkpoints in any store, without the job that wrote them."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from internlm_trainer.commands import weights
from internlm_trainer.commands.common import bar, print_json, sentences, show, store_errors
from internlm_trainer.errors import UserError

if TYPE_CHECKING:
    from internlm_trainer.checkpoint import Checkpoint

app = typer.Typer(help="List, verify, compare and export checkpoints.", no_args_is_help=True)

EXIT_DIFFERENT = 1  # as diff says it

Uri = Annotated[
    str, typer.Argument(help="A job's checkpoint.path, or PATH/step-N in it.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")]


@app.command("ls")
@sentences
def ls(uri: Uri, as_json: Json = False) -> None:
    """List the checkpoints of a folder, with what their manifests and the sizes of their files tell."""
    from internlm_trainer.checkpoint.owner import owner_of
    from internlm_trainer.checkpoint.tools import listing, locate

    with store_errors():
        folder, only = locate(uri)
        found = [one for one in listing(folder) if only in (None, one.step)]
        owner = owner_of(folder)
    rows = [_row(one.step, one.checkpoint, one.problem) for one in found]
    if as_json:
        print_json({"checkpoints": rows, "owner": asdict(owner) if owner else None})
        return
    if not rows:
        raise UserError(f"{uri} holds no checkpoint")
    table = Table(
        "step", "time (UTC)", "size", "shards", "tokens", "job", "state", box=None, header_style="bold"
    )
    for row in rows:
        size = decimal(row["bytes"]) if row["bytes"] is not None else ""
        tokens = f"{row['tokens']:,}" if row["tokens"] is not None else ""
        cells = (
            row["step"],
            row["time"],
            size,
            row["shards"],
            tokens,
            row["job"],
            row["problem"] or "complete",
        )
        table.add_row(*("" if cell is None else str(cell) for cell in cells))
    show(table)
    if owner and not owner.released:
        typer.echo(f"claimed by {owner.who}")


def _row(step: int, checkpoint: Checkpoint | None, problem: str) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(("time", "bytes", "shards", "tokens", "job", "uri", "digest"))
    if checkpoint:
        committed = checkpoint.committed
        row |= {
            "time": committed.time,
            "bytes": committed.bytes,
            "shards": len(checkpoint.manifest.shards),
            "tokens": checkpoint.state.get("tokens"),
            "job": checkpoint.manifest.job,
            "uri": committed.uri,
            "digest": committed.digest,
        }
    return {"step": step, **row, "problem": problem}


@app.command("verify")
@sentences
def verify(uri: Uri, as_json: Json = False) -> None:
    """Read checkpoints to the last byte and compare every digest.  Exit code 1 if one is not whole."""
    from internlm_trainer.checkpoint import BadCheckpoint
    from internlm_trainer.checkpoint.tools import listing, locate

    results: list[dict[str, Any]] = []
    with store_errors():
        folder, only = locate(uri)
        found = [one for one in listing(folder) if only == one.step or (only is None and one.checkpoint)]
        for step, checkpoint, problem in found:
            if checkpoint and not problem:
                with bar(f"step {step}", checkpoint.committed.bytes) as advance:
                    try:
                        checkpoint.verify(advance)
                    except BadCheckpoint as error:
                        problem = error.why
            results.append({"step": step, "problem": problem})
            if not as_json:
                typer.echo(f"step {step}: {problem or 'whole'}")
    if not results:
        raise UserError(f"{uri} holds no checkpoint")
    if as_json:
        print_json({"checkpoints": results})
    if any(result["problem"] for result in results):
        raise typer.Exit(EXIT_DIFFERENT)


@app.command("diff")
@sentences
def diff(
    a: Uri,
    b: Uri,
    kind: Annotated[
        list[str] | None, typer.Option(help="Only this kind of state, such as master; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which tensors differ between two checkpoints, and by how much.  Exit code 1 if any does."""
    from internlm_trainer.checkpoint.tools import compare, open_one, states

    with store_errors():
        one, other = open_one(a), open_one(b)
        total = sum(math.prod(shape) for key, shape in states(one).items() if not kind or key[0] in kind)
        with bar("comparing", total) as advance:
            found = list(compare(one, other, advance, tuple(kind or ())))
    if as_json:
        print_json({"differences": [asdict(difference) for difference in found]})
    elif found:
        table = Table("tensor", "kind", "differ", "largest", "relative", box=None, header_style="bold")
        for row in found:
            numbers = (f"{row.differ:,} of {row.elements:,}", f"{row.largest:.3e}", f"{row.relative:.3e}")
            table.add_row(row.parameter, row.kind, *(numbers if row.elements else (row.what, "", "")))
        show(table)
    else:
        typer.echo("no difference")
    if found:
        raise typer.Exit(EXIT_DIFFERENT)


app.command("export")(weights.export)
