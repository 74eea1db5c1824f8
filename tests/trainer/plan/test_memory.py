"""The planner counts what the allocator counts."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from internlm_trainer import config
from internlm_trainer.assembly import DTYPES
from internlm_trainer.config import LOSS_CHUNK, ModelShape, TrainSpec
from internlm_trainer.kernels import attention
from internlm_trainer.kernels.attention import Documents
from internlm_trainer.kernels.products import PLAIN
from internlm_trainer.model.internlm import Block, InternLM, decays, hidden_matrices, initialise
from internlm_trainer.optim.optimizer import MasterOptimizer
from internlm_trainer.parallel.compile import apply_compile
from internlm_trainer.parallel.hybrid_zero import HybridZero
from internlm_trainer.parallel.layout import ZeroLayout
from internlm_trainer.parallel.recompute import apply_recompute
from internlm_trainer.plan.memory import Work, memory, states
from internlm_trainer.plan.units import model_units
from trainer.live import LiveBytes
from trainer.plan.jobs import job, seven_b, small

GIB = 2**30


@pytest.mark.parametrize(
    "shape",
    [
        ModelShape(3, 96, 6, 6, 256, 300, 1e-6, 10000, True),
        ModelShape(2, 64, 8, 2, 176, 300, 1e-5, 10000, False),
    ],
)
def test_units_have_the_models_numbers_of_parameters(shape: ModelShape) -> None:
    with torch.device("meta"):
        model = InternLM(shape)
    units = model_units(shape)
    parts = (model.embedding, model.blocks[0], model.norm, model.head)
    assert [unit.parameters for unit in units] == [
        sum(p.numel() for p in part.parameters()) for part in parts
    ]
    assert units.block.copies == len(model.blocks)


def test_states_are_to_the_byte_what_four_processes_hold_in_any_layout(tmp_path: Path) -> None:
    degrees = [(1, 1, 1), (1, 1, 4), (1, 2, 4), (2, 2, 2), (2, 4, 4), (4, 4, 4), (1, 1, 4), (1, 1, 1)]
    adamw: dict[str, str] = {}
    cases = [(d, {}, "bf16", 1 + number % 2, adamw) for number, d in enumerate(degrees)]
    cases += [(d, {"accumulation": "full"}, "fp32", 2, adamw) for d in ((1, 2, 4), (4, 4, 4))]
    cases += [(d, {"offload": "optimizer"}, "bf16", 2, adamw) for d in ((1, 1, 4), (2, 2, 4))]
    cases += [(d, {}, "fp32", 2, {"stateType": "bf16", "name": "muon"}) for d in ((1, 1, 1), (1, 1, 4))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    command += [str(Path(__file__).with_name("states_ranks.py")), str(tmp_path / "held"), json.dumps(cases)]
    path = os.pathsep.join([*sys.path, str(Path(__file__).parents[2])])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "held").read_text())
    for (layout, zero, precision, micro_batches, optimizer), held in zip(cases, measured, strict=True):
        spec = small(
            4, layout, zero=zero, precision=precision, micro_batches=micro_batches, optimizer=optimizer
        )
        counted = states(Work.of(spec, 4, gpu=False), ZeroLayout(4, *layout, 4))
        assert sum(counted) == held, (layout, zero, precision, micro_batches, optimizer)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def train_step(spec: TrainSpec, lengths: tuple[int, ...], device: torch.device) -> Iterator[None]:
    """The trainer's step on one process, over and over; the parts are made in the first."""
    shape, cpu = config.model_shape(spec.model), device
    dtype = DTYPES[spec.training.precision]
    float8 = None
    if spec.training.precision == "fp8":
        from internlm_trainer.parallel.float8 import Float8  # needs Triton

        float8 = Float8()
    with torch.device("meta"):
        model = InternLM(shape, attention.choose(device, dtype).attention, float8 or PLAIN)
    zero = HybridZero(
        model,
        [model.embedding, *model.blocks, model.norm, model.head],
        ZeroLayout(1, 1, 1, 1, 1),
        spec.parallel.zero,
        dtype=dtype,
        device=cpu,
        initialise=lambda name, values: initialise(name, values, shape.layers, torch.Generator(device)),
        decays=decays,
    )
    if float8:
        for block in model.blocks:
            assert isinstance(block, Block)
            float8.attach(block, block.multiplied, lambda: zero.updates)
    apply_recompute(model.blocks, shape, spec.parallel.recompute)
    apply_compile(model.blocks, spec.parallel.compile, device, config.row_tokens(spec))
    optimizer = MasterOptimizer(zero, spec.training.optimizer, rows=lambda name: hidden_matrices(name, shape))
    row, documents = torch.arange(sum(lengths), device=device) % 256, Documents.of(lengths, device)

    def loss() -> torch.Tensor:
        return model.loss(row, documents, row)

    micro_batches = config.gradient_accumulation(spec, 1)
    while True:
        for index in range(micro_batches):
            zero.micro_batch(last=index == micro_batches - 1)
            (loss() / len(row)).backward()
        zero.clip(1.0)
        optimizer.step(1e-3)
        zero.publish()
        yield


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("recompute", ["none", "selective", "50%", "full"])
@pytest.mark.parametrize(
    ("vocabulary", "tokens", "precision", "micro_batches", "moment"),
    [
        (300, 512, "fp32", 2, "block"),
        (4000, 512, "fp32", 1, "loss"),
        (20000, 32, "fp32", 2, "head"),
        (300, 512, "bf16", 2, "block"),
    ],
)
def test_the_worst_moment_of_a_step_is_within_5_percent(
    vocabulary: int, tokens: int, precision: str, micro_batches: int, moment: str, recompute: str
) -> None:
    spec = small(
        1,
        (1, 1, 1),
        precision=precision,
        micro_batches=micro_batches,
        tokens=tokens,
        vocabulary=vocabulary,
        recompute=recompute,
    )
    lengths = (tokens // 2, tokens // 2 - 6, 6)
    step = train_step(spec, lengths, torch.device("cpu"))
    with LiveBytes() as live:
        next(step)
        live.peak = live.now
        next(step)
    counted = memory(Work.of(spec, 1, gpu=False), ZeroLayout(1, 1, 1, 1, 1), recompute)
    assert counted.total == pytest.approx(live.peak, rel=0.05)
    assert recompute != "full" or counted.moment == moment


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("compile_", ["none", "blocks"])
@pytest.mark.parametrize("recompute", ["none", "selective", "50%", "full"])
@pytest.mark.parametrize(
    ("vocabulary", "tokens", "precision"),
    [
        (1024, 4096, "bf16"),
        (32000, 4096, "bf16"),
        (32000, LOSS_CHUNK, "bf16"),
        (32000, 2 * LOSS_CHUNK, "bf16"),
        (32000, 4096, "fp16"),
        (1024, 4096, "fp8"),
        (32000, 2 * LOSS_CHUNK, "fp8"),
    ],
)
def test_the_worst_moment_on_a_gpu_is_within_5_percent(
    vocabulary: int, tokens: int, precision: str, recompute: str, compile_: str
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    spec = job(
        {
            "layers": 8,
            "hiddenSize": 1024,
            "heads": 16,
            "ffnSize": 2816,
            "vocabSize": vocabulary,
            "seqLen": tokens,
        },
        training={"precision": precision, "globalBatchTokens": 2 * tokens},
        parallel={"zero": {"optimizer": 1}, "recompute": recompute, "compile": compile_},
    )
    step = train_step(spec, (tokens // 2, tokens // 2 - 6, 6), device)
    gc.collect()  # hooks and models of other tests refer to each other
    before = torch.cuda.memory_allocated()
    next(step)
    torch.cuda.reset_peak_memory_stats()
    next(step)
    counted = memory(Work.of(spec, 1), ZeroLayout(1, 1, 1, 1, 1), recompute)
    assert counted.total == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.05)


def test_internlm_7b_on_eight_gpus_by_hand() -> None:
    """7,321,948,160 parameters: 2 bytes each in bf16, 4 for their gradients, 12 for master weight and moments."""
    numbers = 7_321_948_160
    work = Work.of(seven_b(), 8)
    for degrees, expected in {
        (1, 1, 1): (2 * numbers, 4 * numbers, 12 * numbers),
        (1, 1, 8): (2 * numbers, 4 * numbers + 4 * numbers / 8, 12 * numbers / 8),
        (8, 8, 8): (2 * numbers / 8, 4 * numbers / 8, 12 * numbers / 8),
        (1, 8, 8): (2 * numbers, 4 * numbers / 8, 12 * numbers / 8),
    }.items():
        held = states(work, ZeroLayout(8, *degrees, 8))
        assert held[:3] == pytest.approx(expected, rel=1e-6), degrees
    need = memory(work, ZeroLayout(8, 8, 8, 8, 8), "none")
    # 2048 tokens of 103168 logits in bf16 at the loss
    assert need.logits == 2 * 2048 * 103168
    # All, in fp32, where they are not made by chunks: as they are, normalised, and their gradients.
    whole = work._replace(chunked=False)
    assert memory(whole, ZeroLayout(8, 8, 8, 8, 8), "none").logits == 3 * 4 * 2048 * 103168
    assert 25 * GIB < need.total < 35 * GIB


@pytest.mark.parametrize(("precision", "chunked"), [("fp32", False), ("fp16", False), ("bf16", True)])
def test_only_bf16_has_its_logits_in_chunks(precision: str, chunked: bool) -> None:
    """The gradients of fp16 must be scaled before they are rounded."""
    assert Work.of(small(1, (1, 1, 1), precision=precision), 1).chunked is chunked
