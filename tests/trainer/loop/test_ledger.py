"""The token ledger of real training: killed, resumed on other numbers of processes, no row twice and none left out."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import xxhash
from typer.testing import CliRunner

from internlm_operator.manifest import parse_job
from internlm_trainer.cli import app
from internlm_trainer.data.loader import RowLoader
from internlm_trainer.inputs import row_settings
from trainer.loop.jobs import Running, TinyJob, descendants, steps

RECORDER = Path(__file__).parents[1] / "data" / "recorder.py"
ROWS = 4  # of a step, whatever the number of processes
LAST = 60


def life(job: TinyJob, folder: Path) -> Running:
    folder.mkdir()
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.processes}"]
    return job._start([*launch, str(RECORDER)], {"RECORD": str(folder)})


def test_no_row_is_left_out_or_trained_twice_over_kills_and_other_numbers_of_processes(
    tiny: Callable[..., TinyJob], tmp_path: Path
) -> None:
    job = tiny(
        training={"steps": LAST, "validateEverySteps": 1000, "schedule": {"warmupSteps": 2}},
        checkpoint={"everySteps": 5},
        data={"skipSteps": ["22-24", "40"], "minLength": 3},
    )
    starts = []
    for number, (processes, zero, until) in enumerate(
        [(2, (1, 1, 2), 18), (1, (1, 1, 1), 33), (2, (2, 2, 2), None)]
    ):
        job.processes, job.zero = processes, zero
        saved = steps(job.checkpoints)
        starts.append(saved[-1] if saved else 0)
        run = life(job, tmp_path / f"life-{number}")
        if until is None:
            assert run.end() == 0, run.log
        else:
            run.wait_for(f"step {until}/")
            for pid in [run.process.pid, *descendants(run.process.pid)]:
                os.kill(pid, signal.SIGKILL)
            run.kill()
    starts.append(LAST)

    # What counts of each life is what comes before the checkpoint that the next one went on from.
    trained: list[tuple[int, str]] = []
    for number, (first, end) in enumerate(pairwise(starts)):
        for file in (tmp_path / f"life-{number}").iterdir():
            for line in file.read_text().splitlines():
                record = json.loads(line) if line.endswith("}") else {"first": -1}
                if first * ROWS <= record["first"] < end * ROWS:
                    assert record["rows"] == ROWS
                    trained += [(int(offset), digest) for offset, digest in record["given"].items()]
    assert starts[1] > 0
    assert starts[2] > starts[1]
    skipped = {offset for step in (22, 23, 24, 40) for offset in range((step - 1) * ROWS, step * ROWS)}
    assert sorted(offset for offset, _ in trained) == [n for n in range(LAST * ROWS) if n not in skipped]

    spec = parse_job(job.manifest()).spec
    loader = RowLoader(spec.data.train, **row_settings(spec), min_length=3)
    rows = [
        xxhash.xxh3_64_hexdigest(row.tokens.tobytes())
        for row in loader.next_step(LAST * ROWS, range(LAST * ROWS))
    ]
    loader.close()
    assert all(digest == rows[offset] for offset, digest in trained)

    done = CliRunner().invoke(app, ["data", "ledger", str(job.checkpoints), "--json"])
    assert done.exit_code == 0, done.output
    ledger = json.loads(done.stdout)
    (source,) = ledger["sources"]
    assert (ledger["step"], source["rows"], source["skipped_rows"]) == (LAST, LAST * ROWS, len(skipped))
    assert source["tokens"] == LAST * ROWS * 128
    assert divmod(source["rows"], source["rows_of_epoch"]) == (source["epoch"], source["row"])
    done = CliRunner().invoke(app, ["data", "ledger", str(tmp_path)])
    assert done.exit_code == 65
    assert "no finished checkpoint there" in done.stderr


def test_a_job_ends_with_a_step_that_is_trained(tiny: Callable[..., TinyJob]) -> None:
    job = tiny(training={"steps": LAST}, data={"skipSteps": ["3", f"50-{LAST}"]})
    run = job.torchrun()
    assert run.end() != 0
    assert (
        f"data.skipSteps[1]: 50-{LAST} includes the last step, {LAST}; end before it"
        in run.message["message"]
    )
