"""Counting operations: against the literature's numbers, and against PyTorch's own counter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from internlm_trainer.config import ModelShape, ModelSpec, model_shape
from internlm_trainer.kernels.attention import Documents, reference
from internlm_trainer.model.internlm import InternLM, parameter_count
from internlm_trainer.telemetry.flops import (
    causal_flops,
    causal_pairs,
    full_flops,
    matmul_parameters,
    peak_flops,
)

TINY = ModelShape(2, 32, 4, 2, 64, 512, 1e-6, 10000, True)
SEVEN = model_shape(ModelSpec(preset="internlm-7b"))


def test_internlm_7b_at_4078_tokens_a_second_runs_at_181_tflops() -> None:
    assert full_flops(SEVEN, 4078, 2048) == pytest.approx(181e12, rel=0.01)


def test_every_matrix_but_the_embedding_is_multiplied_with() -> None:
    vectors = SEVEN.layers * (2 + 4) * SEVEN.hidden_size + SEVEN.hidden_size  # norms and biases
    embedding = SEVEN.vocab_size * SEVEN.hidden_size
    assert matmul_parameters(SEVEN) == parameter_count(SEVEN) - vectors - embedding


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_forward_and_backward_cost_what_pytorch_counts(kv_heads: int) -> None:
    shape = TINY._replace(kv_heads=kv_heads)
    model = InternLM(shape, reference)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.arange(48)
    with FlopCounterMode(display=False) as counter:
        model(tokens, Documents.of((48,), "cpu")).sum().backward()
    # The reference computes the whole matrix of scores, which is the full count.
    assert counter.get_total_flops() == full_flops(shape, 48, 48)


@pytest.mark.parametrize(
    ("bounds", "pairs"),
    [([0, 1], 1), ([0, 4], 10), ([0, 2, 4], 6), ([0, 1, 2, 3, 4], 4), ([0, 70000], 2_450_035_000)],
)
def test_pairs_that_the_mask_leaves(bounds: list[int], pairs: int) -> None:
    assert causal_pairs(np.array(bounds, np.int32)) == pairs


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_the_causal_count_is_at_most_half_of_the_full_one_and_a_token(lengths: list[int]) -> None:
    longest = max(lengths)
    pairs = causal_pairs(np.cumsum([0, *lengths]).astype(np.int32))
    tokens = sum(lengths)
    assert causal_flops(TINY, tokens, 0) < causal_flops(TINY, tokens, pairs)
    assert causal_flops(TINY, tokens, pairs) <= full_flops(TINY, tokens, longest)
    assert pairs <= tokens * (longest + 1) // 2


@pytest.mark.parametrize(
    ("card", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("a card of next year", None),
        ("", None),
    ],
)
def test_the_peak_of_a_card_by_its_name(card: str, tflops: float | None) -> None:
    found = peak_flops(card)
    assert found == (pytest.approx(tflops * 1e12) if tflops else None)
