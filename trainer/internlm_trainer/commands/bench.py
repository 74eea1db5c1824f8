"""`internlm bench`: how fast this machine trains."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from internlm_operator.manifest import parse_job
from internlm_trainer.commands.common import only_job, sentences, show
from internlm_trainer.errors import UserError

EXIT_FAILED = 1
BAR = 40


@sentences
def bench(
    file: Annotated[
        Path | None,
        typer.Argument(help="A job whose model, training and layout to measure.", show_default=False),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of InternLM-7B's width. Default: what fits.")
    ] = None,
    seq: Annotated[
        int | None, typer.Option(min=16, help="Tokens of a sequence. Default: 2048.", show_default=False)
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(min=1, help="Sequences of a micro-batch. Default: what fits.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the job's spec: training.precision=fp8.")
    ] = None,
    steps: Annotated[int, typer.Option(min=8, help="Steps, the second half of which counts.")] = 32,
    seconds: Annotated[float, typer.Option(min=1, help="Or as many as come in so long.")] = 60,
    to: Annotated[Path | None, typer.Option("--json", help="Write all that was found to this file.")] = None,
) -> None:
    """Train on random tokens for a minute, and show speed, memory, and where a step's time goes.

    Without a job it takes InternLM-7B, or as many of its layers as fit. Nothing is saved.
    """
    from internlm_trainer import bench as benchmark

    console, settings = Console(stderr=True), set_ or []
    if file:
        if layers or seq or sequences:
            raise UserError("--layers, --seq and --sequences are for a measurement without a job: use --set")
        manifest = only_job(file, "bench")
        nodes, base = parse_job(manifest).spec.nodes, manifest["spec"]
        if nodes > 1:
            console.print(f"measuring one node of the job's {nodes}")
    else:
        base = benchmark.default_spec(layers, seq or 2048, sequences, settings)
    with tempfile.TemporaryDirectory(prefix="internlm-bench-") as name:
        folder = Path(name)
        job = benchmark.manifest(base, settings, folder)
        with console.status("preparing random tokens") as status:

            def heard(values: dict[str, float]) -> None:
                text = f"step {values['step']} of {steps}: {values['tgs']:,.0f} tokens per process per second"
                status.update(text)
                if not console.is_terminal:
                    console.print(text)

            try:
                found = benchmark.measure(job, folder, steps, seconds, heard)
                if (processes := found["processes"]) > 1:
                    status.update("bandwidth between processes")
                    found["bandwidth"] = benchmark.bandwidth(processes, folder)
            except benchmark.FailedError as error:
                typer.echo(f"{error}\nerror: the job that was to be measured failed, see above", err=True)
                raise typer.Exit(EXIT_FAILED) from None
    show(_table(found))
    if to:
        to.write_text(json.dumps(found, indent=1) + "\n")


def _table(found: dict[str, Any]) -> Table:
    model = found["spec"]["model"]
    which = model.get("preset") or f"{model['layers']} layers of {model['hiddenSize']}"
    kind = "GPU" if found["gpus"] else "process"
    table = Table(box=None, show_header=False)
    table.add_row("measured", f"{which}, {found['precision']}, {found['rowTokens']:,} tokens a {kind}")
    table.add_row("on", f"{found['processes']} x {found['card']}, PyTorch {found['torch']}")
    table.add_row("speed", f"{found['tgs']:,.0f} tokens per {kind} per second")
    share = f", {found['mfu']:.1%} of the card's bf16 peak" if found["mfu"] else ""
    table.add_row("", f"{found['tflops']:.4g} TFLOPS{share}")
    table.add_row("memory", f"{found['memory'] / 2**30:.1f} GiB")
    table.add_row("a step", f"{found['stepSeconds'] * 1000:,.1f} ms")
    for name, spent in found["split"].items():
        part = spent / found["stepSeconds"]
        table.add_row(f"  {name}", f"{spent * 1000:8,.1f} ms {'█' * round(part * BAR)} {part:.1%}")
    for name, rate in found.get("bandwidth", {}).items():
        table.add_row(f"{name}", f"{rate / 1e9:.1f} GB/s bus bandwidth")
    return table
