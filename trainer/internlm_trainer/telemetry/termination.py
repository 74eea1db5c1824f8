"""The termination message: why this pod's training ended, left where the kubelet and the operator read it."""

from __future__ import annotations

import fcntl
import json
import os

# The kubelet keeps 4096 bytes.
_MAX_MESSAGE = 2000


def leave_message(reason: str, message: str, step: int | None = None) -> None:
    """Write the reason (`Completed`, `Stopped`, `UserError`, `Error`) unless another process was first.

    The first failure of a pod is the cause; what follows in its other processes are consequences.
    """
    path = os.environ.get("INTERNLM_TERMINATION_LOG")
    if not path:
        return
    text = json.dumps({"reason": reason, "message": message[:_MAX_MESSAGE], "step": step})
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if file.tell() == 0:
            file.write(text + "\n")
