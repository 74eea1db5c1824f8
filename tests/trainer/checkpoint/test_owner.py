"""Who may save to a folder: one run at a time, and after it whoever has the right to."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from threading import Barrier, Thread

import pytest

from internlm_trainer.checkpoint import SaveFailed, StorageUnavailable, owner
from internlm_trainer.checkpoint.folder import Folder
from internlm_trainer.checkpoint.owner import Claim, Ownership, Verdict, claim_of, judge, owner_of
from internlm_trainer.errors import UserError
from trainer.checkpoint.states import PARAMETERS, assert_holds, open_store, resume, save, write

ELSEWHERE = Claim("job", run="theirs", place="there boot pid:[1]", process="1 1")


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(owner, "RENEW", 0.2)
    monkeypatch.setattr(owner, "LEASE", 2.5)
    monkeypatch.setattr(owner, "GRACE", 1.0)


@pytest.mark.parametrize(
    ("there", "mine", "alive", "verdict"),
    [
        (None, Claim("job"), None, Verdict.FREE),
        (Claim("other", released=True), Claim("job"), True, Verdict.FREE),
        (Claim("job", uid="a", attempt=1), Claim("job", uid="a", attempt=2), None, Verdict.FREE),
        # torchrun has restarted the processes of an attempt
        (Claim("job", uid="a", attempt=2), Claim("job", uid="a", attempt=2), None, Verdict.FREE),
        (Claim("job", uid="a", attempt=3), Claim("job", uid="a", attempt=2), None, Verdict.REPLACED),
        # the same name in another namespace, or made anew
        (Claim("job", uid="a", attempt=3), Claim("job", uid="b", attempt=1), None, Verdict.UNKNOWN),
        # no cluster, so attempts mean nothing
        (Claim("job", attempt=3), Claim("job", attempt=1), None, Verdict.UNKNOWN),
        (Claim("job"), Claim("job"), True, Verdict.ALIVE),
        (Claim("job"), Claim("job"), False, Verdict.FREE),
    ],
)
def test_who_may_follow_whom(there, mine, alive, verdict):
    assert judge(there, mine, alive) is verdict


def own(url: str, claim: Claim) -> Ownership:
    ownership = Ownership(Folder(url, patience=5.0), claim)
    ownership.take()
    return ownership


def test_a_second_job_is_refused_with_a_sentence_while_the_first_is_running(url):
    first = own(url, claim_of("a", "", 1))
    with pytest.raises(
        UserError, match=rf"checkpoint.path: {url} is in use by the job 'a' on .*, which is run"
    ):
        own(url, claim_of("b", "", 1))
    first.release()
    own(url, claim_of("b", "", 1)).release()


def test_an_owner_that_cannot_be_looked_up_is_watched_and_refuses_others_while_it_renews(url):
    there = own(url, ELSEWHERE)
    try:
        for job in ("job", "another"):
            with pytest.raises(UserError, match="is in use by the job 'job' on there"):
                own(url, claim_of(job, "uid", 1))
    finally:
        there.release()


def test_an_owner_that_renews_no_more_is_followed(url):
    there = own(url, ELSEWHERE)
    there._over.set()  # its machine is gone
    began = time.monotonic()
    own(url, claim_of("job", "", 1)).release()
    assert time.monotonic() - began > owner.LEASE - 0.5


def test_a_killed_process_of_this_machine_is_followed_at_once(tmp_path):
    script = (
        "import sys; from internlm_trainer.checkpoint.folder import Folder\n"
        "from internlm_trainer.checkpoint.owner import Ownership, claim_of\n"
        "Ownership(Folder(sys.argv[1]), claim_of('job', '', 1)).take(); print('taken', flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"taken\n"
        with pytest.raises(UserError, match="is in use"):
            own(str(tmp_path), claim_of("job", "", 1))
        os.kill(process.pid, 9)
        process.wait()
    began = time.monotonic()
    own(str(tmp_path), claim_of("job", "", 1)).release()
    assert time.monotonic() - began < owner.LEASE


def test_an_older_attempt_neither_gets_in_nor_commits_nor_removes(url, monkeypatch):
    monkeypatch.setattr(owner, "RENEW", 600.0)  # it has not heard of it when it commits
    old, new = open_store(url), open_store(url)
    old.writer = old.claim("uid", 1)
    save(old, 100)
    entries = write(old, 200, world=2)
    new.writer = new.claim("uid", 2)
    save(new, 200)
    with pytest.raises(
        SaveFailed, match=r"attempt 2 of the job 'job' on .* has taken over .*, so this one ends"
    ):
        old.commit(200, entries, {"step": 200}, PARAMETERS)
    assert "has taken over" in old.lost
    old.abandon(200)
    found = resume(open_store(url))
    assert found is not None
    assert_holds(found, 200)
    assert all(new.writer in shard.file for shard in found.manifest.shards)
    with pytest.raises(StorageUnavailable, match=r"attempt 2 of .* has taken over"):
        open_store(url).claim("uid", 1)
    new.release()


def test_a_zombie_hears_of_its_successor_without_committing(url):
    old = own(url, replace(ELSEWHERE, uid="uid"))
    new = own(url, replace(ELSEWHERE, uid="uid", attempt=2, run="new"))
    end = time.monotonic() + 20
    while not old.lost and time.monotonic() < end:
        time.sleep(0.05)
    assert "attempt 2" in old.lost
    old.release()  # of what is not its own any more
    assert not new.lost
    new.release()
    assert list(Folder(url).names(owner.CLAIMS)) == ["00000002.json"]
    assert owner_of(Folder(url)).released


@pytest.mark.parametrize("conditional", [True, False])
def test_of_many_that_come_at_once_one_gets_in(url, conditional, monkeypatch):
    if not conditional:
        monkeypatch.setattr(Folder, "put_new", lambda self, *parts, data: self.put(*parts, data=data) is None)
        monkeypatch.setattr(owner, "SETTLE", 1.0)
    barrier, got, refused = Barrier(4), [], []

    def come(number: int) -> None:
        ownership = Ownership(Folder(url), claim_of(f"job-{number}", "", 1))
        barrier.wait()
        try:
            ownership.take()
            got.append(ownership)
        except UserError as error:
            refused.append(str(error))

    threads = [Thread(target=come, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    assert len(refused) == 3
    got[0].release()


def test_half_a_claim_left_by_a_crash_locks_nobody_out(url):
    Folder(url).put(owner.CLAIMS, "00000007.json", data=b'{"job": "jo')
    own(url, claim_of("job", "", 1)).release()
