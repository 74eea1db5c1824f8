"""The small parts of the loop, one by one: the schedule, the last message, the reports, completions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from internlm_trainer.config import OptimizerSpec, ScheduleSpec, TrainingSpec
from internlm_trainer.generate import Sampling, complete
from internlm_trainer.kernels.attention import Documents
from internlm_trainer.optim.schedule import learning_rate
from internlm_trainer.telemetry.report import Reporter, post
from internlm_trainer.telemetry.termination import MAX_BYTES, encode, leave_message
from trainer.loop.conftest import Channel


def training(warmup: int, name: str = "cosine", min_lr: float = 0.0) -> TrainingSpec:
    """A schedule with a peak of 1.0."""
    schedule = ScheduleSpec.model_validate({"name": name, "warmupSteps": warmup, "minLr": min_lr})
    return TrainingSpec(steps=100, optimizer=OptimizerSpec(lr=1.0), schedule=schedule)


@pytest.mark.parametrize(
    ("spec", "step", "total", "rate"),
    [
        (training(4), 0, 10, 0.25),  # the first step moves already
        (training(4), 3, 10, 1.0),  # the warm-up ends at the peak
        (training(4), 4, 10, 1.0),  # where the cosine begins
        (training(1), 5, 10, 0.5),  # half-way
        (training(4, min_lr=0.1), 9, 10, 0.1),  # the last step
        (training(0, min_lr=0.1), 0, 10, 1.0),
        (training(0, min_lr=0.1), 20, 10, 0.1),  # beyond the end it stays
        (training(4, "constant"), 1, 10, 0.5),
        (training(4, "constant"), 9, 10, 1.0),
        (training(10), 9, 10, 1.0),  # all of it is warm-up
        (training(0), 0, 1, 1.0),
    ],
)
def test_the_learning_rate_of_a_step(spec: TrainingSpec, step: int, total: int, rate: float) -> None:
    assert learning_rate(spec, step, total) == pytest.approx(rate)


def test_of_many_processes_that_end_at_once_the_first_leaves_its_message_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import sys\n"
        "from internlm_trainer.telemetry.termination import leave_message\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(leave_message('Error', f'process {sys.argv[1]}' * 50, int(sys.argv[1])))\n"
    )
    file = tmp_path / "message"
    monkeypatch.setenv("INTERNLM_TERMINATION_LOG", str(file))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    for process in processes:
        assert process.stdout
        process.stdout.readline()
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    message = json.loads(file.read_text())
    assert [number for number, first in enumerate(said) if first == "True"] == [message["step"]]
    assert leave_message("Completed", "later", 9) is False
    assert json.loads(file.read_text()) == message


@pytest.mark.parametrize("message", ["x" * 10000, "路径" * 5000, '"\n\\' * 5000, "\udcff" * 5000])
def test_a_message_of_any_length_stays_json_of_a_size_that_the_kubelet_keeps(message: str) -> None:
    line = encode("Error", message, 12)
    assert len(line) < MAX_BYTES
    assert line.count(b"\n") == 1
    said = json.loads(line)
    assert (said["reason"], said["step"]) == ("Error", 12)
    assert len(said["message"]) > 500


def test_without_a_file_for_the_message_every_process_tells_its_own_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("INTERNLM_TERMINATION_LOG", raising=False)
    assert leave_message("Error", "no one reads this")


@pytest.fixture
def reporter(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> Reporter:
    """A reporter to the channel."""
    for name, value in channel.environment.items():
        monkeypatch.setenv(name, value)
    return Reporter()


def test_the_newest_report_arrives_with_the_token_even_at_the_end(
    reporter: Reporter, channel: Channel
) -> None:
    for step in range(100):
        reporter.send({"step": step})
    reporter.close()
    assert channel.reports[-1] == {"step": 99}
    assert len(channel.reports) <= 3  # what came in between was replaced
    assert channel.tokens == {"Bearer the-token"}


@pytest.mark.parametrize("answer", [500, 409, b"not http\r\n\r\n"], ids=["500", "409", "no HTTP"])
def test_a_channel_that_does_not_take_reports_is_told_once_and_tried_again(
    answer: int | bytes, reporter: Reporter, channel: Channel, caplog: pytest.LogCaptureFixture
) -> None:
    channel.answer = answer
    for step in (1, 2):
        with reporter._outage.told():
            post(reporter._url, {"step": step})
    channel.answer = 200
    reporter.send({"step": 3})
    reporter.close()
    assert [report["step"] for report in channel.reports] == [1, 2, 3]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert channel.url in warnings[0]
    assert "training goes on" in warnings[0]


def test_a_report_goes_to_no_one_whose_certificate_another_authority_signed(
    channel: Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from datetime import UTC, datetime

    from internlm_operator import tls

    (tmp_path / "ca.crt").write_bytes(tls.new_authority(datetime.now(UTC)).certificate_pem)
    for name, value in (channel.environment | {"INTERNLM_REPORT_CA_FILE": str(tmp_path / "ca.crt")}).items():
        monkeypatch.setenv(name, value)
    reporter = Reporter()
    reporter.send({"step": 1})
    reporter.close()
    assert channel.reports == []
    assert "certificate verify failed" in caplog.text


class Counting(nn.Module):
    """Thinks that each word is followed by the next number, most surely; notes what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def forward(self, tokens: Tensor, documents: Documents) -> Tensor:
        self.seen.append(tokens.tolist())
        assert documents.lengths == (len(tokens),)
        return nn.functional.one_hot((tokens + 1) % 10, 10).float() * 100


def test_a_completion_ends_before_the_stop_word_or_at_its_longest() -> None:
    assert complete(Counting(), [3], stop=7) == [4, 5, 6]
    assert complete(Counting(), [3], stop=3, max_tokens=2) == [4, 5]


def test_a_completion_sees_no_more_than_the_context() -> None:
    model = Counting()
    complete(model, [1, 2, 3], stop=9, context=2, max_tokens=3)
    assert model.seen == [[2, 3], [3, 4], [4, 5]]


def test_a_completion_is_the_same_for_the_same_seed_and_never_takes_what_is_beyond_the_nucleus() -> None:
    class Even(nn.Module):
        """Half a chance each for 0 and 1, next to none for 2."""

        def __init__(self) -> None:
            super().__init__()
            self.anchor = nn.Parameter(torch.zeros(1))

        def forward(self, tokens: Tensor, _: Documents) -> Tensor:
            return torch.tensor([[5.0, 5.0, 3.0]]).expand(len(tokens), 3)

    first = complete(Even(), [0], stop=9, max_tokens=200, sampling=Sampling(1.0, 0.9))
    assert first == complete(Even(), [0], stop=9, max_tokens=200, sampling=Sampling(1.0, 0.9))
    assert first != complete(Even(), [0], stop=9, max_tokens=200, sampling=Sampling(1.0, 0.9, seed=1))
    assert set(first) == {0, 1}
