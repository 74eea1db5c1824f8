"""The termination message: why this pod's training ended, left where the kubelet and the operator read it."""

from __future__ import annotations

import fcntl
import json
import os

# What the kubelet keeps; what is longer is cut, and would be no JSON any more.
MAX_BYTES = 4096


def leave_message(reason: str, message: str, step: int | None = None) -> bool:
    """Write the reason (`Completed`, `Stopped`, `UserError`, `DataError`, `Diverged`, `OutOfMemory`,
    `StorageUnreachable`, `Error`) unless another process was first.

    The first failure of a pod is the cause; what follows in its other processes are consequences.  Returns
    whether this process was the first, so that it is the one to tell; without a file, every process is.
    """
    path = os.environ.get("INTERNLM_TERMINATION_LOG")
    if not path:
        return True
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # Not tell(): it is where the file ended when it was opened, before another one's turn.
        if os.fstat(file.fileno()).st_size:
            return False
        file.write(encode(reason, message, step))
    return True


def encode(reason: str, message: str, step: int | None, **more: str | int) -> bytes:
    """The message as one line of JSON of less than `MAX_BYTES`, whatever it takes to write its characters.

    `more`: what the agent knows besides, such as `rank` and `evidence`.
    """
    while True:
        text = json.dumps({"reason": reason, "message": message, "step": step} | more, ensure_ascii=False)
        line = text.encode(errors="replace") + b"\n"
        if len(line) < MAX_BYTES:
            return line
        message = message[: len(message) * 9 // 10]
