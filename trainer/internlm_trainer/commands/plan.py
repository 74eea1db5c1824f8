"""`internlm plan`: what a job's layouts cost, before it runs."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer
from rich.table import Table

from internlm_operator.manifest import parse_spec
from internlm_trainer.commands.common import only_job, sentences, show
from internlm_trainer.commands.job import File
from internlm_trainer.errors import UserError
from internlm_trainer.plan.choose import Option, Plan, make_plan

UNITS = {"GB": 10**9, "GiB": 2**30}


@sentences
def plan(
    file: File,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs in all. Default: the job's.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="GPUs of a node. Default: the job's.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory of a GPU, such as 80GiB. Default: this machine's GPU's, or 80GiB."),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every layout, not only those worth a look.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All layouts as JSON, in bytes.")] = False,
) -> None:
    """Show what each ZeRO layout of a job costs in memory and communication, and which one to take."""
    spec = parse_spec(only_job(file, "plan").get("spec"), gpus)
    world_size = gpus or spec.world_size
    node = min(gpus_per_node or spec.processes_of_a_node, world_size)
    if world_size % node:
        raise UserError(
            f"--gpus {world_size}: is no multiple of the {node} GPUs of a node: give --gpus-per-node"
        )
    on_gpus = bool(spec.gpus_per_node or gpus)
    found = make_plan(spec, world_size, node, _device_memory(memory), gpu=on_gpus)
    if as_json:
        typer.echo(json.dumps(_plain(found), indent=1))
        return
    show(_table(found, found.options if all_ else found.shortlist))
    typer.echo(
        f"{world_size} ranks, {node} a node, {_gib(found.device_memory)} GiB each. Take {found.reason}."
    )


def _device_memory(given: str | None) -> int:
    if given is None:
        from internlm_trainer import machine

        return machine.gpu_memory() or 80 * 2**30
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(GB|GiB)", given)
    if not match or not float(match[1]):
        raise UserError(f"--memory {given}: must be a number of GB or GiB, such as 80GiB")
    return int(float(match[1]) * UNITS[match[2]])


def _table(found: Plan, options: tuple[Option, ...]) -> Table:
    table = Table(box=None, header_style="bold")
    for name in ("", "p, g, o", "recompute"):
        table.add_column(name, no_wrap=True)
    for name in ("params", "grads", "optim", "activ", "logits", "buffers", "total GiB", "inside", "across"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for option in options:
        need, sent = option.memory, option.traffic.total
        numbers = (*need[:6], need.total, sent.inside, sent.across)
        marks = [
            word
            for word, holds in (
                ("take this", option is found.best),
                ("the job's", option.own),
                ("does not fit", not need.fits(found.device_memory)),
            )
            if holds
        ]
        table.add_row(
            "*" if option is found.best else "",
            ", ".join(map(str, option.degrees)),
            option.recompute,
            *(_gib(number) for number in numbers),
            ", ".join(marks),
            style=None if need.fits(found.device_memory) else "dim",
        )
    table.caption = (
        "GiB of a rank at the step's worst moment; inside, across: GiB that it sends in a step within its node and "
        "to other nodes"
    )
    return table


def _plain(found: Plan) -> dict[str, Any]:
    def one(option: Option) -> dict[str, Any]:
        p, g, o = option.degrees
        return {
            "zero": {"parameters": p, "gradients": g, "optimizer": o},
            "recompute": option.recompute,
            "memory": {**option.memory._asdict(), "total": option.memory.total},
            "sent": {
                purpose: sent._asdict()
                for purpose, sent in (*option.traffic._asdict().items(), ("total", option.traffic.total))
            },
            "fits": option.memory.fits(found.device_memory),
            "best": option is found.best,
            "own": option.own,
        }

    return {
        "deviceMemory": found.device_memory,
        "reason": found.reason,
        "options": [one(option) for option in found.options],
    }


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
