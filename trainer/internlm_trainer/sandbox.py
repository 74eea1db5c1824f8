"""Running Python code that a model wrote: in a process of its own, with limits.

The process gets no environment, no input, an empty folder, and limits on time, memory and files.  In namespaces of its
own it has no network, sees no other process and, unless root runs it, starts few; where the kernel lets the user make
none, nothing runs unless that was allowed, too.  This stops accidents and most mischief, and is no virtual machine:
files that the user may read or write are the code's, too.  So nothing runs here unasked.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from typing import NamedTuple

from internlm_trainer.errors import UserError

_OUTPUT_BYTES = 1 << 20  # of the file that its output goes to
# Own network (empty), users and process numbers; processes of the namespace end with its first one.
_ALONE = (
    *(
        "unshare",
        "--user",
        "--map-root-user",
        "--net",
        "--ipc",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ),
    *("prlimit", "--nproc=64"),
)


class Ran(NamedTuple):
    """What a program printed, errors included, and whether it ended well and in time."""

    output: str
    ok: bool
    timed_out: bool


@cache
def isolation() -> tuple[str, ...]:
    """The command that starts a process in namespaces of its own.  Raises UserError where this user may make none."""
    problem = ""
    try:
        done = subprocess.run([*_ALONE, "true"], capture_output=True, text=True, timeout=10)
        if done.returncode:
            problem = done.stderr.strip() or f"unshare ended with {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        raise UserError(
            "code that a model writes does not run here, since nothing would keep it from the network and from other "
            f"processes ({problem}); give --no-isolation if it may reach both"
        )
    return _ALONE


def run_python(
    code: str, seconds: int = 10, memory: int = 1 << 30, output: int = 4000, isolated: bool = True
) -> Ran:
    """Run a program for at most `seconds`, with `memory` bytes of address space; keeps `output` characters.

    isolated: in namespaces of its own.  Raises UserError where that is not possible.
    """
    alone = isolation() if isolated else ()

    def limit() -> None:
        os.setsid()
        for kind, most in (
            (resource.RLIMIT_CPU, seconds + 1),  # after the clock, which says why it ended
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_FSIZE, _OUTPUT_BYTES),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (most, most))

    with tempfile.TemporaryDirectory(prefix="internlm-") as folder, tempfile.TemporaryFile() as printed:
        # -I: neither the environment nor the current folder adds modules; -S: nor do installed packages.
        process = subprocess.Popen(
            [*alone, sys.executable, "-I", "-S", "-B", "-u", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": folder, "PYTHONIOENCODING": "utf-8"},
            preexec_fn=limit,
        )
        timed_out = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started, too
            process.wait()
        printed.seek(0)
        text = printed.read(4 * output).decode(errors="replace")[:output]
    if timed_out:
        text += f"\nstopped after {seconds} s"
    return Ran(text, process.returncode == 0 and not timed_out, timed_out)
