"""Whose folder it is: one job saves to a folder, and of that job one attempt.

Claims are files `.owner/00000001.json`, `00000002.json`, ...; the highest number owns the folder.  To claim is to
create the next number, which stores do for one of several at once.  So numbers are fencing tokens that only grow
(Burrows, The Chubby lock service, OSDI 2006): an owner that finds a higher one has been replaced and commits
nothing more.  No clocks are compared.  An owner rewrites its claim every `RENEW` seconds; who would follow it
and sees no change for `LEASE` seconds takes it for dead.

Who may follow whom at once: a restarted attempt of a job on a cluster (same uid of the object, no older attempt), and
anyone after a claim that was released, or whose process is known to be gone from this machine.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import Enum

from internlm_trainer.checkpoint.errors import StorageUnavailable
from internlm_trainer.checkpoint.folder import Folder, WriteFailed
from internlm_trainer.errors import UserError

log = logging.getLogger(__name__)

CLAIMS = ".owner"
RENEW, LEASE = 15.0, 60.0  # seconds; a store that fails for a few renewals costs no claim
GRACE = 180.0  # a deleted job of the same name may save so long before it ends
SETTLE = 2.0  # seconds until all writers of a store without conditional writes see the last one's claim


@dataclass(frozen=True)
class Claim:
    """What an owner says of itself."""

    job: str
    uid: str = ""
    """That of the job's object on a cluster."""
    attempt: int = 1
    run: str = ""
    """Its own name, which no other run has."""
    place: str = ""
    """The machine, as far as process ids mean the same there."""
    process: str = ""
    beat: int = 0
    """Grows with every renewal."""
    released: bool = False

    @property
    def who(self) -> str:
        """The owner, for people."""
        host = self.place.split(" ")[0]
        return f"the job {self.job!r}" + (f" on {host}" if host else "")


class Verdict(Enum):
    """What to do about the claim that is there."""

    FREE = "take it"
    REPLACED = "a newer attempt has it"
    ALIVE = "refuse"
    UNKNOWN = "look again later"


def judge(there: Claim | None, mine: Claim, alive: bool | None) -> Verdict:
    """May `mine` follow?  `alive`: whether the other's process is, or None where that cannot be known yet."""
    if there is None or there.released:
        return Verdict.FREE
    if there.uid and there.uid == mine.uid:
        return Verdict.REPLACED if there.attempt > mine.attempt else Verdict.FREE
    if alive is None:
        return Verdict.UNKNOWN
    return Verdict.ALIVE if alive else Verdict.FREE


def claim_of(job: str, uid: str, attempt: int) -> Claim:
    """This process's own claim."""
    return Claim(job, uid, attempt, uuid.uuid4().hex[:8], _place(), _process(os.getpid()))


