"""A process that saves step after step, to be killed.  Usage: saver.py URL, then lines on standard input.

    run             save from the step after the newest good one on, for ever
    stop-in STAGE   the same, but stand still at a stage of the second save: `shard` (in the middle of one),
                    `manifest` (all shards are there)

For each line a child is forked, so that torch is imported once; its process id is printed, then what it does.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from itertools import count

from states import PARAMETERS, open_store, pieces, resume

from internlm_trainer.checkpoint import CheckpointStore, Snapshot

# Large enough that a save takes a while: 13 MB.
LARGE = {name: (shape[0] * 1500, *shape[1:]) for name, shape in PARAMETERS.items()}
WORLD = 2


def say(line: str) -> None:
    print(line, flush=True)


def stand_still(step: int) -> None:
    say(f"standing {step}")
    time.sleep(600)


class Slow(Snapshot):
    """Stands still in the middle of being written."""

    step = 0

    def chunks(self) -> Iterator[memoryview]:
        for number, chunk in enumerate(super().chunks()):
            if number == 1:
                stand_still(self.step)
            yield chunk


def image(step: int, rank: int, stage: str) -> Snapshot:
    snapshot = Snapshot()
    if stage == "shard" and rank == 1:
        snapshot = Slow()
        snapshot.step = step
    return snapshot.take(pieces(step, rank, WORLD, LARGE))


def train(store: CheckpointStore, stage: str) -> None:
    newest = resume(store)
    first = newest.step + 1 if newest else 1
    for step in count(first):
        here = stage if step > first else ""
        say(f"saving {step}")
        entries = [store.write_shard(step, rank, image(step, rank, here)) for rank in range(WORLD)]
        if here == "manifest":
            stand_still(step)
        store.commit(step, entries, {"step": step}, LARGE)
        say(f"committed {step}")


def main() -> None:
    url = sys.argv[1]
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                say(f"pid {os.getpid()}")
                train(open_store(url, keep=2), line.split()[-1])
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        say("ended")


if __name__ == "__main__":
    main()
