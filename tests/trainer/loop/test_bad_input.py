"""What a user may get wrong: one clear sentence before the first step, and an end that is not tried again."""

from __future__ import annotations

import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainer.conftest import Minio
from trainer.loop.conftest import Finished
from trainer.loop.jobs import Corpus, Running, TinyJob, losses, steps

Make = Callable[..., TinyJob]
Break = Callable[[TinyJob, Corpus, Path], None]


def _empty_folder(job: TinyJob, _: Corpus, folder: Path) -> None:
    (folder / "nothing").mkdir()
    job.data = {"train": [{"path": str(folder / "nothing")}]}


def _no_folder(job: TinyJob, _: Corpus, folder: Path) -> None:
    job.data = {"train": [{"path": str(folder / "absent")}]}


def _too_little_text(job: TinyJob, corpus: Corpus, _: Path) -> None:
    job.data = {"train": [{"path": str(corpus.validation)}]}
    job.training = {"globalBatchTokens": None, "microBatchSize": 65536}


def _no_tokenizer(job: TinyJob, _: Corpus, folder: Path) -> None:
    job.data = {"tokenizer": str(folder / "absent.model")}


def _other_tokenizer(job: TinyJob, _corpus: Corpus, _: Path) -> None:
    job.model = {"vocabSize": 1000}


def _folder_is_a_file(job: TinyJob, _corpus: Corpus, folder: Path) -> None:
    (folder / "file").write_text("mine")
    job.checkpoint = {"path": str(folder / "file")}


CASES: dict[str, tuple[Break, str]] = {
    "a data folder that is empty": (_empty_folder, r"data\.train\[0\]\.path: .*/nothing"),
    "a data folder that is not there": (_no_folder, r"data\.train\[0\]\.path: .*/absent"),
    "a corpus shorter than a row": (_too_little_text, r"data\.train\[0\]\.path: .*/validation"),
    "a tokenizer that is not there": (_no_tokenizer, r"data\.tokenizer: .*absent\.model does not exist"),
    "a tokenizer of another size": (_other_tokenizer, r"tokenizer\.model.* 512 .*1000|1000 .* 512"),
    "a checkpoint path that is a file": (_folder_is_a_file, r"checkpoint\.path: .*/file"),
}


def refused(job: TinyJob, sentence: str, **environment: str) -> None:
    """Run a job that must not take a step."""
    check_refused(job.alone(**environment), sentence)


def check_refused(run: Running, sentence: str, reason: str = "UserError") -> None:
    """The run ends with a message that matches `sentence`, and prints it once, and does not take a step."""
    code = run.end()
    assert code == (65 if reason in ("UserError", "DataError") else 1), run.log
    assert run.message["reason"] == reason
    told = run.message["message"]
    assert re.search(sentence, told), told
    assert run.message["step"] is None
    assert "\n" not in told
    assert run.log.count(told) == 1, run.log
    assert "Traceback" not in run.log
    assert losses(run.log) == {}


@pytest.fixture(scope="module", autouse=True)
def unreachable(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, str]]:
    """A job whose store does not answer, and the store's address.

    It tries for a minute, during which the other tests of this module run.
    """
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        job = TinyJob(corpus, tmp_path_factory.mktemp("unreachable"), processes=1, zero=(1, 1, 1))
        job.checkpoint = {"path": "s3://bucket/run"}
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
        run = job.alone(AWS_ENDPOINT_URL=endpoint, **keys)
        yield run, endpoint
        run.kill()


@pytest.mark.parametrize("case", CASES)
def test_a_job_is_refused_with_one_sentence_for(
    case: str, tiny: Make, corpus: Corpus, tmp_path: Path
) -> None:
    break_it, sentence = CASES[case]
    job = tiny(processes=1, zero=(1, 1, 1))
    break_it(job, corpus, tmp_path)
    refused(job, sentence)


