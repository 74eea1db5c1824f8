"""A job that starts from given weights trains those, whatever they are kept in and however it is laid out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from internlm_operator.manifest import parse_job
from internlm_trainer.checkpoint.tools import open_one
from internlm_trainer.config import ModelShape, model_shape
from internlm_trainer.errors import UserError
from internlm_trainer.inputs import initial_weights
from internlm_trainer.weights.export import export_internlm, export_llama
from internlm_trainer.weights.source import CheckpointWeights
from trainer.loop.jobs import TinyJob
from trainer.weights.models import assert_equal, content, random_weights, save

SHAPE = ModelShape(2, 32, 4, 4, 64, 512, 1e-6, 10000, True)
# So little that no bit of a weight changes.
STILL = {"optimizer": {"lr": 1e-25}, "schedule": {"warmupSteps": 0, "minLr": 0.0}}


def test_the_first_step_has_the_given_weights_and_later_runs_do_not_need_them(
    tiny: Callable[..., TinyJob], tmp_path: Path
) -> None:
    ours = random_weights(SHAPE)
    weights = CheckpointWeights(open_one(save(str(tmp_path / "checkpoints"), SHAPE, ours)))
    export_internlm(weights, str(tmp_path / "given"), "bf16", 2, 2)
    job = tiny(
        zero=(1, 2, 2), model={"init": {"from": str(tmp_path / "given")}}, training=STILL | {"steps": 1}
    )
    run = job.torchrun()
    assert run.end() == 0, run.log
    assert f"starting from the weights in {tmp_path}/given" in run.log
    trained = CheckpointWeights(open_one(str(job.checkpoints)))
    assert (trained.context, trained.tokenizer) == (64, str(job.corpus.tokenizer))
    assert_equal(content(trained), ours)
    shutil.rmtree(tmp_path / "given")
    job.training, job.processes, job.zero = STILL | {"steps": 2}, 1, (1, 1, 1)
    run = job.alone()
    assert run.end() == 0, run.log
    assert "resuming from step 1" in run.log


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({}, None),
        ({"ropeBase": 1000000}, "holds another model: ropeBase is 10000 there and 1000000 here; describe"),
        ({"ffnSize": 128, "layers": 3}, "layers is 2 there and 3 here, ffnSize is 64 there and 128 here"),
        ({"vocabSize": 513}, "vocabSize is 512 there and 513 here"),
        ({"init": {"from": "/nothing/there"}}, "/nothing/there holds no weights"),
    ],
)
def test_weights_of_another_model_are_refused(
    tiny: Callable[..., TinyJob], tmp_path: Path, model: dict[str, object], sentence: str | None
) -> None:
    weights = CheckpointWeights(open_one(save(str(tmp_path / "checkpoints"), SHAPE, random_weights(SHAPE))))
    export_llama(weights, str(tmp_path / "given"), "bf16", None, 64)
    spec = parse_job(tiny(model={"init": {"from": str(tmp_path / "given")}} | model).manifest()).spec
    if sentence is None:
        assert initial_weights(spec).shape == model_shape(spec.model)
        return
    with pytest.raises(UserError, match=r"^model\.init\.from: ") as refused:
        initial_weights(spec)
    assert sentence in str(refused.value)
