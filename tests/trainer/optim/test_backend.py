"""Which kernels update the states."""

from __future__ import annotations

import pytest
import torch

from internlm_trainer.config import OptimizerSpec
from internlm_trainer.errors import UserError
from internlm_trainer.optim.adamw import choose_backend


def test_apex_is_refused_with_a_sentence_where_it_is_not_installed() -> None:
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu) == choose_backend("torch", cpu) == "torch"
    with pytest.raises(
        UserError, match=r"spec\.training\.optimizer\.backend: apex .* set the backend to auto"
    ):
        choose_backend(OptimizerSpec.model_validate({"backend": "apex"}).backend, cpu)
