"""What the subcommands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import typer
from rich.console import Console

from internlm_operator.api import JobError
from internlm_trainer.errors import UserError

out = Console()
EXIT_USER_ERROR = 65  # sysexits.h: the input is wrong


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
