"""States in bf16: what stochastic rounding keeps that rounding to the nearest loses."""

from __future__ import annotations

import pytest
import torch

from internlm_trainer.config import OptimizerSpec
from internlm_trainer.errors import UserError
from internlm_trainer.optim.adamw import choose_backend
from internlm_trainer.optim.state import store


def stored(values: torch.Tensor, first: int = 0, seed: int = 0) -> torch.Tensor:
    state = torch.zeros(len(values), dtype=torch.bfloat16)
    store(state, values, first, seed)
    return state


@pytest.mark.parametrize("value", [1.001, -3.3e-9, 1e-30, 6.02e23])
def test_rounding_goes_to_a_neighbour_and_is_right_on_average(value: float) -> None:
    found = stored(torch.full((100_000,), value)).float()
    assert len(found.unique()) == 2
    assert ((found / value - 1).abs() < 2**-7).all()
    assert float((found.double() / value - 1).mean()) == pytest.approx(0, abs=1e-4)


def test_what_is_a_bf16_number_already_stays_what_it_is() -> None:
    values = torch.randn(1000).bfloat16()
    values[:4] = torch.tensor([0.0, torch.inf, -torch.inf, 1e-40])
    for seed in range(5):
        assert torch.equal(stored(values.float(), seed=seed), values)


def test_a_decay_of_less_than_half_a_place_goes_on_where_the_nearest_number_would_stand_still() -> None:
    state, nearest = torch.ones(2000, dtype=torch.bfloat16), torch.ones(2000, dtype=torch.bfloat16)
    for step in range(500):
        store(state, state.float() * 0.999, 0, step)
        nearest = (nearest.float() * 0.999).bfloat16()
    assert nearest.unique().tolist() == [1.0]
    assert float(state.float().mean()) == pytest.approx(0.999**500, rel=0.01)


def test_an_element_is_rounded_alike_wherever_a_part_begins_and_differently_each_time() -> None:
    values = torch.full((1000,), 1.001)
    whole = stored(values, 0, 3)
    assert torch.equal(stored(values[:300], 600, 3), whole[600:900])
    assert not torch.equal(stored(values, 0, 4), whole)


def test_apex_is_refused_with_a_sentence_where_it_is_not_installed() -> None:
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu) == choose_backend("torch", cpu) == "torch"
    with pytest.raises(
        UserError, match=r"spec\.training\.optimizer\.backend: apex .* set the backend to auto"
    ):
        choose_backend(OptimizerSpec.model_validate({"backend": "apex"}).backend, cpu)
