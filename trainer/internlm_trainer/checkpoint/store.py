"""The checkpoints of one job: saving, and what a save leaves and removes.

A save is `write_shard` on every writer, then `commit` on one rank, which writes the manifest and removes what
has become superfluous.  Each writer streams only what it holds, with bounded memory; no rank ever has the
whole model.  Saves are committed in the order of their steps.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Protocol

from pydantic.alias_generators import to_camel

from internlm_trainer.checkpoint.errors import BadCheckpoint, SaveFailed, StorageUnavailable
from internlm_trainer.checkpoint.folder import Folder, WriteFailed
from internlm_trainer.checkpoint.format import (
    MANIFEST,
    Manifest,
    PieceEntry,
    ShardEntry,
    chunk_digest,
    encode,
    shard_name,
    step_name,
    time_string,
    uncovered,
)
from internlm_trainer.checkpoint.load import (
    Checkpoint,
    CommittedCheckpoint,
    is_committed,
    open_checkpoint,
    read_back,
    sizes,
    stored_steps,
)
from internlm_trainer.checkpoint.owner import Ownership, claim_of
from internlm_trainer.checkpoint.retention import superseded
from internlm_trainer.errors import UserError

log = logging.getLogger(__name__)


class Image(Protocol):
    """A shard as it is to be written; `Snapshot` is one."""

    @property
    def bytes(self) -> int: ...

    @property
    def pieces(self) -> Sequence[PieceEntry]: ...

    def chunks(self) -> Iterator[memoryview]:
        """All bytes, `CHUNK` at a time.  They stay as they are until the shard is written."""
        ...


class CheckpointStore:
    """The checkpoints of job `job` below `url`: the newest `keep` of them, and one in `keep_every` steps for ever.

    The one that the job resumed from stays besides, until one is known to be whole that is newer.

    `model`: the fingerprint of the model's shape, JSON values.  `patience`: seconds for which requests are
    tried again while the store fails.  `verify`: whether each shard is read back before the checkpoint counts.
    """

    def __init__(
        self,
        url: str,
        model: Mapping[str, Any],
        keep: int,
        job: str,
        patience: float = 60.0,
        keep_every: int | None = None,
        verify: bool = False,
    ) -> None:
        assert keep >= 1
        self.url, self.model, self.keep, self.job = url, dict(model), keep, job
        self.keep_every, self.verify = keep_every, verify
        self.folder = Folder(url, patience)
        self.writer = ""  # that has a part in the names of its shards, so that no other run overwrites them
        self._owner: Ownership | None = None
        self.refused: set[int] = set()  # steps that did not verify when this job resumed
        self.verified: int | None = None  # the newest step whose bytes came back as they were written

    # Owning

    def claim(self, uid: str, attempt: int) -> str:
        """Make the folder this run's own, on one rank, until `release`; the run's name, to be every rank's `writer`.

        Raises UserError if another job saves to it; StorageUnavailable.
        """
        self._owner = Ownership(self.folder, claim_of(self.job, uid, attempt))
        self._owner.take()
        return self._owner.run

    @property
    def lost(self) -> str:
        """Why the folder is not this run's any more, or nothing."""
        return self._owner.lost if self._owner else ""

    def release(self) -> None:
        """Let others have the folder.  Never raises."""
        if self._owner:
            self._owner.release()

    def _check_owned(self) -> None:
        if self._owner:
            self._owner.check()

    # Saving

    def write_shard(self, step: int, rank: int, image: Image) -> ShardEntry:
        """Stream a rank's shard; what `commit` needs to know of it.

        Another run's checkpoint of the step stays as it is until `commit` takes its place.  Raises SaveFailed.
        """
        file, chunks = shard_name(rank, self.writer), []
        with _saving(step), self.folder.create(step_name(step), file, size=image.bytes) as write:
            for chunk in image.chunks():
                chunks.append(chunk_digest(chunk))
                write(chunk)
        entry = ShardEntry(file, image.bytes, tuple(chunks), tuple(image.pieces))
        if self.verify:
            with _saving(step):
                read_back(self.folder, step_name(step), [entry])
        return entry

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
            self._check_owned()
            self._check_shards(step, shards)
            self.folder.put(step_name(step), MANIFEST, data=data)
        self._remove_others(step, shards)
        self.refused.discard(step)
        if self.verify:
            self.verified = step
        self._remove_superseded(step)
        total = len(data) + sum(entry.bytes for entry in shards)
        return CommittedCheckpoint(
            step, self.folder.uri(step_name(step)), time_string(created), total, digest, self.verify
        )

    def _check_shards(self, step: int, shards: Iterable[ShardEntry]) -> None:
        """Does the committing rank see what the others wrote?"""
        for shard, size in sizes(self.folder, step_name(step), shards):
            if size != shard.bytes:
                raise SaveFailed(
                    f"checkpoint {step_name(step)} could not be saved: {shard.file} was written, but rank 0 "
                    f"finds {_bytes(size)} of its {shard.bytes} bytes in {self.url}; "
                    "checkpoint.path must be a folder that all nodes share"
                )

    def _remove_others(self, step: int, shards: Iterable[ShardEntry]) -> None:
        """What other runs have left of the step."""
        try:
            for file in self.folder.names(step_name(step)).keys() - {MANIFEST, *(s.file for s in shards)}:
                self.folder.remove(step_name(step), file)
        except (WriteFailed, StorageUnavailable, UserError) as error:
            log.warning("what an earlier run left of %s could not be removed: %s", step_name(step), error)

    def abandon(self, step: int) -> None:
        """Remove what a failed save has left, so that a full disk has room for the next one.

        To be called on one rank when all have given up the step.  Does nothing to a committed step, and never
        raises: the next commit tries again.
        """
        try:
            self._check_owned()
            if not is_committed(self.folder, step):
                self.folder.remove_folder(step_name(step))
        except (WriteFailed, StorageUnavailable, UserError) as error:
            log.warning("what is left of %s could not be removed: %s", step_name(step), error)

    def _remove_superseded(self, newest: int) -> None:
        """Removal is no part of the save: when it fails, it is said and tried again after the next one."""
        try:
            self._check_owned()
            committed, unfinished = stored_steps(self.folder)
            for step in superseded(
                committed, unfinished, newest, self.keep, self.keep_every, self.refused, self.verified
            ):
                # The manifest first: from here on the checkpoint does not exist.
                self.folder.remove(step_name(step), MANIFEST)
                self.folder.remove_folder(step_name(step))
                self.refused.discard(step)
        except (WriteFailed, StorageUnavailable, UserError) as error:
            log.warning("an old checkpoint in %s could not be removed: %s", self.url, error)

    # Finding

    def candidates(self) -> list[int]:
        """Steps that were committed, newest first.  Whether they verify is another question."""
        return sorted(stored_steps(self.folder)[0], reverse=True)

    def open(self, step: int) -> Checkpoint:
        """The checkpoint of a step, with its manifest verified.

        Raises BadCheckpoint; UserError if another job or model wrote it; StorageUnavailable.
        """
        checkpoint = open_checkpoint(self.folder, step)
        self._check_owner(checkpoint.manifest, checkpoint.name)
        return checkpoint

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


@contextmanager
def _saving(step: int) -> Iterator[None]:
    """What hinders the save, as SaveFailed.  Errors of the pieces' own making, such as a GPU's, pass
    through."""
    try:
        yield
    except (WriteFailed, StorageUnavailable, UserError, BadCheckpoint) as error:
        raise SaveFailed(f"checkpoint {step_name(step)} could not be saved: {error}") from error


def _bytes(size: int | None) -> str:
    return "none" if size is None else str(size)
