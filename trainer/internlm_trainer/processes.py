"""The processes of a job: who they are, what they agree on, and when they are told to stop.

Decisions travel over a gloo group of their own, on the host, so that none of them waits for a GPU.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from internlm_trainer.checkpoint import StorageUnavailable
from internlm_trainer.errors import DataError, UserError
from internlm_trainer.storage import StorageUnreachableError

T = TypeVar("T")

# Rank 0 makes tokenizer and data from raw text while the others wait; nothing else takes this long.
SETUP_TIMEOUT = timedelta(hours=24)
# How long a process that failed waits to see whether another one of its machine had died before.
SIBLING_SECONDS = 2.0


class Stopped(BaseException):
    """The job was asked to stop (SIGTERM or Ctrl-C).

    No Exception: it is raised wherever the signal finds the process, and what tries a store's requests again
    after any error must not take it for one.
    """


class SiblingDied(BaseException):
    """torchrun ends this process because another one of this machine died, whose end is the one to tell."""


class Processes:
    """The ranks that torchrun started, seen from one of them."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._stop_asked = False
        self._training = False
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if torch.cuda.is_available():
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=self.device)
        else:
            self.device = torch.device("cpu")
            dist.init_process_group("gloo")
        control = dist.new_group(backend="gloo", timeout=SETUP_TIMEOUT)
        assert isinstance(control, dist.ProcessGroup)
        self._control = control
        self.formed_at = time.monotonic()
        here = (os.environ.get("GROUP_RANK"), os.getpid())
        self._siblings = [pid for node, pid in self.gather(here) if node == here[0] and pid != here[1]]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: Any) -> None:
        if not self._training:
            raise SiblingDied if self._lacks_sibling() else Stopped
        self._stop_asked = True

    def _lacks_sibling(self) -> bool:
        """Whether another process of this machine is gone: torchrun has reaped it before it ends the others."""
        for pid in self._siblings:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return True
        return False

    def train(self) -> None:
        """From here on a signal ends the step at hand instead of interrupting it."""
        self._training = True

    def another_died(self) -> bool:
        """Whether another process of this machine died before this one failed; waits a moment to see.

        Who has lost its peer fails at once, torchrun reaps the peer a tenth of a second later.
        """
        self._training = True
        deadline = time.monotonic() + SIBLING_SECONDS
        while not (gone := self._lacks_sibling()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return gone

    def close(self) -> None:
        dist.destroy_process_group()

    def agree(self, sentences: list[str]) -> list[str]:
        """All ranks' sentences, in the order of the ranks."""
        return [sentence for one in self.gather(sentences) for sentence in one]

    def gather(self, mine: T) -> list[T]:
        """Every rank's object, in the order of the ranks, on every rank."""
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine, group=self._control)
        return everyone

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank; a user's mistake, or damaged data, that any of them finds is raised on all."""
        result, failure = None, None
        try:
            result = work()
        except (UserError, StorageUnavailable) as error:
            # An unreachable store may be reachable in a minute: not the user's mistake, and worth a retry.
            passing = isinstance(error, (StorageUnreachableError, StorageUnavailable))
            damaged = DataError if isinstance(error, DataError) else UserError
            failure = (StorageUnavailable if passing else damaged, str(error))
        failures = [found for found in self.gather(failure) if found]
        if failures:
            kind, sentence = failures[0]
            raise kind(sentence)
        return result  # type: ignore[return-value]

    def first(self, work: Callable[[], object]) -> None:
        """Run `work` on rank 0 while the others wait; a user's mistake that it finds is raised on all."""
        self.together(work if self.rank == 0 else lambda: None)

    def gather_at_first(self, mine: T) -> list[T]:
        """Every rank's object, in the order of the ranks, on rank 0; nothing on the others."""
        everyone: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(mine, everyone, group=self._control, group_dst=0)
        return everyone or []

    def total(self, *numbers: int) -> list[int]:
        """Each number's sum over the ranks."""
        sums = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(sums, group=self._control)
        return list(sums.tolist())

    def exchange(self, *numbers: int) -> tuple[list[int], bool]:
        """Each step's one exchange: (each number's sum over the ranks, whether any of them was asked to stop)."""
        *totals, stops = self.total(*numbers, self._stop_asked)
        return totals, stops > 0

    def largest(self, number: int) -> int:
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._control)
        return int(numbers)
