"""`internlm validate`, `run` and `env`: a job on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from internlm_operator.manifest import Job, JobError, load_manifests, parse_job
from internlm_trainer.commands.common import only_job, sentences
from internlm_trainer.commands.convert import SaveFolder, Tokenizer, TrainFolder, manifest_of_config
from internlm_trainer.errors import EXIT_USER_ERROR, UserError

Files = Annotated[list[Path], typer.Argument(help="Manifests of InternLMJobs.", show_default=False)]
File = Annotated[
    Path,
    typer.Argument(help="Manifest of an InternLMJob, or InternLM's configuration.", show_default=False),
]


@sentences
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


@sentences
def run(
    file: File,
    nodes: Annotated[int | None, typer.Option(min=1, help="Instead of the job's spec.nodes.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Instead of the job's processes (or GPUs) of a node.")
    ] = None,
    tokenizer: Tokenizer = None,
    train_folder: TrainFolder = None,
    save_folder: SaveFolder = None,
) -> None:
    """Run a job on this machine, from its newest checkpoint on. Takes InternLM's configs/*.py too.

    Ctrl-C stops it after the step at hand and saves; the same command goes on from there.
    """
    from internlm_trainer import launch

    if file.suffix == ".py":
        manifest = manifest_of_config(file, nodes, processes, tokenizer, train_folder, save_folder)
    elif tokenizer or train_folder or save_folder:
        raise UserError(
            "--tokenizer, --train-folder and --save-folder are for InternLM's configurations in Python; a manifest "
            "has spec.data and spec.checkpoint"
        )
    else:
        manifest = launch.scale_down(only_job(file, "run"), nodes, processes)
    job = parse_job(manifest)
    launch.check_machine(job.spec.nodes, job.spec.gpus_per_node)
    typer.echo(f"{job.name}: {_summary(job)}")
    code = launch.run(manifest, job.spec.world_size)
    if code == launch.EXIT_INTERRUPTED:
        typer.echo(f"stopped; `internlm run {file}` goes on from the last checkpoint", err=True)
    elif code == 0:
        typer.echo(f"done; checkpoints are in {job.spec.checkpoint.path}")
    raise typer.Exit(code)


def env() -> None:
    """Show what hardware and libraries were found, what will be used, and why."""
    from internlm_trainer import machine

    table = Table("what", "found", "use", box=None, header_style="bold")
    for finding in machine.find():
        table.add_row(*finding)
    Console().print(table)


def _summary(job: Job) -> str:
    from internlm_trainer import config

    spec = job.spec
    kind = "GPU" if spec.gpus_per_node else "CPU process"
    steps = config.total_steps(spec, spec.world_size)
    batch = config.global_batch_tokens(spec, spec.world_size)
    plural = "es" if kind.endswith("s") and spec.world_size > 1 else "s" if spec.world_size > 1 else ""
    zero = spec.parallel.zero.degrees(spec.world_size)
    return f"{steps:,} steps of {batch:,} tokens on {spec.world_size} {kind}{plural}, zero {zero}"
