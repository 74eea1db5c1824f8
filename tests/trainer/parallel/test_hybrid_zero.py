"""Every layout trains as one process does: the same losses, the same gradient norms, the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.parallel import matrix
from trainer.parallel.matrix import ROWS, Difference

PROGRAM = Path(matrix.__file__)


def run(folder: Path, *arguments: str, devices: str | None = None) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    command = [sys.executable, str(PROGRAM), str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def assert_within(found: Difference, bounds: Difference) -> None:
    for name, value, bound in zip(Difference._fields, found, bounds, strict=True):
        assert value <= bound, name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what each row gave, on the CPU."""
    folder = tmp_path_factory.mktemp("layouts")
    run(folder, devices="")
    return folder


@pytest.mark.timeout(1200)  # the first one trains all
@pytest.mark.parametrize("number", range(len(ROWS)), ids=[", ".join(row.cells[:3]) for row in ROWS])
def test_any_layout_trains_and_resumes_as_one_process_does(trained: Path, number: int) -> None:
    row, found = ROWS[number], matrix.read(trained, number)
    assert_within(matrix.difference(trained, number), row.bounds)
    assert len(set(found["losses"])) == matrix.STEPS - (matrix.SAVED if row.before else 0)  # it learns
    for twin in row.twins:
        assert torch.equal(found["weights"], matrix.read(trained, ROWS.index(twin))["weights"])


def test_the_documented_table_lists_what_is_tested() -> None:
    page = matrix.PAGE.read_text()
    table = page[page.index(matrix.BEGIN) : page.index(matrix.END)].strip().splitlines()[4:]
    documented = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line]
    assert [cells[:4] for cells in documented] == [row.cells for row in ROWS], (
        "the rows have changed: write the table again, by `python tests/trainer/parallel/matrix.py`"
    )
    for cells, row in zip(documented, ROWS, strict=True):
        assert_within(Difference(*map(float, cells[4:])), row.bounds)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_in_any_layout_train_as_one_does(tmp_path: Path) -> None:
    """NCCL.  fp32 to 1e-5: atomic additions in the embedding's backward make each run differ in the last bits."""
    run(tmp_path, "two")
    for number, row in enumerate(matrix.TWO):
        bounds = Difference(*(max(bound, 1e-5) for bound in row.bounds))
        assert_within(matrix.difference(tmp_path, number, matrix.TWO), bounds)
