"""Running Python code that a model wrote: in a process of its own, with limits.

The process gets no environment, no input, an empty folder, and limits on time, memory and files; where the kernel lets
a user make namespaces, it has no network and sees no other process.  This stops accidents and most mischief, and is no
virtual machine: files that the user may read or write are the code's, too.  So nothing runs here unasked.
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
    """The command that starts a process without network; nothing where the kernel does not let this user."""
    try:
        done = subprocess.run([*_ALONE, "true"], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return _ALONE if done.returncode == 0 else ()


def run_python(code: str, seconds: int = 10, memory: int = 1 << 30, output: int = 4000) -> Ran:
    """Run a program for at most `seconds`, with `memory` bytes of address space; keeps `output` characters."""

    def limit() -> None:
        os.setsid()
        for kind, most in (
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_FSIZE, _OUTPUT_BYTES),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (most, most))

    with tempfile.TemporaryDirectory(prefix="internlm-") as folder, tempfile.TemporaryFile() as printed:
        # -I: neither the environment nor the current folder adds modules; -S: nor do installed packages.
        process = subprocess.Popen(
            [*isolation(), sys.executable, "-I", "-S", "-B", "-u", "-c", code],
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
