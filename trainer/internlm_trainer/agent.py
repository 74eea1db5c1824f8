"""The main process of a worker pod: `python -m internlm_trainer.agent`, with torchrun's options.

It starts the pod's training processes and watches them.  Where one dies or hangs it ends the others, says what
happened over the job channel, and stays: the operator may answer with the number of a new attempt, for which the
agents of all pods start their processes again, from the last checkpoint.  Nobody has to wait for a pod then.

The agents need no barrier of their own: each attempt meets at a port of its own, so that a process never meets
one of an earlier attempt.  What is left of this pod's end is in the termination message, as if the agent were
the process that failed.  No torch is imported here.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError

from internlm_operator.api import HangTimeouts, JobSpec
from internlm_operator.manifest import JobError, load_manifests, parse_job
from internlm_trainer.errors import EXIT_STOPPED
from internlm_trainer.ranks import POLL_SECONDS, Ended, Place, Ranks
from internlm_trainer.storage import join
from internlm_trainer.telemetry import diagnostics, evidence
from internlm_trainer.telemetry.hangs import Beat, Late, Limits, Watch
from internlm_trainer.telemetry.logs import JsonFormatter
from internlm_trainer.telemetry.report import Outage, post
from internlm_trainer.telemetry.termination import encode

log = logging.getLogger("internlm_trainer.agent")

# What a restart would only meet again.
FINAL = ("UserError", "Diverged")
EXIT_HUNG = 70  # sysexits.h: internal software error
LOOK_SECONDS = 0.5
TELL_SECONDS = 5.0
ASK_SECONDS = 1.0
# How long ended processes wait for a new attempt before the pod ends, and with it the chance: since the operator knows
# of it, and in all, since while there is no operator nobody makes a new gang either.
WAIT_SECONDS = 60.0
OUTAGE_SECONDS = 600.0
# Whose peer is gone cannot save; this is for its last words.
CRASH_SECONDS = 5.0
# Where all ranks of a pod wait for those of another, that one's agent shall say first what it sees.
PATIENCE = 1.25
PORTS = 100


class End(NamedTuple):
    """How an attempt ended here."""

    code: int
    """What the container ends with."""
    message: bytes
    """The termination message."""

    @property
    def final(self) -> bool:
        return not self.code or _parse(self.message).get("reason") in FINAL


class Link:
    """Tells the operator how this pod's processes are and hears what to do, from a thread of its own."""

    def __init__(self, node_rank: int, first_attempt: int) -> None:
        self.attempt = first_attempt
        """The newest attempt that the operator wants of this pod."""
        self.finished = False
        """Whether the job is over, or the operator knows of no agents: nothing is to be waited for."""
        self.heard: float | None = None
        """When the operator first answered what was told last, be it with a refusal."""
        url = os.environ.get("INTERNLM_REPORT_URL", "")
        self.url = f"{url.removesuffix('/report')}/agent" if url else ""
        self._state: dict[str, Any] = {"worker": node_rank, "gang": first_attempt, "attempt": first_attempt}
        self._changed = threading.Condition()
        self._told, self._outage = False, Outage(self.url)
        if self.url:
            threading.Thread(target=self._run, name="operator", daemon=True).start()

    def tell(self, attempt: int, end: End | None = None) -> None:
        """The processes of an attempt run, or have ended."""
        ended = {"exitCode": end.code, "message": end.message.decode()} if end else None
        with self._changed:
            self._state |= {"attempt": attempt, "ended": ended}
            self._told, self.heard = True, None
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                pause = ASK_SECONDS if self._state.get("ended") else TELL_SECONDS
                self._changed.wait_for(lambda: self._told, pause)
                state, self._told = dict(self._state), False
            with self._outage.told():
                try:
                    answer = post(self.url, state)
                    self.attempt = max(self.attempt, int(answer.get("attempt", 0)))
                    self.finished = bool(answer.get("finished"))
                    self._note_heard()
                except HTTPError as error:
                    self.finished = error.code in (404, 405)
                    # Other codes are those of nobody who leads, or of one who had no time.
                    if 400 <= error.code < 500 and error.code not in (408, 429):
                        self._note_heard()

    def _note_heard(self) -> None:
        with self._changed:
            if not self._told:
                self.heard = self.heard or time.monotonic()


