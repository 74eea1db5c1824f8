"""The `internlm` command."""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from internlm_operator.api import Job, JobError, load_manifests, parse_job
from internlm_trainer.errors import UserError

app = typer.Typer(
    help="Train InternLM-family language models: the same job.yaml runs here and on Kubernetes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
EXIT_USER_ERROR = 65

Files = Annotated[list[Path], typer.Argument(help="Manifests of InternLMJobs.", show_default=False)]
File = Annotated[Path, typer.Argument(help="Manifest of an InternLMJob.", show_default=False)]


def _sentences(command: Callable[..., None]) -> Callable[..., None]:
    """Print users' mistakes as sentences, without a traceback."""

    @wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except (UserError, JobError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(EXIT_USER_ERROR) from None

    return wrapped


@app.command()
@_sentences
def validate(files: Files) -> None:
    """Check manifests, by the rules that the cluster applies."""
    mistakes = 0
    for file in files:
        for manifest in load_manifests(file):
            try:
                job = parse_job(manifest)
            except JobError as error:
                mistakes += len(error.sentences)
                for sentence in error.sentences:
                    typer.echo(f"{file}: {sentence}", err=True)
            else:
                typer.echo(f"{file}: {job.name} is valid: {_summary(job)}")
    if mistakes:
        raise typer.Exit(EXIT_USER_ERROR)


@app.command()
@_sentences
def run(
    file: File,
    nodes: Annotated[int | None, typer.Option(min=1, help="Instead of the job's spec.nodes.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Instead of the job's processes (or GPUs) of a node.")
    ] = None,
) -> None:
    """Run a job on this machine, from its newest checkpoint on.

    Ctrl-C stops it after the step at hand and saves; the same command goes on from there.
    """
    from internlm_trainer import launch

    manifests = load_manifests(file)
    if len(manifests) > 1:
        raise UserError(f"{file}: holds {len(manifests)} jobs; run takes one")
    manifest = launch.scale_down(manifests[0], nodes, processes)
    job = parse_job(manifest)
    launch.check_machine(job.spec.nodes, job.spec.gpus_per_node)
    typer.echo(f"{job.name}: {_summary(job)}")
    code = launch.run(manifest, job.spec.world_size)
    if code == launch.EXIT_INTERRUPTED:
        typer.echo(f"stopped; `internlm run {file}` goes on from the last checkpoint", err=True)
    elif code == 0:
        typer.echo(f"done; checkpoints are in {job.spec.checkpoint.path}")
    raise typer.Exit(code)


@app.command()
def env() -> None:
    """Show what hardware and libraries were found, what will be used, and why."""
    from internlm_trainer import machine

    table = Table("what", "found", "use", box=None, header_style="bold")
    for finding in machine.find():
        table.add_row(*finding)
    out.print(table)


class Sample(StrEnum):
    """What a training sample is."""

    auto = "auto"
    file = "file"
    line = "line"
    json = "json"
    jsonl = "jsonl"


@app.command()
@_sentences
def tokenize(
    inputs: Annotated[list[str], typer.Argument(help="Text files or URLs; * and ** are expanded.")],
    tokenizer: Annotated[str, typer.Option(help="SentencePiece model (path or URL).")],
    output: Annotated[str, typer.Option("--out", help="A .bin file for all, or a folder for one .bin each.")],
    sample: Annotated[
        Sample, typer.Option(help="What a sample is; auto: by the file's ending.")
    ] = Sample.auto,
    text_field: Annotated[str, typer.Option(help="Field of a JSON record that holds the text.")] = "text",
    raw: Annotated[
        bool, typer.Option(help="Tokenize a record's raw JSON text, as InternLM's tool does.")
    ] = False,
) -> None:
    """Turn text into InternLM's .bin and .bin.meta files."""
    from internlm_trainer import machine
    from internlm_trainer.data.progress import shown_progress
    from internlm_trainer.data.tokenize import tokenize_files
    from internlm_trainer.data.tokenizer import load_tokenizer

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with shown_progress() as progress:
        made = tokenize_files(
            inputs,
            load_tokenizer(tokenizer, "--tokenizer"),
            output,
            text_field=text_field,
            sample=sample.value,
            raw=raw,
            progress=progress,
            threads=machine.cores(),
        )
    for file in made:
        typer.echo(f"{file.url}: {file.samples:,} samples, {file.tokens:,} tokens")


def _summary(job: Job) -> str:
    from internlm_trainer import config

    spec = job.spec
    kind = "GPU" if spec.gpus_per_node else "CPU process"
    steps = config.total_steps(spec, spec.world_size)
    batch = config.global_batch_tokens(spec, spec.world_size)
    plural = "es" if kind.endswith("s") and spec.world_size > 1 else "s" if spec.world_size > 1 else ""
    zero = spec.parallel.zero.degrees(spec.world_size)
    return f"{steps:,} steps of {batch:,} tokens on {spec.world_size} {kind}{plural}, zero {zero}"


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="internlm")


if __name__ == "__main__":
    main()
