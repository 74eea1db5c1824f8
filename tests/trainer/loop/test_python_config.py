"""InternLM's configurations in Python, from the command line: run as they are, converted, refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trainer.loop.jobs import Corpus, steps

CONFIG = """
JOB_NAME = "tiny_py"
SEQ_LEN = 64
ckpt = dict(save_ckpt_folder="local:ckpts", checkpoint_every=5)
data = dict(seq_len=SEQ_LEN, micro_num=2, micro_bsz=2, total_steps=8, train_folder={train!r}, min_length=4)
hybrid_zero_optimizer = dict(clip_grad_norm=1.0)
adam = dict(lr=1e-2)
lr_scheduler = dict(total_steps=data["total_steps"], warmup_ratio=0.25)
model = dict(
    num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=512, mlp_ratio=8 / 3, dtype="torch.bfloat16"
)
parallel = dict(zero1=-1)
"""


@pytest.fixture
def config(corpus: Corpus, tmp_path: Path) -> Path:
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(train=str(corpus.train)))
    return file


def internlm(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "internlm_trainer.cli", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_python_configuration_trains_as_it_is(config: Path, corpus: Corpus) -> None:
    run = internlm(
        config.parent, "run", "config.py", "--processes", "2", "--tokenizer", str(corpus.tokenizer)
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "8 steps of 512 tokens on 2 CPU processes, zero (1, 1, 2)" in run.stdout
    assert "config.py: adam.weight_decay: " in run.stderr
    assert steps(config.parent / "ckpts") == [5, 8]


def test_a_converted_configuration_is_a_valid_manifest(config: Path, corpus: Corpus) -> None:
    converted = internlm(config.parent, "convert-config", "config.py", "--tokenizer", str(corpus.tokenizer))
    assert converted.returncode == 0, converted.stderr
    file = config.parent / "job.yaml"
    file.write_text(converted.stdout)
    assert yaml.safe_load(converted.stdout)["spec"]["gpusPerNode"] == 8
    checked = internlm(config.parent, "validate", "job.yaml")
    assert "tiny-py is valid" in checked.stdout, checked.stderr


def test_a_configuration_that_does_something_is_refused_with_its_line_and_does_nothing(config: Path) -> None:
    marker = config.parent / "marker"
    config.write_text(f"open({str(marker)!r}, 'w')\n" + config.read_text())
    for command in ("run", "convert-config"):
        refused = internlm(config.parent, command, "config.py", "--tokenizer", "t.model")
        assert refused.returncode == 65
        assert "config.py:1: " in refused.stderr
        assert "Traceback" not in refused.stderr
    assert not marker.exists()


def test_options_for_python_configurations_are_refused_beside_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("{}")
    refused = internlm(tmp_path, "run", "job.yaml", "--tokenizer", "t.model")
    assert refused.returncode == 65
    assert "are for InternLM's configurations in Python" in refused.stderr
