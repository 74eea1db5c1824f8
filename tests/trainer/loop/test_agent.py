"""Real processes that hang and die below the pod's agent: what is told of them, and how they start again in place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from trainer.loop.conftest import Channel
from trainer.loop.jobs import Running, TinyJob, descendants

Make = Callable[..., TinyJob]
# In each training process, before anything of the product: does to it what a file named after it says.
FAULTS = """
import ctypes, os, pathlib, threading, time

def hold_the_interpreter():
    while True:
        ctypes.PyDLL(None).sleep(1000)

def raise_in_the_main_thread():
    main = ctypes.c_ulong(threading.main_thread().ident)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(ArithmeticError))

def segfault():
    ctypes.string_at(0)

def wait(file):
    while not file.exists():
        time.sleep(0.02)
    globals()[file.read_text()]()

if "RANK" in os.environ:
    name = f"fault-{os.environ['INTERNLM_ATTEMPT']}-{os.environ['RANK']}"
    threading.Thread(target=wait, args=[pathlib.Path(os.environ["FAULTS"], name)], daemon=True).start()
"""


def cause(run: Running, faults: Path, attempt: int, fault: str) -> None:
    """Do something to rank 1."""
    if fault.startswith("SIG"):
        victim = next(
            pid for pid in run.workers() if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
        )
        os.kill(victim, signal.Signals[fault])
    else:
        file = faults / "new"
        file.write_text(fault)
        file.replace(faults / f"fault-{attempt}-1")


def ended(channel: Channel, attempt: int) -> dict[str, Any] | None:
    """What the agent told of the end of an attempt's processes."""
    ends = (report.get("ended") for report in channel.agents if report["attempt"] == attempt)
    return next((end for end in ends if end), None)


def wait_until(condition: Callable[[], Any], run: Running) -> Any:
    end = time.monotonic() + 120
    while not (found := condition()):
        assert run.process.poll() is None, f"ended:\n{run.log}"
        assert time.monotonic() < end, f"takes too long:\n{run.log}"
        time.sleep(0.02)
    return found


EXPECTED = {
    "SIGSTOP": ("Hung", "rank 1", "it was stopped by a signal (SIGSTOP)"),
    "hold_the_interpreter": ("Hung", "rank 1", "in hold_the_interpreter ("),
    "raise_in_the_main_thread": ("Error", "rank 1: ArithmeticError", ""),
    "segfault": ("Killed", "rank 1 was ended by signal 11 (SIGSEGV)", "Segmentation fault: string_at ("),
}


def test_each_fault_of_a_process_has_a_typed_reason_with_evidence_and_all_ranks_start_again_in_place(
    tiny: Make, channel: Channel, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAULTS)
    job = tiny(
        training={"steps": 100000},
        checkpoint={"everySteps": 100000, "async": True},
        # The limit of the set-up holds, too, where the agent sees no step before the fault.
        recovery={"hangTimeouts": {"stepSeconds": 5, "setupSeconds": 60}},
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run = job.agent(**channel.environment, PYTHONPATH=path, FAULTS=str(tmp_path))
    wait_until(lambda: "  loss " in run.log, run)
    channel.checkpoint = "now"
    saved = wait_until(lambda: next((r for r in channel.reports if r.get("checkpointRequest")), None), run)
    assert saved["checkpointRequest"] == "now"
    channel.checkpoint = ""
    told: dict[str, dict[str, Any]] = {}
    for attempt, fault in enumerate(EXPECTED, 1):
        begin = len(run.log)
        wait_until(lambda begin=begin: run.log.count("  loss ", begin) >= 5, run)
        time.sleep(1)  # the agent sees steps, not only the set-up's end
        cause(run, tmp_path, attempt, fault)
        told[fault] = wait_until(lambda attempt=attempt: ended(channel, attempt), run)
        channel.attempt = attempt + 1
    begin = len(run.log)
    wait_until(lambda: "  loss " in run.log[begin:], run)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 75, run.log
    assert run.message["reason"] == "Stopped"
    assert not descendants(run.process.pid)
    assert run.log.count(f"resuming from step {saved['checkpoint']['step']} ") == len(EXPECTED)
    kept = job.checkpoints / "diagnostics"
    assert {file.name for file in kept.glob("attempt-*/*.stacks")} == {"rank-0.stacks", "rank-1.stacks"}
    for fault, (reason, text, evidence) in EXPECTED.items():
        message = json.loads(told[fault]["message"])
        assert (message["reason"], message["rank"]) == (reason, 1), (fault, message)
        assert text in message["message"], fault
        assert evidence in message.get("evidence", ""), fault


# Ends an attempt of an agent whose operator may say what follows; prints that.
END = """
from internlm_trainer import agent, ranks
agent.WAIT_SECONDS = 0.2
waiting = agent.Agent(ranks.Place(1, 0, 1, "localhost", 1), None)
for attempt in 1, 2:
    print(waiting._next(attempt, agent.End(70, b"{}")))
"""


def test_ended_processes_wait_for_an_operator_to_hear_of_it_and_from_then_on_for_an_order(
    channel: Channel,
) -> None:
    channel.answer = 503
    timer = Timer(4.0, lambda: vars(channel).update(answer=200, attempt=2))
    timer.start()
    try:
        assert orders(channel) == ["2", "None"]
    finally:
        timer.cancel()


@pytest.mark.parametrize("code", [401, 403])
def test_ended_processes_do_not_wait_long_for_an_operator_that_refuses_them(
    channel: Channel, code: int
) -> None:
    channel.answer = code
    assert orders(channel) == ["None", "None"]


def orders(channel: Channel) -> list[str]:
    environment = os.environ | channel.environment
    command = [sys.executable, "-c", END]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()
