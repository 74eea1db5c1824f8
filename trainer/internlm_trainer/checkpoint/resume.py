"""Which checkpoint a job resumes from: the newest one that all ranks can load, agreed on by them.

What is loaded is verified as it comes, so each rank reads what it needs, once, and all of it is good.

A checkpoint is refused when it is known to be damaged: its manifest or a shard is missing, has the wrong size
or the wrong digest.  A save that was cut off, or that a store answered with an error, never wrote a manifest,
so it is no candidate in the first place and the checkpoint before it is the newest.

A store that cannot be read is another matter, since it says nothing about the checkpoint.  Reads are tried
again for a minute.  If the store then still does not serve one checkpoint but does serve an older one whole,
it is that one checkpoint which is lost (an object store that has lost an object answers 500 or 503 for ever),
and the job goes back to the older.  If the store serves none, nothing is wrong with the checkpoints:
StorageUnavailable, and the job is to be tried again.  Never does a job start from step 0 over checkpoints
that it cannot use.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from internlm_trainer.checkpoint.errors import BadCheckpoint, StorageUnavailable
from internlm_trainer.checkpoint.format import step_name
from internlm_trainer.checkpoint.load import Checkpoint
from internlm_trainer.checkpoint.store import CheckpointStore
from internlm_trainer.errors import UserError

log = logging.getLogger(__name__)


class Collective(Protocol):
    """The ranks of the job, as far as it takes to agree."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def agree(self, sentences: list[str]) -> list[str]:
        """All ranks' sentences, in the order of the ranks, the same on every rank.  Every rank calls it."""
        ...


class Alone:
    """A single process."""

    rank, size = 0, 1

    def agree(self, sentences: list[str]) -> list[str]:
        return sentences

    def total(self, *numbers: int) -> list[int]:
        return list(numbers)

    def gather_at_first(self, mine: Any) -> list[Any]:
        return [mine]


def check_store(store: CheckpointStore, world: Collective) -> None:
    """Before the first step: can every rank write to the store, and is it one store for all of them?

    Raises, alike on all ranks, what `CheckpointStore.check_writable` raises on any, and UserError if the
    ranks do not see each other's files.
    """
    _together(world, lambda: store.check_writable())
    if world.size == 1:
        return
    name = _together(world, lambda: [store.leave_probe()] if world.rank == 0 else [])[0]
    try:
        _together(world, lambda: store.find_probe(name))
    finally:
        if world.rank == 0:
            store.remove_probe(name)


def claim_store(store: CheckpointStore, world: Collective, uid: str, attempt: int) -> None:
    """Make the folder this run's own, until the store is released on rank 0.

    `uid`: that of the job's object on a cluster, or nothing.  Raises, alike on all ranks, what
    `CheckpointStore.claim` does.
    """
    names = _together(world, lambda: [store.claim(uid, attempt)] if world.rank == 0 else [])
    store.writer = names[0]


def newest_good(
    store: CheckpointStore, world: Collective, load: Callable[[Checkpoint], None]
) -> Checkpoint | None:
    """The newest checkpoint that `load` took on every rank, or None where no step was ever committed.

    `load` may be called with several, newest first; what one that failed has left must not matter to the next.
    Rank 0 logs why one is refused.  Raises, alike on all ranks: UserError if there are checkpoints and none is
    good, or if another job or model wrote them, and what `load` raises of UserErrors; StorageUnavailable.
    """
    refusals: dict[int, BadCheckpoint | StorageUnavailable] = {}
    # What is committed or removed by a running job while this one looks shows in a second listing.
    while steps := [step for step in _candidates(store, world) if step not in refusals]:
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            try:
                return _loaded(store, world, step, load)
            except (BadCheckpoint, StorageUnavailable) as refusal:
                refusals[step] = refusal
                if isinstance(refusal, BadCheckpoint):
                    store.refused.add(step)
                if world.rank == 0:
                    log.warning("%s", _refusal(step, refusal, following))
    if not refusals:
        return None
    reasons = "; ".join(f"{step_name(step)}: {_why(refusal)}" for step, refusal in refusals.items())
    if any(isinstance(refusal, StorageUnavailable) for refusal in refusals.values()):
        raise StorageUnavailable(f"no checkpoint in {store.url} could be read: {reasons}")
    raise UserError(
        f"checkpoint.path: none of the checkpoints in {store.url} can be used ({reasons}); move the folder "
        "away or give another one to start afresh"
    )


def _loaded(
    store: CheckpointStore, world: Collective, step: int, load: Callable[[Checkpoint], None]
) -> Checkpoint:
    def opened() -> list[str]:
        found.append(store.open(step))
        if world.rank == 0:
            found[0].check_sizes()  # of all shards, before anyone waits for its share of one that is missing
        return [found[0].digest]

    found: list[Checkpoint] = []
    if len(set(_together(world, opened))) > 1:
        raise BadCheckpoint(step_name(step), "not all ranks read the same manifest")
    checkpoint = found[0]
    _together(world, lambda: load(checkpoint))
    store.verified = step
    return checkpoint


def _candidates(store: CheckpointStore, world: Collective) -> list[int]:
    """Rank 0's listing, since two ranks' may differ."""
    listing = _together(world, lambda: [str(s) for s in store.candidates()] if world.rank == 0 else [])
    return [int(step) for step in listing]


# An outcome travels as a word and its sentence; what stands first here is the gravest.
_FAILURES: dict[str, type[Exception]] = {
    "user": UserError,
    "bad": BadCheckpoint,
    "unavailable": StorageUnavailable,
}


def _together(world: Collective, work: Callable[[], list[str] | None]) -> list[str]:
    """The results of `work()` on all ranks; if it failed on any, the gravest failure, raised on all alike."""
    try:
        outcomes = [f"ok {result}" for result in work() or []]
    except BadCheckpoint as error:
        outcomes = [f"bad {error.name} {error.why}"]
    except StorageUnavailable as error:
        outcomes = [f"unavailable {error}"]
    except UserError as error:
        outcomes = [f"user {error}"]
    agreed = [outcome.split(" ", 1) for outcome in world.agree(outcomes)]
    for word, failure in _FAILURES.items():
        for found, sentence in agreed:
            if found == word:
                raise (
                    BadCheckpoint(*sentence.split(" ", 1)) if failure is BadCheckpoint else failure(sentence)
                )
    return [result for _, result in agreed]


def _why(refusal: BadCheckpoint | StorageUnavailable) -> str:
    return refusal.why if isinstance(refusal, BadCheckpoint) else str(refusal)


def _refusal(step: int, refusal: BadCheckpoint | StorageUnavailable, following: int | None) -> str:
    consequence = f"going back to {step_name(following)}" if following is not None else "no older one is left"
    return f"checkpoint {step_name(step)} is not used: {_why(refusal)}; {consequence}"
