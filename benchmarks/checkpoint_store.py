"""How fast checkpoints are saved to and loaded from an S3 store, beside fsspec's own parallel puts and gets.

    python benchmarks/checkpoint_store.py --minio PROGRAM [--gb 10] [--folder /tmp]

starts MinIO, moves the same bytes both ways and in both orders (fsspec, ours, ours, fsspec) and prints bytes a second,
the ratio, and each process's peak of memory beyond the bytes that it saves or loads.  The checkpoint is of four shards,
moved one after the other; fsspec moves four objects at once.  Each measurement is a process of its own.  Needs a
quarter of the bytes in /dev/shm, the same in memory, and all of them on the folder's disk.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from internlm_trainer.checkpoint import CheckpointStore, Piece, Snapshot, Want
from internlm_trainer.storage import open_fs

SHARDS, BUCKET = 4, "s3://benchmark"


def phase(name: str, source: Path) -> dict[str, float]:
    """One measurement, in a process of its own: seconds, and bytes of memory at their peak."""
    size = source.stat().st_size
    fs, _ = open_fs(BUCKET)
    keys = [f"{BUCKET}/plain/{shard}" for shard in range(SHARDS)]
    store = CheckpointStore(f"{BUCKET}/run", {}, 1, "benchmark")
    if name.startswith("fsspec"):
        began = time.monotonic()
        if name == "fsspec save":
            fs.put([str(source)] * SHARDS, keys)
        else:
            fs.get(keys, [f"{source}.{shard}" for shard in range(SHARDS)])
    elif name == "our save":
        values = torch.from_file(str(source), shared=True, size=size // 4, dtype=torch.float32)
        snapshot, entries = Snapshot(), []
        snapshot.take([Piece("master", "w0", 0, len(values), values)])
        began = time.monotonic()
        for shard in range(SHARDS):
            snapshot.pieces = (snapshot.pieces[0]._replace(parameter=f"w{shard}"),)
            entries.append(store.write_shard(1, shard, snapshot))
        store.commit(1, entries, {}, {f"w{shard}": (len(values),) for shard in range(SHARDS)})
    else:
        out = torch.zeros(size // 4)
        checkpoint = store.open(1)
        began = time.monotonic()
        for shard in range(SHARDS):
            checkpoint.load([Want("master", f"w{shard}", 0, len(out), out)])
    seconds = time.monotonic() - began
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}


def measure(name: str, source: Path, total: int) -> float:
    """Run a phase; bytes a second."""
    command = [sys.executable, __file__, "--phase", name, "--source", str(source)]
    done = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    for copy in source.parent.glob(f"{source.name}.*"):
        copy.unlink()
    held = {"our save": 2, "our load": 1}.get(name, 0)  # the source's mapping and the copy; the target
    memory = done["peak"] - held * total / SHARDS
    print(
        f"{name:12s} {done['seconds']:7.1f} s {total / done['seconds'] / 1e6:7.0f} MB/s  {memory / 2**20:6.0f} MiB",
        flush=True,
    )
    return total / float(done["seconds"])


@contextmanager
def minio(program: str, folder: Path) -> Iterator[None]:
    """A server with an empty bucket; its files are gone afterwards, which it would take its time to remove itself."""
    key, secret, port = secrets.token_hex(8), secrets.token_hex(16), 9555
    endpoint = f"http://127.0.0.1:{port}"
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with tempfile.TemporaryDirectory(dir=folder) as data:
        # A bucket is a folder, for a server that starts.
        Path(data, "data", BUCKET.removeprefix("s3://")).mkdir(parents=True)
        server = subprocess.Popen(
            [program, "server", f"{data}/data", "--address", f"127.0.0.1:{port}", "--quiet"],
            env=os.environ
            | {"MINIO_ROOT_USER": key, "MINIO_ROOT_PASSWORD": secret, "MINIO_BROWSER": "off", "HOME": data},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{endpoint}/minio/health/ready", timeout=5).close()  # noqa: S310
                    break
                except OSError:
                    time.sleep(0.1)
            yield
        finally:
            server.kill()
            server.wait()


def run(program: str, folder: Path, source: Path, total: int) -> None:
    speeds: dict[str, list[float]] = {}
    for who in ("fsspec", "our", "our", "fsspec"):
        with minio(program, folder):
            for what in ("save", "load"):
                speeds.setdefault(f"{who} {what}", []).append(measure(f"{who} {what}", source, total))
    for what in ("save", "load"):
        ratio = sum(speeds[f"our {what}"]) / sum(speeds[f"fsspec {what}"])
        print(f"{what}: {ratio:.0%} of fsspec's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minio")
    parser.add_argument("--gb", type=float, default=10.0)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--phase")
    parser.add_argument("--source", type=Path)
    arguments = parser.parse_args()
    if arguments.phase:
        print(json.dumps(phase(arguments.phase, arguments.source)))
        return
    each = int(arguments.gb * 1e9) // SHARDS // 64 * 64
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        source = Path(memory, "source")
        with source.open("wb") as file:
            for start in range(0, each, 1 << 24):
                file.write(os.urandom(min(1 << 24, each - start)))
        print(f"{each * SHARDS / 1e9:.1f} GB, load average {os.getloadavg()[0]:.1f}", flush=True)
        run(arguments.minio, Path(arguments.folder), source, each * SHARDS)


if __name__ == "__main__":
    main()
