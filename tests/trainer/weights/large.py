"""An export of a checkpoint of zeros: `python large.py FOLDER` prints bytes read and memory taken, as JSON."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from export import make_checkpoint
from internlm_trainer.config import ModelShape
from internlm_trainer.weights.export import export_llama, total_bytes
from internlm_trainer.weights.recognise import open_weights

SHAPE = ModelShape(3, 4096, 32, 32, 11008, 8192, 1e-6, 10000, True)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


folder = Path(sys.argv[1])
make_checkpoint(folder / "checkpoint", SHAPE)
weights = open_weights(str(folder / "checkpoint"), "SOURCE")
before = peak()


def remove_finished(_: int) -> None:
    for file in (folder / "out").glob("model-*.safetensors"):
        file.unlink()


export_llama(weights, str(folder / "out"), "bf16", None, 2048, remove_finished, largest_file=500_000_000)
print(json.dumps([total_bytes(weights, "fp32"), peak() - before]))
