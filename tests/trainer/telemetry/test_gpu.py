"""What only a GPU shows: times by events, the peak of memory, NCCL's record of a hang, a full GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from internlm_trainer.machine import card
from internlm_trainer.telemetry.diagnostics import is_out_of_memory, leave_memory_snapshot, record_memory
from internlm_trainer.telemetry.flops import peak_flops
from internlm_trainer.telemetry.memory import peaks
from internlm_trainer.telemetry.stopwatch import Stopwatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_a_section_of_the_gpu_has_the_gpu_s_time_and_nobody_waits_for_it() -> None:
    stopwatch = Stopwatch(torch.device("cuda"))
    torch.cuda.synchronize()
    began = time.perf_counter()
    with stopwatch.section("busy", on_device=True):
        torch.cuda._sleep(10**9)  # cycles: half a second or so
    assert stopwatch.read() == {}  # it is not over yet
    queued = time.perf_counter() - began
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    (measured,) = stopwatch.read().values()
    assert queued < measured < took + 1e-3


def test_this_card_s_peak_and_memory_are_known() -> None:
    device = torch.device("cuda")
    kept = torch.zeros(2**28, dtype=torch.uint8, device=device)
    assert peaks(device)["memory_reserved"] >= peaks(device)["memory_allocated"] >= kept.numel()
    if any(name in card(device) for name in ("A100", "H100", "H200")):
        assert (peak_flops(card(device)) or 0) > 3e14


def test_a_full_gpu_leaves_the_history_of_its_memory(tmp_path: Path) -> None:
    device = torch.device("cuda")
    record_memory(device)
    try:
        with pytest.raises(RuntimeError) as full:
            torch.empty(2**50, dtype=torch.uint8, device=device)
        assert is_out_of_memory(full.value)
        file = leave_memory_snapshot(str(tmp_path), 3)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    assert file == tmp_path / "memory-3.pickle"
    assert file.stat().st_size > 100


HANG = """
import os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from internlm_trainer.telemetry.diagnostics import set_flight_recorder
set_flight_recorder(sys.argv[1], os.environ)
rank = int(os.environ["RANK"])
torch.cuda.set_device(rank % torch.cuda.device_count())
os.environ["NCCL_HOSTID"] = str(rank)  # ranks of one host may not share a GPU
dist.init_process_group("nccl", timeout=timedelta(seconds=10))
tensor = torch.ones(8, device="cuda")
dist.all_reduce(tensor)
torch.cuda.synchronize()
if rank == 0:
    dist.all_reduce(tensor)  # the other rank never comes
time.sleep(120)
"""


def test_a_hang_leaves_nccl_s_flight_record(tmp_path: Path) -> None:
    program = tmp_path / "hang.py"
    program.write_text(HANG)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [sys.executable, *command, str(program), str(tmp_path / "records")],
        check=False,
        timeout=200,
        env=os.environ | {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "30"},
    )
    # Rank 0's, which waited; torchrun ends the other once rank 0 has ended, which may be before it has written all.
    assert (tmp_path / "records" / "flight-recorder-0").stat().st_size > 100
