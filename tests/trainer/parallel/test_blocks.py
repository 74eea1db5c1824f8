"""Blocks that recompute and blocks that are compiled train as the plain ones do."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internlm_trainer.config import ModelShape
from internlm_trainer.config.parallel import recomputed_blocks
from internlm_trainer.kernels.attention import Documents
from internlm_trainer.model.internlm import InternLM
from internlm_trainer.parallel.compile import apply_compile
from internlm_trainer.parallel.recompute import apply_recompute
from trainer.live import LiveBytes

RANKS = Path(__file__).with_name("blocks_ranks.py")
SHAPE = ModelShape(2, 32, 4, 4, 96, 300, 1e-6, 10000, True)


def run(
    folder: Path, processes: int, cases: list[tuple[tuple[int, int, int], str, str]]
) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(RANKS), str(folder / "results.pt"), json.dumps(cases)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = torch.load(folder / "results.pt", weights_only=True)
    return results


def test_recomputing_changes_no_bit_in_any_layout(tmp_path: Path) -> None:
    layouts = [(1, 1, 4), (2, 2, 4), (4, 4, 4)]
    settings = ["none", "50%", "full", "selective"]
    results = run(tmp_path, 4, [(layout, setting, "none") for layout in layouts for setting in settings])
    for start in range(0, len(results), len(settings)):
        plain, *others = results[start : start + len(settings)]
        assert len(set(plain["losses"])) == len(plain["losses"])  # the weights moved
        for other in others:
            assert other["losses"] == plain["losses"]
            assert torch.equal(other["weights"], plain["weights"])


@pytest.mark.timeout(900)  # a C++ compiler runs, for each process
def test_compiled_blocks_train_as_plain_ones_do_and_are_compiled_once(tmp_path: Path) -> None:
    """fp32: losses to 1e-6, weights to 1e-5 after five steps: fused operations round in other places.

    Two graphs, before and after attention, serve all blocks, whatever the documents of a row; a prompt of another
    length compiles nothing.
    """
    plain, compiled = run(tmp_path, 2, [((1, 1, 2), "none", "none"), ((2, 2, 2), "50%", "blocks")])
    assert compiled["graphs"] == [2] * 6
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    difference = (compiled["weights"] - plain["weights"]).norm() / plain["weights"].norm()
    assert 0 < difference <= 1e-5  # more than nothing: something else did run


def test_a_compiled_block_recomputes_by_operation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph's partition between forward and backward, which needs no C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    tokens, documents = torch.arange(32), Documents.of((20, 12), "cpu")
    results = []
    for setting in ("none", "blocks"):
        torch.manual_seed(1)
        model = filled()
        apply_recompute(model.blocks, SHAPE, "selective")
        apply_compile(model.blocks, setting, torch.device("cpu"), 32)
        model(tokens, documents).square().mean().backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    plain, compiled = results
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-7)


def test_recomputing_keeps_fewer_bytes_by_as_much_as_it_says() -> None:
    """In numbers a token and block, of fp32 on a CPU, whose RMSNorm keeps one more `hidden` than a GPU's.

    none: the inputs of both norms, twice each; q, k, v and the rotated q and k; attention's output; what the two
    first products of the feed-forward give, silu of one, and the product of both.
    """
    hidden, ffn, lse = SHAPE.hidden_size, SHAPE.ffn_size, SHAPE.heads
    expected = {
        "none": 6 * hidden + 5 * hidden + hidden + 4 * ffn + lse + 2,
        "selective": hidden + 5 * hidden + hidden + hidden + 2 * ffn + lse,
        "full": hidden,
    }
    tokens, documents = torch.arange(32), Documents.of((32,), "cpu")
    for setting, numbers in expected.items():
        kept = []
        for layers in (2, 4):
            model = filled(SHAPE._replace(layers=layers))
            apply_recompute(model.blocks, SHAPE, setting)
            with LiveBytes(model.parameters()) as live:
                logits = model(tokens, documents)
                kept.append(live.now)
                del logits
        assert (kept[1] - kept[0]) / (2 * 32 * 4) == numbers, setting


def test_blocks_run_plainly_with_one_warning_where_nothing_can_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(1)
    model, documents = filled(), Documents.of((20, 12), "cpu")
    tokens = torch.randint(0, 300, (32,))
    expected = model(tokens, documents)
    with caplog.at_level(logging.WARNING):
        apply_compile(model.blocks, "blocks", torch.device("cpu"), 32)
        assert torch.equal(model(tokens, documents), expected)
    warnings = [r.getMessage() for r in caplog.records if "torch.compile failed" in r.getMessage()]
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("setting", "device", "sentence"),
    [
        ("auto", "cpu", "torch.compile: off (on CPUs)"),
        ("none", "cuda", "torch.compile: off (parallel.compile is none)"),
        ("auto", "cuda", "torch.compile: each block (on GPUs)"),
        ("blocks", "cpu", "torch.compile: each block (parallel.compile is blocks)"),
    ],
)
def test_the_log_says_what_is_compiled_and_why(
    setting: str, device: str, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        apply_compile([], setting, torch.device(device), 32)
    assert sentence in caplog.text


def filled(shape: ModelShape = SHAPE) -> InternLM:
    model = InternLM(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


@given(st.integers(1, 99), st.integers(1, 200))
def test_the_asked_share_of_the_blocks_recomputes_evenly_spread(percent: int, layers: int) -> None:
    chosen = recomputed_blocks(f"{percent}%", layers)
    assert len(chosen) == layers
    assert sum(chosen) == -(-layers * percent // 100)
    indices = [i for i, one in enumerate(chosen) if one]
    gaps = [b - a for a, b in zip([-1, *indices], indices, strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_none_selective_and_full_choose_no_block_or_all() -> None:
    assert recomputed_blocks("none", 3) == recomputed_blocks("selective", 3) == [False] * 3
    assert recomputed_blocks("full", 3) == [True] * 3
