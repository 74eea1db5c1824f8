"""kill -9 while a process saves: what was committed before is still there, and what was not is never used."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from trainer.checkpoint.states import assert_holds, open_store, resume


@dataclass
class Saver:
    """saver.py, and what its present child says."""

    url: str
    process: subprocess.Popen[str]

    def line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline().strip()
        assert line, "the saver has died"
        return line

    def start(self, command: str) -> int:
        assert self.process.stdin
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return int(self.line().removeprefix("pid "))

    def kill(self, child: int) -> list[str]:
        """Kill the child; what it still said."""
        os.kill(child, signal.SIGKILL)
        return list(iter(self.line, "ended"))


@pytest.fixture
def saver(url: str) -> Iterator[Saver]:
    with subprocess.Popen(
        [sys.executable, Path(__file__).with_name("saver.py"), url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Saver(url, process)


@pytest.mark.parametrize("url", ["local", "s3"], indirect=True)
@pytest.mark.parametrize("stage", ["shard", "manifest"])
def test_a_save_killed_before_its_manifest_is_never_used_but_the_one_before_it(saver, stage):
    child = saver.start(f"stop-in {stage}")
    said = [saver.line() for _ in range(4)]
    assert said == ["saving 1", "committed 1", "saving 2", "standing 2"]
    assert saver.kill(child) == []
    store = open_store(saver.url)
    assert store.folder.names("step-00000002") != {}  # it was half there
    assert_holds(resume(store), 1)


@pytest.mark.parametrize("url", ["local", "s3"], indirect=True)
def test_a_process_killed_at_random_moments_never_loses_a_checkpoint_nor_leaves_a_wrong_one(saver):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    moments, committed = random.Random(seed), 0
    for _ in range(6):
        child = saver.start("run")
        said: list[str] = []
        while f"saving {committed + 2}" not in said:  # so it has resumed and saved once
            said.append(saver.line())
        time.sleep(moments.uniform(0, 0.15))
        said += saver.kill(child)
        committed = max(int(line.split()[1]) for line in said if line.startswith("committed"))
        started = max(int(line.split()[1]) for line in said if line.startswith("saving"))
        found = resume(open_store(saver.url))
        assert found is not None
        # The last manifest may have been written without a word of it.
        assert committed <= found.step <= started
        assert_holds(found, found.step)
        committed = found.step
