"""The checkpoints of one job: saving, finding, verifying and loading them.

A save is `write_shard` on every writer, then `commit` on rank 0, which writes the manifest and removes what
has become superfluous.  Each writer streams only what it holds, with bounded memory; no rank ever has the
whole model.  Saves are committed in the order of their steps.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import xxhash
from pydantic.alias_generators import to_camel

from internlm_trainer.checkpoint.errors import BadCheckpoint, SaveFailed, StorageUnavailable
from internlm_trainer.checkpoint.folder import Folder, WriteFailed
from internlm_trainer.checkpoint.format import (
    MANIFEST,
    Index,
    Manifest,
    PieceEntry,
    Read,
    ShardEntry,
    aligned,
    decode,
    encode,
    parse_step,
    shard_name,
    step_name,
    time_string,
    uncovered,
)
from internlm_trainer.checkpoint.tensors import Piece, Want, as_bytes, dtype_name
from internlm_trainer.errors import UserError

log = logging.getLogger(__name__)

SLICE = 16 << 20  # bytes written or verified at once
READERS = 8  # ranged reads in flight; with the largest read of 32 MiB they hold 256 MiB


@dataclass(frozen=True)
class CommittedCheckpoint:
    """What others may know of a checkpoint that exists: `bytes` of all its files, `digest` of its manifest,
    `time` in UTC."""

    step: int
    uri: str
    time: str
    bytes: int
    digest: str


def superseded(
    committed: Collection[int],
    unfinished: Collection[int],
    newest: int,
    keep: int,
    refused: Collection[int] = (),
) -> list[int]:
    """The steps to remove once step `newest` is committed, oldest first.

    Kept are the `keep` newest up to `newest`, not counting the `refused` ones, which did not verify.  What is
    newer than `newest` is left alone unless it was refused: it may be a save that is under way.
    """
    kept = sorted((set(committed) - set(refused)) | {newest}, reverse=True)
    kept = [step for step in kept if step <= newest][:keep]
    whole = {step for step in committed if step not in kept and (step < newest or step in refused)}
    return sorted(whole | {step for step in unfinished if step < newest})


class CheckpointStore:
    """The checkpoints of job `job` below `url`, the newest `keep` of them.

    `model`: the fingerprint of the model's shape, JSON values.  `patience`: seconds for which reads wait for
    a store that fails.
    """

    def __init__(
        self, url: str, model: Mapping[str, Any], keep: int, job: str, patience: float = 60.0
    ) -> None:
        assert keep >= 1
        self.url, self.model, self.keep, self.job = url, dict(model), keep, job
        self.folder = Folder(url, patience)
        self.refused: set[int] = set()  # steps that did not verify when this job resumed

    # Saving

    def write_shard(self, step: int, rank: int, pieces: Iterable[Piece]) -> ShardEntry:
        """Stream `pieces` to this rank's shard; what `commit` needs to know of it.

        `pieces` may be a generator that copies each tensor to host memory when its turn comes.  A step that
        is a good checkpoint already should not be saved again, since that one ends here.  Raises SaveFailed.
        """
        file, entries = shard_name(rank), []
        with _saving(step):
            # A checkpoint of this step that did not verify may still be there; it ends here, not half
            # overwritten.
            self.folder.remove(step_name(step), MANIFEST)
            with self.folder.create(step_name(step), file) as write:
                out = _Counting(write)
                for piece in pieces:
                    out.write(memoryview(bytes(aligned(out.bytes) - out.bytes)))
                    entries.append(_entry(piece, out.bytes))
                    out.write(as_bytes(piece.tensor))
        return ShardEntry(file, out.bytes, f"xxh3:{out.digest.hexdigest()}", tuple(entries))

    def commit(
        self,
        step: int,
        entries: Sequence[ShardEntry],
        state: Mapping[str, Any],
        parameters: Mapping[str, tuple[int, ...]],
        world_size: int | None = None,
    ) -> CommittedCheckpoint:
        """Make the shards a checkpoint.  To be called on one rank, when all have written theirs.

        `state`: JSON values, no NaN.  `world_size`: ranks of the job, if not all of them write a shard.
        Raises SaveFailed; after one the caller may go on training, see `abandon`.
        """
        problem = uncovered(parameters, entries)
        assert problem is None, problem
        created = datetime.now(UTC)
        shards = tuple(sorted(entries, key=lambda entry: entry.file))
        data, digest = encode(
            Manifest(
                self.job, step, created, self.model, world_size or len(shards), parameters, state, shards
            )
        )
        with _saving(step):
            self._check_shards(step, shards)
            self.folder.put(step_name(step), MANIFEST, data=data)
        self.refused.discard(step)
        self._remove_superseded(step)
        total = len(data) + sum(entry.bytes for entry in shards)
        return CommittedCheckpoint(
            step, self.folder.uri(step_name(step)), time_string(created), total, digest
        )

    def _check_shards(self, step: int, shards: Iterable[ShardEntry]) -> None:
        """Does the committing rank see what the others wrote?"""
        found = self.folder.names(step_name(step))
        for shard in shards:
            if found.get(shard.file) != shard.bytes:
                raise SaveFailed(
                    f"checkpoint {step_name(step)} could not be saved: {shard.file} was written, but rank 0 "
                    f"finds {_bytes(found.get(shard.file))} of its {shard.bytes} bytes in {self.url}; "
                    "checkpoint.path must be a folder that all nodes share"
                )

    def abandon(self, step: int) -> None:
        """Remove what a failed save has left, so that a full disk has room for the next one.

        To be called on one rank when all have given up the step.  Does nothing to a committed step, and never
        raises: the next commit tries again.
        """
        try:
            if MANIFEST not in self.folder.names(step_name(step)):
                self.folder.remove_folder(step_name(step))
        except (WriteFailed, StorageUnavailable, UserError) as error:
            log.warning("what is left of %s could not be removed: %s", step_name(step), error)

    def _remove_superseded(self, newest: int) -> None:
        """Removal is no part of the save: when it fails, it is said and tried again after the next one."""
        try:
            committed, unfinished = self._steps()
            for step in superseded(committed, unfinished, newest, self.keep, self.refused):
                # The manifest first: from here on the checkpoint does not exist.
                self.folder.remove(step_name(step), MANIFEST)
                self.folder.remove_folder(step_name(step))
                self.refused.discard(step)
        except (WriteFailed, StorageUnavailable, UserError) as error:
            log.warning("an old checkpoint in %s could not be removed: %s", self.url, error)

    # Finding

    def _steps(self) -> tuple[list[int], list[int]]:
        """Steps with and without a manifest."""
        steps = [s for s in map(parse_step, self.folder.names()) if s is not None]
        with ThreadPoolExecutor(READERS) as pool:
            whole = list(pool.map(lambda step: MANIFEST in self.folder.names(step_name(step)), steps))
        return (
            [step for step, there in zip(steps, whole, strict=True) if there],
            [step for step, there in zip(steps, whole, strict=True) if not there],
        )

    def candidates(self) -> list[int]:
        """Steps that were committed, newest first.  Whether they verify is another question."""
        return sorted(self._steps()[0], reverse=True)

    def open(self, step: int) -> Checkpoint:
        """The checkpoint of a step, with its manifest verified.

        Raises BadCheckpoint; UserError if another job or model wrote it; StorageUnavailable.
        """
        name = step_name(step)
        try:
            data = self.folder.read(name, MANIFEST)
        except FileNotFoundError:
            raise BadCheckpoint(name, f"{MANIFEST} is missing, so its save was not finished") from None
        manifest, digest = decode(data, name)
        if manifest.step != step:
            raise BadCheckpoint(name, f"{MANIFEST} is that of {step_name(manifest.step)}")
        self._check_owner(manifest, name)
        return Checkpoint(self.folder, manifest, digest, len(data))

    def _check_owner(self, manifest: Manifest, name: str) -> None:
        if manifest.job != self.job:
            raise UserError(
                f"checkpoint.path: {self.url} holds checkpoints of the job {manifest.job!r} ({name}), and "
                f"this is {self.job!r}; give each job a folder of its own"
            )
        theirs, ours = dict(manifest.model), self.model
        different = [
            f"{to_camel(field)} is {theirs.get(field)} there and {ours.get(field)} here"
            for field in sorted(theirs.keys() | ours.keys())
            if theirs.get(field) != ours.get(field)
        ]
        if different:
            raise UserError(
                f"checkpoint.path: {self.url} holds checkpoints of another model ({name}): "
                f"{', '.join(different)}; give this model a folder of its own, or the shape that is there"
            )

    def check_writable(self) -> None:
        """Called before the first step: can this job save here?

        UserError for a bucket that is not there, credentials that are wrong, a folder that cannot be written,
        or one that another job or another model has saved to.
        """
        self.folder.check_writable()
        for step in self.candidates():
            try:
                self.open(step)
                return
            except BadCheckpoint:
                continue  # it is refused, with why, when the job resumes

    def leave_probe(self) -> str:
        """Write a small file for the other ranks to find; its name."""
        return self.folder.leave_probe()

    def find_probe(self, name: str) -> None:
        """UserError if a file that another rank has just written is not to be seen here."""
        try:
            self.folder.size(name)
        except FileNotFoundError:
            raise UserError(
                f"checkpoint.path: a file written to {self.url} by one process is not there for another; it "
                "must be an object store, or a folder that all nodes share"
            ) from None

    def remove_probe(self, name: str) -> None:
        """Remove what `leave_probe` wrote; a failure leaves a few bytes behind and is no more than said."""
        try:
            self.folder.remove(name)
        except WriteFailed as error:
            log.warning("%s in %s: %s", name, self.url, error)


class Checkpoint:
    """A checkpoint whose manifest is whole."""

    def __init__(self, folder: Folder, manifest: Manifest, digest: str, size: int) -> None:
        self.folder, self.manifest, self.digest, self._size = folder, manifest, digest, size
        self.name = step_name(manifest.step)
        self.index = Index(manifest.shards)

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

    def verify(self, shards: Iterable[int] | None = None) -> None:
        """Compare size and digest of the given shards (numbers in the manifest), or of all.

        Raises BadCheckpoint for the first that differs, StorageUnavailable if the store does not come back.
        """
        numbers = range(len(self.manifest.shards)) if shards is None else shards
        wanted = [self.manifest.shards[number] for number in numbers]
        with ThreadPoolExecutor(READERS) as pool:
            for shard in wanted:
                with self._present(shard.file):
                    size = self.folder.size(self.name, shard.file)
                if size != shard.bytes:
                    raise BadCheckpoint(self.name, f"{shard.file} has {size} bytes, {shard.bytes} expected")
            for shard in wanted:
                found = xxhash.xxh3_128()
                for data in self._stream(pool, shard):
                    found.update(data)
                if f"xxh3:{found.hexdigest()}" != shard.digest:
                    raise BadCheckpoint(
                        self.name,
                        f"{shard.file} is damaged: it has digest xxh3:{found.hexdigest()}, "
                        f"{shard.digest} expected",
                    )

    def _stream(self, pool: ThreadPoolExecutor, shard: ShardEntry) -> Iterator[bytes]:
        """A shard's bytes in order, read ahead by as many slices as there are readers."""
        ahead: deque[Future[bytes]] = deque()
        for start in range(0, shard.bytes, SLICE):
            ahead.append(pool.submit(self._range, shard.file, start, min(start + SLICE, shard.bytes)))
            if len(ahead) == READERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _range(self, file: str, start: int, stop: int) -> bytes:
        """Exactly bytes [start, stop) of a shard."""
        with self._present(file):
            data = self.folder.read(self.name, file, start=start, stop=stop)
        if len(data) != stop - start:
            raise BadCheckpoint(self.name, f"{file} ends at byte {start + len(data)}, before byte {stop}")
        return data

    @contextmanager
    def _present(self, file: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise BadCheckpoint(self.name, f"{file} is missing") from None

    def load(self, wants: Sequence[Want]) -> None:
        """Fill every want's `out`, by parallel ranged reads of no more than what is wanted.

        Raises UserError if the checkpoint holds no such state, BadCheckpoint if a shard has gone or been cut
        since it was verified, StorageUnavailable.
        """
        for want in wants:
            self._check_want(want)
        targets = [as_bytes(want.out) for want in wants]

        def fill(read: Read) -> None:
            data = memoryview(self._range(read.file, read.start, read.stop))
            for copy in read.copies:
                part = data[copy.start - read.start : copy.stop - read.start]
                targets[copy.want][copy.to : copy.to + len(part)] = part

        reads = self.index.plan([want.elements for want in wants])
        with ThreadPoolExecutor(READERS) as pool:
            try:
                for _ in pool.map(fill, reads):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

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


class _Counting:
    """Counts and digests what goes through it, in slices small enough to bound the store's buffers."""

    def __init__(self, write: Callable[[memoryview], object]) -> None:
        self._write, self.bytes, self.digest = write, 0, xxhash.xxh3_128()

    def write(self, data: memoryview) -> None:
        for start in range(0, len(data), SLICE):
            part = data[start : start + SLICE]
            self.digest.update(part)
            self._write(part)
            self.bytes += len(part)


def _entry(piece: Piece, offset: int) -> PieceEntry:
    assert 0 <= piece.start < piece.stop
    assert len(piece.tensor) == piece.stop - piece.start
    return PieceEntry(piece.kind, piece.parameter, piece.start, piece.stop, dtype_name(piece.tensor), offset)


@contextmanager
def _saving(step: int) -> Iterator[None]:
    """What hinders the save, as SaveFailed.  Errors of the pieces' own making, such as a GPU's, pass
    through."""
    try:
        yield
    except (WriteFailed, StorageUnavailable, UserError) as error:
        raise SaveFailed(f"checkpoint {step_name(step)} could not be saved: {error}") from error


def _bytes(size: int | None) -> str:
    return "none" if size is None else str(size)
