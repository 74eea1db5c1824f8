"""Reading checkpoints: which are there, and what is in one.

Every byte is verified as it is read, so loading needs no pass over the data before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from internlm_trainer.checkpoint.errors import BadCheckpoint
from internlm_trainer.checkpoint.folder import Folder
from internlm_trainer.checkpoint.format import (
    CHUNK,
    LARGEST_READ,
    MANIFEST,
    Index,
    Manifest,
    Read,
    ShardEntry,
    chunk_digest,
    decode,
    parse_step,
    step_name,
    time_string,
)
from internlm_trainer.checkpoint.tensors import Want, as_bytes, dtype_name
from internlm_trainer.errors import UserError

T = TypeVar("T")

READERS = 8  # ranged reads in flight; with the largest read of 16 MiB they hold 128 MiB


@dataclass(frozen=True)
class CommittedCheckpoint:
    """What others may know of a checkpoint that exists: `bytes` of all its files, `digest` of its manifest,
    `time` in UTC; `verified`: its bytes came back from the store as they were written."""

    step: int
    uri: str
    time: str
    bytes: int
    digest: str
    verified: bool = False


def stored_steps(folder: Folder) -> tuple[list[int], list[int]]:
    """Steps with and without a manifest.  Whether the former verify is another question."""
    steps = sorted(s for s in map(parse_step, folder.names()) if s is not None)
    with ThreadPoolExecutor(READERS) as pool:
        whole = list(pool.map(lambda step: is_committed(folder, step), steps))
    return (
        [step for step, there in zip(steps, whole, strict=True) if there],
        [step for step, there in zip(steps, whole, strict=True) if not there],
    )


def is_committed(folder: Folder, step: int) -> bool:
    """Whether the step has a manifest; one that a listing does not show yet is looked up by its name."""
    if MANIFEST in folder.names(step_name(step)):
        return True
    try:
        folder.size(step_name(step), MANIFEST)
    except FileNotFoundError:
        return False
    return True


def sizes(folder: Folder, name: str, shards: Iterable[ShardEntry]) -> Iterator[tuple[ShardEntry, int | None]]:
    """The size of each shard as the store has it, or None for one that is not there.

    What a listing does not show yet is looked up by its name, which stores know sooner.
    """
    listed = folder.names(name)
    for shard in shards:
        size = listed.get(shard.file)
        if size != shard.bytes:
            try:
                size = folder.size(name, shard.file)
            except FileNotFoundError:
                size = None
        yield shard, size


def open_checkpoint(folder: Folder, step: int) -> Checkpoint:
    """The checkpoint of a step, with its manifest verified.  Raises BadCheckpoint, StorageUnavailable."""
    name = step_name(step)
    try:
        data = folder.read(name, MANIFEST)
    except FileNotFoundError:
        raise BadCheckpoint(name, f"{MANIFEST} is missing, so its save was not finished") from None
    manifest, digest = decode(data, name)
    if manifest.step != step:
        raise BadCheckpoint(name, f"{MANIFEST} is that of {step_name(manifest.step)}")
    return Checkpoint(folder, manifest, digest, len(data))


class Checkpoint:
    """A checkpoint whose manifest is whole."""

    def __init__(self, folder: Folder, manifest: Manifest, digest: str, size: int) -> None:
        self.folder, self.manifest, self.digest, self._size = folder, manifest, digest, size
        self.name = step_name(manifest.step)
        self.index = Index(manifest.shards)
        self._shards = {shard.file: shard for shard in manifest.shards}

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def state(self) -> dict[str, Any]:
        """The loop's state, as it comes out of JSON: no tuples, and keys are strings."""
        return dict(self.manifest.state)

    @property
    def committed(self) -> CommittedCheckpoint:
        """What `commit` returned."""
        total = self._size + sum(shard.bytes for shard in self.manifest.shards)
        time = time_string(self.manifest.created)
        return CommittedCheckpoint(self.step, self.folder.uri(self.name), time, total, self.digest)

    def verify(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Read all of it, calling `progress` with the bytes of each read.

        Raises BadCheckpoint for the first thing that is wrong, StorageUnavailable if the store does not come
        back.
        """
        self.check_sizes()
        read_back(self.folder, self.name, self.manifest.shards, progress)

    def check_sizes(self) -> None:
        """Are all shards there, as long as they should be?  One listing; raises BadCheckpoint."""
        for shard, size in sizes(self.folder, self.name, self.manifest.shards):
            if size is None:
                raise BadCheckpoint(self.name, f"{shard.file} is missing")
            if size != shard.bytes:
                raise BadCheckpoint(self.name, f"{shard.file} has {size} bytes, {shard.bytes} expected")

    def load(self, wants: Sequence[Want]) -> None:
        """Fill every want's `out`, by parallel verified reads of no more chunks than hold what is wanted.

        Raises UserError if the checkpoint holds no such state, BadCheckpoint for a shard that is missing, cut or
        damaged, StorageUnavailable.
        """
        for want in wants:
            self._check_want(want)
        targets = [as_bytes(want.out) for want in wants]

        def fill(read: Read) -> None:
            data = memoryview(_read(self.folder, self.name, self._shards[read.file], read))
            for copy in read.copies:
                part = data[copy.start - read.start : copy.stop - read.start]
                targets[copy.want][copy.to : copy.to + len(part)] = part

        in_parallel(fill, self.index.plan([want.elements for want in wants]))

    def _check_want(self, want: Want) -> None:
        held = self.index.dtype(want.kind, want.parameter)
        if held is None:
            raise UserError(
                f"checkpoint {self.name} holds no {want.kind} of {want.parameter}, only "
                f"{', '.join(self.index.kinds)}: it was saved with another optimizer; go on with that "
                "one, or start in another folder"
            )
        if held != dtype_name(want.out):
            raise UserError(
                f"checkpoint {self.name} holds {want.kind} of {want.parameter} as {held}, and this job keeps "
                f"it as {dtype_name(want.out)}; go on with the settings that it was saved with"
            )
        assert len(want.out) == want.stop - want.start


def read_back(
    folder: Folder,
    name: str,
    shards: Iterable[ShardEntry],
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Read all of the shards of the checkpoint `name`, calling `progress` with the bytes of each read.

    Raises BadCheckpoint for the first chunk that is not what was written, StorageUnavailable.
    """
    lock = threading.Lock()
    reads = [
        (shard, Read(shard.file, start, min(start + LARGEST_READ, shard.bytes), ()))
        for shard in shards
        for start in range(0, shard.bytes, LARGEST_READ)
    ]

    def check(one: tuple[ShardEntry, Read]) -> None:
        _read(folder, name, *one)
        with lock:
            progress(one[1].stop - one[1].start)

    in_parallel(check, reads)


def _read(folder: Folder, name: str, shard: ShardEntry, read: Read) -> bytes:
    """The bytes of a read, which begins at a chunk and ends at one or with the shard."""
    try:
        data = folder.read(name, read.file, start=read.start, stop=read.stop)
        if _differing(shard, read.start, data) is not None:
            # A store that replicates may serve an old object under the name once; damage stays.
            data = folder.read(name, read.file, start=read.start, stop=read.stop)
    except FileNotFoundError:
        raise BadCheckpoint(name, f"{read.file} is missing") from None
    if len(data) != read.stop - read.start:
        raise BadCheckpoint(
            name, f"{read.file} ends at byte {read.start + len(data)}, before byte {read.stop}"
        )
    if (at := _differing(shard, read.start, data)) is not None:
        raise BadCheckpoint(
            name,
            f"{read.file} is damaged between bytes {at} and {min(at + CHUNK, shard.bytes)}: the digest there is "
            f"not {shard.chunks[at // CHUNK]}",
        )
    return data


def _differing(shard: ShardEntry, start: int, data: bytes) -> int | None:
    """Where the first chunk begins that is not what was written, or None."""
    view = memoryview(data)
    for at in range(0, len(data), CHUNK):
        if chunk_digest(view[at : at + CHUNK]) != shard.chunks[(start + at) // CHUNK]:
            return start + at
    return None


def in_parallel(work: Callable[[T], None], reads: Iterable[T]) -> None:
    """Work on several reads at a time; the first error is raised once those under way are done."""
    with ThreadPoolExecutor(READERS) as pool:
        try:
            for _ in pool.map(work, reads):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
