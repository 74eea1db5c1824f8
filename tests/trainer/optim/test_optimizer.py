"""The optimizer on one process's shard: the same bits as PyTorch's AdamW, a skip that changes none, what decays."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from internlm_trainer.config import ModelShape, OptimizerSpec, ZeroSpec
from internlm_trainer.model.internlm import InternLM, decays, hidden_matrices, initialise, parameter_generator
from internlm_trainer.optim.optimizer import MasterOptimizer
from internlm_trainer.parallel.hybrid_zero import HybridZero
from internlm_trainer.parallel.layout import ZeroLayout

CPU = torch.device("cpu")
SHAPE = ModelShape(1, 16, 2, 1, 24, 300, 1e-6, 10000, True)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make(**spec: object) -> tuple[HybridZero, MasterOptimizer]:
    with torch.device("meta"):
        model = InternLM(SHAPE)

    def fill(name: str, values: torch.Tensor) -> None:
        initialise(name, values, SHAPE.layers, parameter_generator(name, 0, values))

    units = [model.embedding, *model.blocks, model.norm, model.head]
    zero = HybridZero(
        model,
        units,
        ZeroLayout(1, 1, 1, 1),
        ZeroSpec(),
        dtype=torch.float32,
        device=CPU,
        initialise=fill,
        decays=decays,
    )
    settings = OptimizerSpec.model_validate({"weightDecay": 0.1, **spec})
    return zero, MasterOptimizer(zero, settings, rows=lambda name: hidden_matrices(name, SHAPE))


def set_gradients(zero: HybridZero, step: int, factor: float = 1.0) -> None:
    for index, bucket in enumerate(zero.buckets):
        generator = torch.Generator().manual_seed(100 * step + index)
        bucket.master_grad.copy_(factor * torch.randn(len(bucket.master), generator=generator))


def state(optimizer: MasterOptimizer) -> dict[tuple[str, str], torch.Tensor]:
    return {(piece.kind, piece.parameter): piece.values.clone() for piece in optimizer.pieces()}


def test_adamw_has_the_bits_of_pytorchs_own_and_decays_matrices_alone() -> None:
    zero, optimizer = make()
    weights = {name: values for (kind, name), values in state(optimizer).items() if kind == "master"}
    assert {name for name in weights if not decays(name)} == {
        "norm.weight",
        *(f"blocks.0.{part}" for part in
          ("norm1.weight", "norm2.weight", "mixer.Wqkv.bias", "mixer.out_proj.bias")),
    }  # fmt: skip
    parameters = {name: torch.nn.Parameter(values) for name, values in weights.items()}
    theirs = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if decays(n) else 0.0} for n, p in parameters.items()],
        lr=1e-3,
        betas=(0.9, 0.95),
        fused=True,
    )
    for step in range(5):
        set_gradients(zero, step)
        for bucket in zero.buckets:
            for entry in bucket.layout.entries:
                parameters[entry.name].grad = bucket.master_grad[slice(*entry.span)].clone()
        theirs.step()
        optimizer.step(1e-3)
    ours = state(optimizer)
    for name, parameter in parameters.items():
        assert torch.equal(ours["master", name], parameter.detach())
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(ours[kind, name], theirs.state[parameter][kind])


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("state_type", ["fp32", "bf16"])
@pytest.mark.parametrize("factor", [1.0, float("nan"), float("inf")])
def test_a_skipped_update_changes_no_bit_now_or_later(name: str, state_type: str, factor: float) -> None:
    (zero, optimizer), (other, reference) = (make(name=name, stateType=state_type) for _ in range(2))
    no, yes = torch.tensor(False), torch.tensor(True)
    for step, skip in enumerate([no, no, yes, no]):
        set_gradients(zero, step, factor if skip else 1.0)
        before = state(optimizer)
        optimizer.step(1e-3, skip)
        if skip:
            after = state(optimizer)
            assert all(torch.equal(before[key], after[key]) for key in before)
            reference.set_step(step + 1, 1)  # which was never asked for this step
        else:
            set_gradients(other, step)
            reference.step(1e-3)
    ours, theirs = state(optimizer), state(reference)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert optimizer.bad_parameter() is None


def test_bf16_halves_the_states_and_muon_needs_one_of_them_for_its_matrices() -> None:
    def bytes_of(**spec: object) -> int:
        return sum(
            v.numel() * v.element_size()
            for (kind, _), v in state(make(**spec)[1]).items()
            if kind != "master"
        )

    adamw, muon = bytes_of(), bytes_of(name="muon")
    hidden = sum(p.numel() for n, p in InternLM(SHAPE).named_parameters() if hidden_matrices(n, SHAPE))
    assert adamw - muon == 4 * hidden
    assert bytes_of(stateType="bf16") * 2 == adamw
    assert bytes_of(name="muon", stateType="bf16") * 2 == muon


def test_a_weight_that_is_no_number_is_found_and_named() -> None:
    zero, optimizer = make()
    zero.buckets[1].master[5] = torch.inf
    assert optimizer.bad_parameter() == zero.buckets[1].layout.entries[0].name
