"""Every layout trains as one process does: the same losses, the same gradient norms, the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.parallel import matrix, ranks
from trainer.parallel.matrix import ROWS, Difference, Layout, Row

PROGRAM = Path(matrix.__file__)
LONG = [(1, 1, 1), (1, 1, 2), (1, 1, 4), (1, 2, 4), (2, 2, 2), (2, 2, 4), (4, 4, 4)]


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


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 20 steps gave, on the CPU, in each of LONG's layouts and in one process."""
    folder = tmp_path_factory.mktemp("long")
    ranks.run(folder, 1, ["fp32", "bf16"], [(1, 1, 1)], devices="")
    ranks.run(folder, 4, ["fp32", "bf16"], LONG, devices="")
    return folder


@pytest.mark.parametrize("degrees", LONG, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_steps_of_four_processes_are_those_of_one(
    long: Path, precision: str, degrees: tuple[int, int, int]
) -> None:
    """Sums are fp32 and only their order differs; bf16 may then round a weight the other way, and steps diverge."""
    one = torch.load(long / f"1-{precision}-1-1-1.pt", weights_only=True)
    four = torch.load(long / f"4-{precision}-{'-'.join(map(str, degrees))}.pt", weights_only=True)
    assert len(one["losses"]) == 20
    assert_within(matrix.apart(four, one), Row(Layout(4, degrees), precision).bounds)


@pytest.mark.timeout(1200)  # the first one trains all
@pytest.mark.parametrize("number", range(len(ROWS)), ids=[", ".join(row.cells[:3]) for row in ROWS])
def test_any_layout_trains_and_resumes_as_one_process_does(trained: Path, number: int) -> None:
    row, found = ROWS[number], matrix.read(trained, number)
    assert_within(matrix.difference(trained, number), row.bounds)
    assert len(set(found["losses"])) == matrix.STEPS - (matrix.SAVED if row.before else 0)  # it learns
    for twin in row.twins:
        assert matrix.apart(found, matrix.read(trained, ROWS.index(twin))).weights == 0


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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.timeout(600)
def test_two_ranks_on_gpus_in_any_layout_train_as_one_does(tmp_path: Path) -> None:
    """NCCL.  fp32 to 1e-5: atomic additions in the embedding's backward make each run differ in the last bits."""
    run(tmp_path, "nccl")
    for number, row in enumerate(matrix.NCCL):
        bounds = Difference(*(max(bound, 1e-5) for bound in row.bounds))
        found = matrix.difference(tmp_path, number, matrix.NCCL)
        print(f"{row.layout}, {row.precision}{', compiled' * row.compiled}: {found}")
        assert_within(found, bounds)