class Agent:
    """One pod's part of the job."""

    def __init__(self, place: Place, spec: JobSpec | None) -> None:
        self._place, self._spec = place, spec
        self._first = int(os.environ.get("INTERNLM_ATTEMPT", "1"))
        self._link = Link(place.node_rank, self._first)
        self._stopping = False
        self._uploads: list[evidence.Upload] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: Any) -> None:
        self._stopping = True

    def run(self) -> int:
        """Train, attempt after attempt; the exit code."""
        attempt = self._first
        while True:
            end = self._train(attempt)
            following = self._next(attempt, end) if end else self._link.attempt
            if end and following is None:
                for upload in self._uploads:
                    upload.wait()
                return _leave(end)
            assert following is not None
            attempt = following
            log.warning("attempt %d starts in place, from the last checkpoint", attempt)

    def _next(self, attempt: int, end: End) -> int | None:
        """The attempt that the operator wants here after this end; None if the pod is to end."""
        if end.final or self._stopping or not self._link.url:
            return None
        self._link.tell(attempt, end)
        deadline = time.monotonic() + OUTAGE_SECONDS
        while time.monotonic() < deadline and not self._stopping and not self._link.finished:
            if self._link.attempt > attempt:
                return self._link.attempt
            if heard := self._link.heard:
                deadline = min(deadline, heard + WAIT_SECONDS)
            time.sleep(POLL_SECONDS)
        return None

    def _train(self, attempt: int) -> End | None:
        """How the attempt ended here; None if the operator wants another one instead."""
        port = self._place.master_port + (attempt - self._first) % PORTS
        environment = os.environ | {"INTERNLM_ATTEMPT": str(attempt)}
        if self._place.nproc_per_node > 1:
            environment.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
        with tempfile.TemporaryDirectory(prefix="internlm-", dir=_memory()) as folder:
            killed_before = evidence.out_of_memory_kills()
            ranks = Ranks(self._place._replace(master_port=port), environment, Path(folder))
            try:
                self._link.tell(attempt)
                end = self._follow(ranks, attempt)
                if end is None and self._link.attempt > attempt:
                    ranks.end(CRASH_SECONDS)
                    return None
                return end or self._end(ranks, attempt, killed_before)
            finally:
                ranks.end(0.0)

    def _follow(self, ranks: Ranks, attempt: int) -> End | None:
        """Until a process fails, all are done, another attempt is wanted, or the pod is to stop; or one hangs."""
        watch, looked, waiting = Watch(_limits(self._spec)), 0.0, None
        while ranks.running() and not any(one.code for one in ranks.ended()):
            if self._link.attempt > attempt or self._stopping:
                return None
            time.sleep(POLL_SECONDS)
            if time.monotonic() - looked < LOOK_SECONDS:
                continue
            looked = time.monotonic()
            beats = ranks.beats()
            late = watch.look(beats, looked)
            patient = late is not None and late.beat == waiting and late.seconds < PATIENCE * late.limit
            if late is None or patient:
                continue
            found = evidence.look_into(
                {beat.rank: ranks.processes[beat.rank].pid for beat in beats}, ranks.folder
            )
            beat = evidence.culprit(beats, found)
            if found[beat.rank].waits_for_others and late.seconds < PATIENCE * late.limit:
                waiting = late.beat
                continue
            return self._hung(ranks, attempt, late, beat, found[beat.rank])
        return None

    def _end(self, ranks: Ranks, attempt: int, killed_before: int) -> End:
        """End what is left when a process has failed, all are done, or the pod is to stop."""
        first, end = _failed(ranks), None
        if first and not self._stopping:
            end = _typed(ranks, first, evidence.out_of_memory_kills() > killed_before)
            self._link.tell(attempt, end)  # before those of other pods tell that they lost their peer
        # Who is told to stop, by the pod or by a signal of its own, saves with the others.
        saves = first is None or first.code == EXIT_STOPPED or self._stopping
        ranks.end(_stop_seconds() if saves else CRASH_SECONDS)
        if end:
            return end
        first = _failed(ranks)
        if first is None:
            return End(0, _read(ranks.message_file))
        if self._stopping and not ranks.message_file.exists():
            return End(EXIT_STOPPED, encode("Stopped", "was stopped before it could save", None))
        return _typed(ranks, first, evidence.out_of_memory_kills() > killed_before)

    def _hung(self, ranks: Ranks, attempt: int, late: Late, beat: Beat, found: evidence.Found) -> End:
        """Keep what there is to know and end the processes."""
        kept = ""
        if self._spec:
            folder = diagnostics.folder(self._spec.telemetry.diagnostics_path)
            evidence.take_flight_records(list(ranks.running()), folder, ranks.folder)
            url = join(self._spec.checkpoint.path, "diagnostics", f"attempt-{attempt}")
            self._uploads.append(evidence.Upload(ranks.folder, url))
            kept = f"; all ranks' stacks are in {url}"
        ranks.end(0.0)
        who = "waits for the others" if found.waits_for_others else "hangs"
        time_there = f"for {late.seconds:.0f} s, of {late.limit:.0f} s allowed"
        text = f"rank {beat.rank} {who} in {beat.place} {time_there}: {found.telling}{kept}"
        said = f"rank {beat.rank}, {beat.place}: {found.telling}"
        log.error("%s", text)
        return End(EXIT_HUNG, encode("Hung", text, None, rank=beat.rank, evidence=said))