class Ownership:
    """The claim of one process on a folder: `take`, then renewed by a thread until `release`.

    `lost` is a sentence as soon as another has taken over.
    """

    def __init__(self, folder: Folder, mine: Claim) -> None:
        self._folder, self._mine = folder, mine
        self._number = 0
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._renew, name="owner", daemon=True)
        self.lost = ""

    @property
    def run(self) -> str:
        """Name of this run, for the files that it writes."""
        return self._mine.run

    def take(self) -> None:
        """Claim the folder, waiting to see whether another owner is alive if need be.

        Raises UserError if it is; StorageUnavailable, also if this is an older attempt than the owner's, which
        is no mistake of the user's.
        """
        try:
            while not self._try():
                pass
            self._thread.start()
            for number in _numbers(self._folder):
                if number < self._number:
                    self._folder.remove(CLAIMS, _name(number))
        except WriteFailed as error:
            raise StorageUnavailable(f"{self._folder.url} could not be claimed: {error}") from error

    def _try(self) -> bool:
        number = _highest(self._folder)
        there = _read(self._folder, number) if number else None
        match judge(there, self._mine, _is_running(there) if there else None):
            case Verdict.REPLACED:
                assert there
                raise StorageUnavailable(_replaced(self._folder.url, there))
            case Verdict.ALIVE:
                assert there
                raise UserError(_refusal(self._folder.url, there))
            case Verdict.UNKNOWN:
                assert there
                self._watch(number, there)
        self._number = number + 1
        return self._create()

    def _watch(self, number: int, there: Claim) -> None:
        """Until the claim is released or replaced, or not renewed for as long as a lease lasts."""
        began = changed = time.monotonic()
        log.warning(
            "%s is claimed by %s; waiting for up to %d s to see whether it is alive",
            self._folder.url,
            there.who,
            LEASE,
        )
        latest: Claim | None = there
        while time.monotonic() < changed + LEASE:
            time.sleep(1.0)
            found = _read(self._folder, number)
            if found is None or found.released:
                return
            if latest and found.beat != latest.beat:
                changed = time.monotonic()
                if found.job != self._mine.job or changed > began + GRACE:
                    raise UserError(_refusal(self._folder.url, found))
            latest = found

    def _create(self) -> bool:
        name, data = _name(self._number), _encode(self._mine)
        try:
            created = self._folder.put_new(CLAIMS, name, data=data)
            # Where it can be created twice, the store knows no conditional writes: the last one has it.
            if created and self._folder.put_new(CLAIMS, name, data=data):
                time.sleep(SETTLE)
        except WriteFailed:  # some stores refuse the condition
            self._folder.put(CLAIMS, name, data=data)
            time.sleep(SETTLE)
        found = _read(self._folder, self._number)
        return found is not None and found.run == self._mine.run

    def check(self) -> None:
        """Raises WriteFailed if another has taken over, or nobody can tell."""
        try:
            number = _highest(self._folder)
            if number > self._number:
                there = _read(self._folder, number) or Claim("another job")
                self.lost = _replaced(self._folder.url, there)
        except (StorageUnavailable, UserError) as error:
            raise WriteFailed(f"looking up the owner of {self._folder.url} failed: {error}") from error
        if self.lost:
            raise WriteFailed(self.lost)

    def _renew(self) -> None:
        while not self._over.wait(RENEW) and not self.lost:
            with suppress(WriteFailed):  # told where it matters, when a checkpoint is committed
                self.check()
                with self._lock:
                    if not self._over.is_set():
                        self._mine = replace(self._mine, beat=self._mine.beat + 1)
                        self._folder.put(CLAIMS, _name(self._number), data=_encode(self._mine))

    def release(self) -> None:
        """Let others follow at once.  Never raises; without it they wait for the lease's end."""
        self._over.set()
        if not self._number or self.lost:
            return
        with self._lock, suppress(WriteFailed):
            self._folder.put(CLAIMS, _name(self._number), data=_encode(replace(self._mine, released=True)))


def owner_of(folder: Folder) -> Claim | None:
    """The last claim on a folder, released or not."""
    number = _highest(folder)
    return _read(folder, number) if number else None


def _numbers(folder: Folder) -> list[int]:
    names = (name.removesuffix(".json") for name in folder.names(CLAIMS))
    return [int(name) for name in names if name.isdecimal()]


def _highest(folder: Folder) -> int:
    return max(_numbers(folder), default=0)


def _read(folder: Folder, number: int) -> Claim | None:
    """A claim; one that is cut off, by a crash as it was made, says that there is one and no more."""
    try:
        data = folder.read(CLAIMS, _name(number))
    except FileNotFoundError:
        return None
    try:
        return Claim(**json.loads(data))
    except (ValueError, TypeError):
        return Claim("a job that left half a claim")


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _encode(claim: Claim) -> bytes:
    return json.dumps(asdict(claim)).encode()


def _refusal(url: str, there: Claim) -> str:
    return (
        f"checkpoint.path: {url} is in use by {there.who}, which is running; give each job a folder of its own, or "
        "stop that one first"
    )


def _replaced(url: str, there: Claim) -> str:
    return f"attempt {there.attempt} of {there.who} has taken over {url}, so this one ends"


def _place() -> str:
    """This machine, boot and process-id namespace; empty where that cannot be told."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{socket.gethostname()} {file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process(pid: int) -> str:
    """A process, told from others that have its id at another time; empty where there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{pid} {fields[19]}"


def _is_running(there: Claim) -> bool | None:
    """Whether the claim's process is running, where it was on this machine."""
    if not there.place or there.place != _place():
        return None
    return _process(int(there.process.split()[0])) == there.process
