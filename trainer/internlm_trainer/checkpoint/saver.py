"""Saves beside training: the state is copied while the next step computes, and a thread writes the copy.

Only that step's update waits for the copies, on the device where they come from there.

All ranks are in the same phase of the same save, since they change it only by numbers that they sum up in each
step's exchange, which is there anyway:

    idle -> writing      `begin`: every rank copies its state and writes its shard
    writing -> finishing every rank has written, or failed to; rank 0 has gathered what the manifest needs and
                         commits, or removes what the failed save has left
    finishing -> idle    rank 0 is done

There is one copy of the state in host memory, so a save that is due while one is under way waits for it, and is
taken of the step at which that one is done.  Training is never held up for a store.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch

from internlm_trainer.checkpoint.errors import SaveFailed
from internlm_trainer.checkpoint.format import ShardEntry
from internlm_trainer.checkpoint.load import Checkpoint, CommittedCheckpoint
from internlm_trainer.checkpoint.resume import Collective
from internlm_trainer.checkpoint.snapshot import Snapshot
from internlm_trainer.checkpoint.store import CheckpointStore
from internlm_trainer.checkpoint.tensors import Piece
from internlm_trainer.errors import StepFailed, UserError

log = logging.getLogger(__name__)


class World(Collective, Protocol):
    """The ranks of the job, as far as it takes to save."""

    def total(self, *numbers: int) -> list[int]:
        """Each number's sum over the ranks."""
        ...

    def gather_at_first(self, mine: Any) -> list[Any]:
        """Every rank's object, in the order of the ranks, on rank 0; nothing on the others."""
        ...


class Phase(Enum):
    """Where a save is."""

    IDLE = "idle"
    WRITING = "writing"
    FINISHING = "finishing"


@dataclass(frozen=True)
class Saved:
    """A save that became a checkpoint: `seconds` from its step to its manifest, for `stall` of which training
    stood still."""

    checkpoint: CommittedCheckpoint
    seconds: float
    stall: float


@dataclass(frozen=True)
class Failed:
    """A save that did not, the `count`-th one in a row."""

    step: int
    why: str
    count: int