def _failed(ranks: Ranks) -> Ended | None:
    return next((one for one in ranks.ended() if one.code), None)


def _typed(ranks: Ranks, first: Ended, out_of_memory: bool) -> End:
    """What the processes said of their end, of which `first` failed first, or else what is seen of it."""
    code = first.code if first.code > 0 else 128 - first.code
    if said := _parse(_read(ranks.message_file)):
        return End(code, encode(said["reason"], said["message"], said.get("step"), rank=first.rank))
    crash = evidence.crash_of(ranks.folder, first.rank)
    told = {"evidence": f"rank {first.rank}: {crash.telling}"} if crash else {}
    if out_of_memory and first.code == -signal.SIGKILL:
        reason, text = (
            "OOMKilled",
            f"rank {first.rank} was killed: the container used more memory than its limit",
        )
    elif first.code < 0:
        name = signal.Signals(-first.code).name
        reason, text = "Killed", f"rank {first.rank} was ended by signal {-first.code} ({name})"
    else:
        reason = "Error"
        text = f"rank {first.rank} ended with exit code {first.code} and said nothing; its log may say why"
    text += f": {crash.telling}" if crash else ""
    log.error("%s", text)
    return End(code, encode(reason, text, None, rank=first.rank, **told))


def _leave(end: End) -> int:
    """Write the termination message, as the kubelet reads it."""
    path = os.environ.get("INTERNLM_TERMINATION_LOG")
    if path and end.message:
        Path(path).write_bytes(end.message)
    return end.code


def _limits(spec: JobSpec | None) -> Limits:
    asked = spec.recovery.hang_timeouts if spec else HangTimeouts()
    return Limits(asked.setup_seconds, asked.step_seconds, asked.checkpoint_seconds)


def _stop_seconds() -> float:
    """For a checkpoint after SIGTERM, under torchrun's name for it."""
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


def _memory() -> str | None:
    """A folder in memory, where there is one: heartbeats are written some times a step."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _parse(message: bytes) -> Mapping[str, Any]:
    try:
        content = json.loads(message)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _read_spec() -> JobSpec | None:
    """The job, as far as the agent needs it; what is wrong with it, the training processes say."""
    try:
        return parse_job(load_manifests(Path(os.environ["INTERNLM_JOB_FILE"]))[0]).spec
    except (JobError, KeyError):
        return None


def main() -> int:
    """Run this pod's part of the job."""
    parser = argparse.ArgumentParser(prog="python -m internlm_trainer.agent", description=__doc__)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("--master-addr", default="127.0.0.1")
    parser.add_argument("--master-port", type=int, default=29500)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    place = Place(**vars(parser.parse_args()))
    return Agent(place, _read_spec()).run()


if __name__ == "__main__":
    sys.exit(main())
