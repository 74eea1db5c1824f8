"""An export that dies: `python killed.py SOURCE OUT FORMAT BYTES` is killed when it has written so many bytes."""

from __future__ import annotations

import os
import signal
import sys

from internlm_trainer.weights.export import export_internlm, export_llama
from internlm_trainer.weights.recognise import open_weights

source, out, format, limit = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
written = 0


def progress(done: int) -> None:
    global written
    written += done
    if written >= limit:
        os.kill(os.getpid(), signal.SIGKILL)


weights = open_weights(source, "SOURCE")
if format == "hf":
    export_llama(weights, out, "fp32", None, 64, progress, largest_file=100_000)
else:
    export_internlm(weights, out, "fp32", 2, 1, progress)
