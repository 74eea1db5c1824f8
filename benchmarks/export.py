"""Memory and speed of an export: a preset's checkpoint of zeros, which takes no room on the disk, to either format.

Finished files are removed while the next ones are written, so a disk with room for two of them will do.  The yardstick
is the same disk written in blocks of as many bytes, with nothing read or computed.

    python benchmarks/export.py --preset internlm-7b --format hf --folder /tmp/export
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import time
from datetime import UTC, datetime
from math import prod
from pathlib import Path

from internlm_trainer.checkpoint.format import (
    CHUNK,
    MANIFEST,
    Manifest,
    PieceEntry,
    ShardEntry,
    aligned,
    chunk_digest,
    encode,
    step_name,
)
from internlm_trainer.config.model import PRESETS
from internlm_trainer.storage import write_whole
from internlm_trainer.weights.export import export_internlm, export_llama, total_bytes
from internlm_trainer.weights.layout import parameters
from internlm_trainer.weights.recognise import open_weights


def make_checkpoint(folder: Path, preset: str) -> None:
    """One shard that is a hole in the file system, and the manifest that fits it."""
    shape = PRESETS[preset]
    pieces, end = [], 0
    for name, size in parameters(shape).items():
        pieces.append(PieceEntry("master", name, 0, prod(size), "float32", end))
        end = aligned(end + 4 * prod(size))
    zeros, rest = chunk_digest(bytes(CHUNK)), chunk_digest(bytes(end % CHUNK))
    chunks = (zeros,) * (end // CHUNK) + ((rest,) if end % CHUNK else ())
    shard = ShardEntry("shard-00000.bin", end, chunks, tuple(pieces))
    step = folder / step_name(1)
    step.mkdir(parents=True)
    with (step / shard.file).open("wb") as file:
        file.truncate(end)
    now = datetime.now(UTC)
    manifest = Manifest("job", 1, now, shape._asdict(), 1, parameters(shape), {}, (shard,))
    (step / MANIFEST).write_bytes(encode(manifest)[0])


def disk(folder: Path, total: int) -> float:
    """Bytes a second of plain writing, in files of 1 GB, each flushed to the disk."""
    block, written, began = os.urandom(32 << 20), 0, time.monotonic()
    while written < total:
        with write_whole(str(folder / "plain")) as file:
            for _ in range(32):
                written += file.write(block)
    return written / (time.monotonic() - began)


def main() -> None:
    """Export, and print peak memory and bytes a second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="internlm-7b", choices=sorted(PRESETS))
    parser.add_argument("--format", default="hf", choices=("hf", "internlm"))
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    source, out = arguments.folder / "checkpoint", arguments.folder / "out"
    make_checkpoint(source, arguments.preset)
    out.mkdir()
    weights = open_weights(str(source), "SOURCE")
    total, before = total_bytes(weights, "bf16"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def remove_finished(_: int) -> None:
        for file in [*out.glob("model-*.safetensors"), *out.glob("model_tp*.pt")]:
            file.unlink()

    try:
        began = time.monotonic()
        if arguments.format == "hf":
            export_llama(weights, str(out), "bf16", None, 2048, remove_finished, largest_file=1 << 30)
        else:
            export_internlm(weights, str(out), "bf16", arguments.tp, 1, remove_finished)
        seconds = time.monotonic() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{arguments.preset} as {arguments.format}: {total / 1e9:.1f} GB in {seconds:.0f} s")
        print(f"peak memory {peak / 1e6:.2f} GB, of which {before / 1e6:.2f} GB before the first byte")
        print(
            f"{total / seconds / 1e6:.0f} MB/s; the disk alone {disk(out, min(total, 8 << 30)) / 1e6:.0f} MB/s"
        )
    finally:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
