"""Memory and speed of an export: a preset's checkpoint of zeros, which takes no room on the disk, to either format.

Finished files are removed while the next ones are written, so a disk with room for two of them will do.  The yardsticks
are as many bytes of the checkpoint copied, and as many bytes written with nothing read, in blocks.  Reading what is no
more than a hole costs the kernel a second of a core for a GB, twice that for a GB of bf16; holes of a file in memory
(`--source /dev/shm/checkpoint`) cost a tenth.

    python benchmarks/export.py --preset internlm-7b --format hf --folder /tmp/export
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import time
from collections.abc import Callable
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
from internlm_trainer.config.model import PRESETS, ModelShape
from internlm_trainer.storage import write_whole
from internlm_trainer.weights.export import export_internlm, export_llama, total_bytes
from internlm_trainer.weights.layout import parameters
from internlm_trainer.weights.recognise import open_weights

FILE, BLOCK = 1 << 30, 8 << 20  # bytes


def make_checkpoint(folder: Path, shape: ModelShape) -> Path:
    """One shard that is a hole in the file system, and the manifest that fits it; the shard."""
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
    return step / shard.file


def plain(folder: Path, total: int, read: Callable[[], bytes]) -> float:
    """Bytes a second of plain writing of what `read` gives, in files of 1 GB, each flushed to the disk and removed."""
    written, began = 0, time.monotonic()
    while written < total:
        with write_whole(str(folder / "plain")) as file:
            for _ in range(FILE // BLOCK):
                written += file.write(read())
    seconds = time.monotonic() - began
    (folder / "plain").unlink()
    return written / seconds


def copied(folder: Path, total: int, shard: Path) -> float:
    """The same of a file's own bytes, from the beginning."""
    with shard.open("rb", buffering=0) as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return plain(folder, total, lambda: source.read(BLOCK))


def peak() -> int:
    """Most memory that this process had so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> None:
    """Export, and print peak memory and bytes a second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="internlm-7b", choices=sorted(PRESETS))
    parser.add_argument("--layers", type=int, help="fewer than the preset's, for a quick look")
    parser.add_argument("--format", default="hf", choices=("hf", "internlm"))
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--folder", type=Path, required=True, help="a new one, which is removed at the end")
    parser.add_argument("--source", type=Path, help="a new one for the checkpoint, if not in --folder")
    arguments = parser.parse_args()
    shape = PRESETS[arguments.preset]
    shape = shape._replace(layers=arguments.layers or shape.layers)
    source, out = arguments.source or arguments.folder / "checkpoint", arguments.folder / "out"
    out.mkdir(parents=True)
    try:
        shard = make_checkpoint(source, shape)
        weights = open_weights(str(source), "SOURCE")
        total, before = total_bytes(weights, "bf16"), peak()

        def remove_finished(_: int) -> None:
            for file in [*out.glob("model-*.safetensors"), *out.glob("model_tp*.pt")]:
                file.unlink()

        began, cpu = time.monotonic(), time.process_time()
        if arguments.format == "hf":
            export_llama(weights, str(out), "bf16", None, 2048, remove_finished, largest_file=FILE)
        else:
            export_internlm(weights, str(out), "bf16", arguments.tp, 1, remove_finished)
        seconds, cpu = time.monotonic() - began, time.process_time() - cpu
        memory = peak()
        print(
            f"{arguments.preset}, {shape.layers} layers, as {arguments.format}: {total / 1e9:.1f} GB written"
        )
        print(f"peak memory {memory / 1e9:.2f} GB, of which {before / 1e9:.2f} GB before the first byte")
        print(f"export            {total / seconds / 1e6:5.0f} MB/s, {seconds:.1f} s, CPU time {cpu:.1f} s")
        remove_finished(0)
        print(f"copy              {copied(out, total, shard) / 1e6:5.0f} MB/s")
        block = os.urandom(BLOCK)
        print(f"writing alone     {plain(out, total, lambda: block) / 1e6:5.0f} MB/s")
    finally:
        shutil.rmtree(source)
        shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
