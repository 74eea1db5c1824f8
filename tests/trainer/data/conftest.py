"""What tests of the data path share: text that every machine has, and a small tokenizer trained on it."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from internlm_trainer.data.bin_format import write_bin
from internlm_trainer.data.tokenizer import Tokenizer, train_tokenizer

VOCABULARY = 600


@pytest.fixture(scope="session")
def python_sources() -> list[str]:
    """Some source files of this Python."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("json/*.py"))]


@pytest.fixture(scope="session")
def tokenizer_model(python_sources: list[str]) -> bytes:
    """A `.model` file of 600 words."""
    return train_tokenizer(python_sources, VOCABULARY)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_model: bytes) -> Tokenizer:
    """A tokenizer of 600 words."""
    return Tokenizer(tokenizer_model)


@pytest.fixture
def write_samples(tmp_path: Path) -> Callable[[str, Sequence[Sequence[int]]], str]:
    """Writes samples to a `.bin` below the test's folder; gives its path."""

    def write(name: str, samples: Sequence[Sequence[int]]) -> str:
        url = str(tmp_path / name)
        with write_bin(url) as writer:
            for sample in samples:
                writer.write(sample)
        return url

    return write
