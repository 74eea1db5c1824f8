"""`internlm convert-config`, and what `internlm run` needs to take InternLM's configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from internlm_operator.manifest import parse_job
from internlm_trainer.commands.common import sentences
from internlm_trainer.errors import UserError
from internlm_trainer.legacy_config import Conversion, Machine, convert, evaluate, job_yaml

ConfigFile = Annotated[
    Path, typer.Argument(help="InternLM's Python configuration, configs/*.py.", show_default=False)
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="SentencePiece model of the data (path or URL), for a configuration in Python."),
]
TrainFolder = Annotated[
    str | None, typer.Option(help="Tokenized data, where a configuration in Python names none.")
]
SaveFolder = Annotated[
    str | None, typer.Option(help="Checkpoints, instead of a Python configuration's save_ckpt_folder.")
]


@sentences
def convert_config(
    config: ConfigFile,
    tokenizer: Tokenizer = None,
    train_folder: TrainFolder = None,
    save_folder: SaveFolder = None,
    nodes: Annotated[int, typer.Option(min=1, help="Worker pods.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each; 0: CPU processes.")] = 8,
    processes_per_node: Annotated[int, typer.Option(min=1, help="CPU processes of each.")] = 1,
) -> None:
    """Turn InternLM's Python configuration into a job's manifest, on standard output.

    The file is parsed, not run. What has no counterpart is told in comments, or refused where it would change what
    is computed.
    """
    machine = Machine(nodes, gpus_per_node, processes_per_node, tokenizer, train_folder, save_folder)
    typer.echo(job_yaml(read_config(config, machine), config.name), nl=False)


def read_config(file: Path, machine: Machine) -> Conversion:
    """The job of a configuration in Python.  Raises UserError and JobError."""
    try:
        source = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    conversion = convert(evaluate(source, str(file)), machine)
    parse_job(conversion.manifest)
    return conversion


def manifest_of_config(
    file: Path,
    nodes: int | None,
    processes: int | None,
    tokenizer: str | None,
    train_folder: str | None,
    save_folder: str | None,
) -> dict[str, Any]:
    """The manifest for this machine: on all its GPUs where it has some, else on `processes` CPU processes.

    What the conversion has to tell is printed.
    """
    from internlm_trainer import machine

    gpus = machine.gpu_count()
    here = Machine(
        nodes or 1, (processes or gpus) if gpus else 0, processes or 1, tokenizer, train_folder, save_folder
    )
    conversion = read_config(file, here)
    for note in conversion.notes:
        typer.echo(f"{file.name}: {note}", err=True)
    return conversion.manifest
