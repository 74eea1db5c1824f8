"""A small model with its tokenizer, and sets of questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from internlm_trainer.data.tokenizer import train_tokenizer
from trainer.evaluation.sets import HAN, make
from trainer.weights.models import SHAPES, random_weights, save

CONTEXT = 160


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`checkpoints` of a model that reads 160 tokens, `tokenizer.model`, and `data`."""
    folder = tmp_path_factory.mktemp("evaluation")
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(train_tokenizer([Path(json.__file__).read_text(), HAN * 3], 512))
    shape = SHAPES["InternLM2"]
    save(str(folder / "checkpoints"), shape, random_weights(shape), tokenizer=str(tokenizer), seqLen=CONTEXT)
    make(folder / "data")
    return folder