class Saver:
    """One rank's part in the saves of a job.  Its methods are called by all ranks at the same steps.

    `writes`: whether this rank holds a shard that no other rank writes.  `max_age`: seconds that the last good
    checkpoint may be old when a save fails, before the job does.  They count from the start of this attempt on, since
    a job that was suspended has lost nothing.  `tell` is called on rank 0 when a save ends.
    """

    def __init__(
        self,
        store: CheckpointStore,
        world: World,
        *,
        writes: bool,
        max_age: float,
    ) -> None:
        self._store, self._world, self._writes, self._max_age = store, world, writes, max_age
        self.tell: Callable[[Saved | Failed], None] = lambda _: None
        self._snapshot = Snapshot()
        self._prepared: Future[None] | None = None
        self._copied: Future[None] | None = None
        self._held: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._phase = Phase.IDLE
        self._work: Future[Any] | None = None
        self._step = -1
        self._postponed = False
        self._failures = 0
        self._last_good = time.monotonic()
        self._why = self._given_up = ""
        self._for_good = False  # given up so that another attempt would fare no better
        self._fruitless = True  # no save of this attempt has become a checkpoint yet
        self.saved_step = -1  # of the last save that became a checkpoint, or the one resumed from

    def restore(self, checkpoint: Checkpoint, pieces: Iterable[Piece]) -> None:
        """Load this rank's state from a checkpoint of any layout.  Raises what `Checkpoint.load` does."""
        self._snapshot.restore(checkpoint, pieces)
        if not self._writes:
            self._snapshot.release()
        self.saved_step = checkpoint.step

    def prepare(self, pieces: Iterable[Piece]) -> None:
        """Have the memory for copies before the first save, beside what follows."""
        if self._writes:
            self._prepared = self._thread.submit(self._snapshot.prepare, list(pieces))

    def wanted(self, due: bool) -> bool:
        """Whether `begin` is to be called after this step, where a save is `due` or not."""
        return self._phase is Phase.IDLE and (due or self._postponed)

    def postpone(self, step: int) -> None:
        """A save is due and one is under way."""
        if not self._postponed and self._world.rank == 0:
            log.warning(
                "the save of step %d waits for that of step %d, which is not done yet", step, self._step
            )
        self._postponed = True

    def begin(
        self,
        step: int,
        pieces: Iterable[Piece],
        state: Mapping[str, Any],
        parameters: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Copy the state and write it beside what follows, of which an update begins with `before_update`.

        state: the loop's, as `commit` wants it.
        """
        assert self._phase is Phase.IDLE
        self._began = time.monotonic()
        self._phase, self._step, self._postponed = Phase.WRITING, step, False
        self._state, self._parameters = json.loads(json.dumps(state)), parameters
        self._held = None
        if self._writes:
            if self._prepared:
                self._prepared.result()
            self._snapshot.begin(pieces)
            self._copied = self._thread.submit(self._snapshot.finish)
            self._work = self._thread.submit(self._write, step, self._copied)
        self._stall = time.monotonic() - self._began

    def before_update(self) -> None:
        """Make what follows, which changes the state, wait for the copies of what it was."""
        if self._copied is None:
            return
        began = time.monotonic()
        self._held = self._snapshot.hold()
        if self._snapshot.of_host:
            self._copied.result()
        self._copied = None
        self._stall += time.monotonic() - began

    def _write(self, step: int, copied: Future[None]) -> ShardEntry | str:
        copied.result()  # what was not copied is not written
        try:
            return self._store.write_shard(step, self._world.rank, self._snapshot)
        except SaveFailed as error:
            return str(error)

    # The exchange of each step

    def report(self) -> tuple[int, int, int]:
        """This rank's numbers: whether its part of the phase is done, whether the save has failed, and whether this
        attempt is to be given up, which rank 0 says: 1, or 2 for good.  `heard` takes their sums."""
        done = self._work is None or self._work.done()
        failed = self._phase is Phase.FINISHING and done and isinstance(self._result(), str)
        self._given_up = self._given_up or self._store.lost
        return int(done), int(failed), int(bool(self._given_up)) + self._for_good

    def heard(self, done: int, failed: int, given_up: int) -> None:
        """The sums of all ranks' numbers: go on to the next phase where all are done.

        Raises on all ranks, when a save has failed and the last good checkpoint is too old: StepFailed, or UserError
        where this attempt has saved nothing, so that another one would fail the same way.
        """
        if given_up:
            raise (UserError if given_up > 1 else StepFailed)(self._one(self._given_up))
        if done < self._world.size:
            return
        if self._phase is Phase.WRITING:
            began = time.monotonic()
            self._finish_writing()
            self._stall += time.monotonic() - began
        elif self._phase is Phase.FINISHING:
            self._end(bool(failed))

    def wait(self) -> str | None:
        """Wait until no save is under way; why the last one failed, or None.  The same on all ranks.

        Raises as `heard` does.
        """
        began = time.monotonic()
        if self._phase is Phase.WRITING:
            self._finish_writing()
        if self._phase is Phase.FINISHING:
            self._result()
            self._stall += time.monotonic() - began
            _, failed, _ = self._world.total(*self.report())
            self._end(bool(failed))
            if failed:
                self.heard(*self._world.total(*self.report()))
                return self._one(self._why)
        return None

    def close(self) -> None:
        """Let go of the thread; a save that is under way is lost."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    # Phases

    def _result(self) -> Any:
        """What the thread's work gave, as soon as it is done.  Errors other than a store's are raised here."""
        return self._work.result() if self._work else None

    def _finish_writing(self) -> None:
        outcomes = self._world.gather_at_first(self._result())
        self._phase, self._work = Phase.FINISHING, None
        if self._world.rank == 0:
            entries = [found for found in outcomes if isinstance(found, ShardEntry)]
            failures = [found for found in outcomes if isinstance(found, str)]
            self._work = self._thread.submit(self._finish, entries, failures)

    def _finish(self, entries: list[ShardEntry], failures: list[str]) -> CommittedCheckpoint | str:
        try:
            if failures:
                raise SaveFailed(failures[0])
            return self._store.commit(self._step, entries, self._state, self._parameters, self._world.size)
        except SaveFailed as error:
            self._store.abandon(self._step)
            return str(error)

    def _end(self, failed: bool) -> None:
        result, now = self._result(), time.monotonic()
        self._phase, self._work = Phase.IDLE, None
        # An update that its device has not come to yet finds all copied: it is written.
        if self._held and self._held[1].query():  # type: ignore[no-untyped-call]
            waited_from, waited_to = self._held
            self._stall += waited_from.elapsed_time(waited_to) / 1000
        if not failed:
            self.saved_step, self._failures = self._step, 0
            self._last_good, self._fruitless = now, False
        if isinstance(result, CommittedCheckpoint):
            self.tell(Saved(result, now - self._began, self._stall))
        elif result:
            self._fail(str(result), now - self._last_good)

    def _fail(self, why: str, age: float) -> None:
        self._failures += 1
        self._why = why
        good = self._last_good_in_words(age)
        # What the store refused once, it may take the next time: a restart would only lose what was trained since.
        if age > self._max_age and not (self._fruitless and self._failures == 1):
            self._given_up = f"{why}; {good}, and checkpoint.maxAgeSeconds allows {self._max_age:.0f} s"
            if self._fruitless and not self._store.lost:
                self._for_good = True
                self._given_up += "; mend the store, or give another checkpoint.path"
        elif self._failures == 1:
            log.error("%s; training goes on", why)
        else:
            log.critical(
                "%s; %d SAVES IN A ROW HAVE FAILED: %s, and the job fails when that is more than %d s",
                why,
                self._failures,
                good,
                self._max_age,
            )
        self.tell(Failed(self._step, why, self._failures))

    def _last_good_in_words(self, age: float) -> str:
        if not self._fruitless:
            return f"the last good checkpoint is that of step {self.saved_step}, {age:.0f} s old"
        return f"nothing was saved in the {age:.0f} s since step {max(self.saved_step, 0)}, where this attempt began"

    def _one(self, sentence: str) -> str:
        """The sentence of the rank that has one."""
        return self._world.agree([sentence] if sentence else [])[0]
