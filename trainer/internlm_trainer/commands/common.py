"""What the subcommands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from internlm_operator.manifest import JobError, load_manifests
from internlm_trainer.errors import EXIT_USER_ERROR, UserError

EXIT_STORE = 75  # sysexits.h: try again later


def sentences(command: Callable[..., None]) -> Callable[..., None]:
    """Print users' mistakes as sentences, without a traceback."""

    @wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except (UserError, JobError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(EXIT_USER_ERROR) from None

    return wrapped


class DefaultGroup(TyperGroup):
    """Commands of which one, `run`, need not be named: `internlm eval SOURCE` beside `internlm eval plot SOURCE`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


def only_job(file: Path, command: str) -> dict[str, Any]:
    """The manifest in a file, for a command that takes one.  Raises UserError where there are more."""
    manifests = load_manifests(file)
    if len(manifests) > 1:
        raise UserError(f"{file}: holds {len(manifests)} jobs; {command} takes one")
    return manifests[0]


@contextmanager
def store_errors() -> Iterator[None]:
    """What is wrong with a checkpoint or its store, as sentences."""
    from internlm_trainer.checkpoint import BadCheckpoint, StorageUnavailable

    try:
        yield
    except BadCheckpoint as error:
        raise UserError(f"{error}; internlm checkpoint ls shows what else is there") from None
    except StorageUnavailable as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_STORE) from None


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal; nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(what, total=total)
        yield lambda done: bars.advance(task, done)


def show(table: Table) -> None:
    """Print a table whose cells are whole however narrow the terminal: a number cut short is a wrong one."""
    whole = Console(width=10_000).measure(table).maximum
    Console(width=max(Console().width, whole), markup=False).print(table)


def print_json(content: object) -> None:
    """One document, for programs."""
    typer.echo(json.dumps(content, indent=2))
