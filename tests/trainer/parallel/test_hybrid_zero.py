"""Every layout trains as one process does: the same losses, the same gradient norms, the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

RANKS = Path(__file__).with_name("ranks.py")
LAYOUTS = [
    (1, 1, 1), (1, 1, 2), (1, 1, 4), (1, 2, 2), (1, 2, 4), (1, 4, 4), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4),
]  # fmt: skip
TOLERANCE = 1e-6
"""Relative, of the losses and of the norm of the difference of all fp32 weights.  Ranks add the same numbers in
another order, which moves the last bit (1.2e-7) of a sum; Adam divides by the gradient's size and so does not
enlarge it.  In bf16 the rounding of activations is the same on all layouts, since rows are never split."""


def run(
    folder: Path, processes: int, precision: str, layouts: list[tuple[int, int, int]], optimizer: str = "{}"
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(RANKS), str(folder), precision, json.dumps(layouts), optimizer]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The folder with what one process and what four processes gave, in one precision."""
    if torch.cuda.is_available():
        pytest.skip("on a machine with GPUs the layouts are compared on these, with NCCL")
    folder = tmp_path_factory.mktemp("layouts")
    run(folder, 1, request.param, [(1, 1, 1)])
    run(folder, 4, request.param, LAYOUTS)
    return request.param, folder


def assert_equal(ours: dict[str, Any], reference: dict[str, Any], tolerance: float) -> None:
    assert ours["losses"] == pytest.approx(reference["losses"], rel=tolerance)
    assert ours["norms"] == pytest.approx(reference["norms"], rel=10 * tolerance)
    names = sorted(reference["weights"])
    assert sorted(ours["weights"]) == names
    mine, theirs = (torch.cat([r["weights"][name] for name in names]) for r in (ours, reference))
    assert (mine - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_four_processes_in_any_layout_train_as_one_process_does(
    trained: tuple[str, Path], degrees: tuple[int, int, int]
) -> None:
    precision, folder = trained
    reference = torch.load(folder / f"1-{precision}-1-1-1.pt", weights_only=True)
    ours = torch.load(folder / f"4-{precision}-{'-'.join(map(str, degrees))}.pt", weights_only=True)
    # The comparison means something: the weights moved, and the loss with them.
    assert len(set(reference["losses"])) == 20
    assert_equal(ours, reference, TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_gpus_in_any_layout_train_as_one_does(tmp_path: Path, precision: str) -> None:
    """NCCL.  fp32 to 1e-5: atomic additions in the embedding's backward make each run differ in the last bits."""
    layouts = [(1, 1, 1), (1, 1, 2), (1, 2, 2), (2, 2, 2)]
    run(tmp_path, 1, precision, [(1, 1, 1)])
    run(tmp_path, 2, precision, layouts)
    reference = torch.load(tmp_path / f"1-{precision}-1-1-1.pt", weights_only=True)
    for degrees in layouts:
        ours = torch.load(tmp_path / f"2-{precision}-{'-'.join(map(str, degrees))}.pt", weights_only=True)
        assert_equal(ours, reference, 1e-5 if precision == "fp32" else 1e-3)
