"""A trained model, and the command that serves it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from trainer.chat.trained import trained_model


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a checkpoint of the small model."""
    return trained_model(tmp_path_factory.mktemp("trained"))


@contextmanager
def command(says: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`internlm` in a process of its own, once it says where it answers (`says`, an expression); then it is ended."""
    process = subprocess.Popen(
        [sys.executable, "-m", "internlm_trainer.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout
    said = ""
    try:
        for line in process.stdout:
            said += line
            if found := re.search(says, line):
                yield process, found[1]
                break
        else:
            pytest.fail(f"internlm {arguments[0]} ended: {said}")
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def endpoint(trained: str) -> Iterator[str]:
    """URL of the model, served."""
    with command(r"answers at (http://\S+)", "serve", trained, "--port", "0", "--rows", "2") as (_, url):
        yield url