def test_damaged_data_is_no_mistake_of_the_users(tiny: Make, corpus: Corpus, tmp_path: Path) -> None:
    """It may have been damaged on its way, so the operator tries again, unlike after a UserError."""
    damaged = shutil.copytree(corpus.validation, tmp_path / "damaged")
    for file in damaged.rglob("*.bin"):
        file.write_bytes(file.read_bytes().replace(b'"tokens"', b'"tokenz"'))
    job = tiny(processes=1, zero=(1, 1, 1), data={"validation": [{"path": str(damaged)}]})
    check_refused(job.alone(), r"damaged/.*\.bin, .*: not a tokenized sample", "DataError")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": {"layers": 3}}, r"checkpoints of another model .*layers is 2 there and 3 here"),
        ({"name": "other"}, r"checkpoints of the job 'tiny' .*and this is 'other'"),
        ({"training": {"steps": 50}}, r"asks for 50 steps, but .* is further already"),
    ],
    ids=["another model", "another job", "more steps than are asked for"],
)
def test_a_folder_with_checkpoints_is_refused_that_are_those_of(
    settings: dict[str, object], sentence: str, tiny: Make, uninterrupted: Finished
) -> None:
    job = tiny(processes=1, zero=(1, 1, 1), **settings)
    shutil.copytree(uninterrupted.job.checkpoints, job.checkpoints)
    before = steps(job.checkpoints)
    refused(job, sentence)
    assert steps(job.checkpoints) == before


def test_a_job_whose_folder_another_one_is_training_into_is_refused_and_does_not_disturb_it(
    tiny: Make, tmp_path: Path
) -> None:
    alone = {"processes": 1, "zero": (1, 1, 1), "training": {"steps": 100000}}
    first = tiny(**alone, checkpoint={"everySteps": 100000})
    run = first.alone()
    run.wait_for("step 5/")
    second = tiny(**alone, name="other", folder=tmp_path / "other")
    second.checkpoint = {"path": str(first.checkpoints)}
    refused(
        second, rf"checkpoint\.path: {first.checkpoints} is in use by the job 'tiny' on .*, which is running"
    )
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 75, run.log
    assert run.message["reason"] == "Stopped"
    assert steps(first.checkpoints) == [run.message["step"]]


@pytest.mark.usefixtures("minio")
def test_a_bucket_that_does_not_exist_is_named(tiny: Make) -> None:
    job = tiny(processes=1, zero=(1, 1, 1), checkpoint={"path": "s3://absent-bucket/run"})
    refused(job, r"checkpoint\.path: .*absent-bucket")


def test_wrong_credentials_are_told_from_a_wrong_path(tiny: Make, minio: Minio) -> None:
    job = tiny(processes=1, zero=(1, 1, 1), checkpoint={"path": f"{minio.bucket()}/run"})
    refused(job, r"checkpoint\.path: .*(credentials|secret|key)", AWS_SECRET_ACCESS_KEY="wrong")


def test_a_store_that_cannot_be_reached_is_worth_another_try(unreachable: tuple[Running, str]) -> None:
    run, endpoint = unreachable
    check_refused(run, f"cannot be reached at {endpoint}", "StorageUnreachable")


def test_all_processes_end_with_the_sentence_that_one_of_them_prints(tiny: Make, tmp_path: Path) -> None:
    job = tiny(data={"train": [{"path": str(tmp_path / "absent")}]})
    run = job.internlm_run()
    assert run.end() == 65, run.log
    assert run.log.count(f"data.train[0].path: {tmp_path / 'absent'}") == 1, run.log
    assert "Traceback" not in run.log
    assert "torch/distributed" not in run.log


def test_weights_that_became_infinite_end_the_job_and_leaves_the_last_checkpoint_as_it_was(
    tiny: Make,
) -> None:
    # Without a floor under the second moment, words that stop occurring get an infinite step.
    optimizer = {"lr": 1.0, "betas": [0.9, 0.0], "eps": 1e-44, "clipGradNorm": 0.0}
    job = tiny(processes=1, zero=(1, 1, 1))
    job.training = {"optimizer": {"lr": 1e-6}, "schedule": {}, "steps": 2}
    first = job.alone()
    assert first.end() == 0, first.log
    assert steps(job.checkpoints) == [2]
    before = {file: file.read_bytes() for file in job.checkpoints.glob("step-*/*")}
    job.training = {"optimizer": optimizer, "schedule": {}}
    job.checkpoint = {"everySteps": 1000}
    run = job.alone()
    assert run.end() == 1, run.log
    assert run.message["reason"] == "Diverged"
    assert re.search(r"after step \d+, [a-z.]+ holds numbers that are infinite", run.message["message"])
    assert "lower training.optimizer.lr" in run.message["message"]
    assert "the last checkpoint is untouched" in run.message["message"]
    assert "Traceback" not in run.log
    assert {file: file.read_bytes() for file in job.checkpoints.glob("step-*/*")} == before
