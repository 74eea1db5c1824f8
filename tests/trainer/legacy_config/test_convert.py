"""InternLM's fields as a job's: what becomes of each, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from internlm_operator.manifest import parse_job
from internlm_trainer.errors import UserError
from internlm_trainer.legacy_config import Conversion, Machine, convert, evaluate, job_yaml

# The fields of InternLM's own sample, at other values.
SAMPLE = """
JOB_NAME = "13B_Train"
WIDTH = 4096
SAVE = "local:ckpts/a"
ckpt = dict(enable_save_ckpt=True, save_ckpt_folder=SAVE, checkpoint_every=25, auto_resume=True)
data = dict(
    seq_len=1024, micro_num=4, micro_bsz=2, total_steps=1000, pack_sample_into_one=False, skip_batches="",
    rampup_batch_size="", train_folder="/data/train", valid_folder="/data/valid", valid_every=100,
)
grad_scaler = dict(fp16=dict(initial_scale=2**16), growth_factor=2)
hybrid_zero_optimizer = dict(overlap_sync_grad=True, reduce_bucket_size=512 * 1024 * 1024, clip_grad_norm=0.5)
loss = dict(label_smoothing=0)
adam = dict(lr=1e-4, adam_beta1=0.8, adam_beta2=0.98, adam_beta2_c=0, adam_eps=1e-7, weight_decay=0.1)
lr_scheduler = dict(total_steps=data["total_steps"], init_steps=0, warmup_ratio=0.025, eta_min=1e-5, last_epoch=-1)
beta2_scheduler = dict(init_beta2=adam["adam_beta2"], c=adam["adam_beta2_c"], cur_iter=-1)
model = dict(
    checkpoint=False, num_attention_heads=16, vocab_size=50000, hidden_size=WIDTH // 2, num_layers=4, mlp_ratio=8 / 3,
    apply_post_layer_norm=False, dtype="torch.bfloat16", norm_type="rmsnorm", layer_norm_epsilon=1e-5,
    embed_grad_scale=1,
)
parallel = dict(zero1=8, pipeline=dict(size=1, interleaved_overlap=True), sequence_parallel=False)
cudnn_benchmark = False
"""
MACHINE = Machine(nodes=2, gpus_per_node=8, tokenizer="/zoo/t.model")


def conversion(changes: str = "", machine: Machine = MACHINE) -> Conversion:
    """Of the sample, with lines added at its end; the manifest is a valid job."""
    converted = convert(evaluate((SAMPLE + changes).encode(), "c.py"), machine)
    parse_job(converted.manifest)
    return converted


def spec(changes: str = "", machine: Machine = MACHINE) -> dict[str, Any]:
    found: dict[str, Any] = conversion(changes, machine).manifest["spec"]
    return found


def test_a_sample_becomes_the_job_that_it_describes() -> None:
    converted = conversion()
    assert converted.manifest["metadata"] == {"name": "job-13b-train"}
    assert converted.manifest["spec"] == {
        "nodes": 2,
        "gpusPerNode": 8,
        "model": {
            "layers": 4,
            "hiddenSize": 2048,
            "heads": 16,
            "kvHeads": 16,
            "ffnSize": 5632,
            "vocabSize": 50000,
            "seqLen": 1024,
            "normEps": 1e-5,
            "ropeBase": 10000,
            "attentionBias": True,
        },
        "data": {
            "tokenizer": "/zoo/t.model",
            "train": [{"path": "/data/train"}],
            "validation": [{"path": "/data/valid"}],
            "packing": "documents",
        },
        "training": {
            "steps": 1000,
            "globalBatchTokens": 4 * 2 * 1024 * 16,
            "microBatchSize": 2,
            "precision": "bf16",
            "optimizer": {
                "lr": 1e-4,
                "betas": [0.8, 0.98],
                "eps": 1e-7,
                "weightDecay": 0.1,
                "clipGradNorm": 0.5,
            },
            "schedule": {"name": "cosine", "warmupSteps": 25, "minLr": 1e-5},
            "skip": {"spikeThreshold": 0},
            "seed": 1024,
            "validateEverySteps": 100,
            "logEverySteps": 1,
        },
        "parallel": {"zero": {"parameters": 1, "gradients": 1, "optimizer": 8}, "recompute": "none"},
        "checkpoint": {"path": "ckpts/a", "everySteps": 25, "keep": 10000},
    }


def test_the_file_of_a_conversion_is_a_manifest_with_its_notes_as_comments() -> None:
    converted = conversion()
    text = job_yaml(converted, "c.py")
    assert yaml.safe_load(text) == converted.manifest
    assert text.startswith(
        "# Made from c.py by internlm convert-config.\n# JOB_NAME: '13B_Train' is 'job-13b-train'"
    )
    assert "# adam.weight_decay: norms and biases are not decayed here" in text
    assert "# hybrid_zero_optimizer.reduce_bucket_size: has no effect" in text


def test_internlm_7b_is_recognised() -> None:
    shape = "num_layers=32, hidden_size=4096, num_attention_heads=32, vocab_size=103168, mlp_ratio=8 / 3"
    found = spec(f"\nmodel = dict({shape}, dtype='torch.float32')")
    assert found["model"]["preset"] == "internlm-7b"
    assert "ffnSize" not in found["model"]
    assert found["training"]["precision"] == "fp32"


@pytest.mark.parametrize(
    ("parallel", "zero"),
    [
        ("", (1, 1, -1)),
        ("zero1=-1", (1, 1, -1)),
        ("zero1=0", (1, 1, -1)),
        ("zero1=1", (1, 1, 1)),
        ("zero1=dict(size=4, fsdp=False)", (1, 1, 4)),
        ("zero1=2, tensor=4", (4, 4, 8)),
        ("zero1=-1, tensor=dict(size=2, mode='mtp'), pipeline=dict(size=4)", (8, 8, -1)),
    ],
)
def test_zero1_and_model_parallelism_become_three_degrees(parallel: str, zero: tuple[int, int, int]) -> None:
    found = spec(f"\nparallel = dict({parallel})")
    assert tuple(found["parallel"]["zero"].values()) == zero


@pytest.mark.parametrize(
    ("fields", "recompute"),
    [
        ("checkpoint=True", "full"),
        ("checkpoint=1.0", "full"),
        ("checkpoint=0", "none"),
        ("checkpoint=0.25", "25%"),
        ("checkpoint=True, checkpoint_fraction=0.5", "50%"),
        ("checkpoint=False, checkpoint_fraction=0.5", "none"),
    ],
)
def test_activation_checkpointing_becomes_recomputation(fields: str, recompute: str) -> None:
    model = "num_layers=4, hidden_size=2048, num_attention_heads=16, vocab_size=50000, dtype='torch.bfloat16'"
    assert spec(f"\nmodel = dict({model}, {fields})")["parallel"]["recompute"] == recompute


def test_short_samples_and_batches_to_skip_are_taken_over_the_latter_counted_from_one() -> None:
    data = "seq_len=1024, micro_num=4, micro_bsz=2, total_steps=1000, train_folder='/d', min_length=50"
    found = spec(f"\ndata = dict({data}, skip_batches='1-10,20')")["data"]
    assert (found["skipSteps"], found["minLength"]) == (["2-11", "21"], 50)


def test_a_growing_batch_covers_the_same_tokens() -> None:
    data = "seq_len=1024, micro_num=4, micro_bsz=2, total_steps=1000, train_folder='/d'"
    found = spec(f"\ndata = dict({data}, rampup_batch_size='2 1 30')")["training"]
    unit = 2 * 1024 * 16
    assert found["globalBatchTokens"] == 4 * unit
    assert found["batchRampUp"] == {
        "startTokens": 2 * unit,
        "incrementTokens": unit,
        "overTokens": (2 + 3) * 30 * unit,
    }


def test_fp16_takes_its_loss_scale_along() -> None:
    model = "num_layers=4, hidden_size=2048, num_attention_heads=16, vocab_size=50000"
    found = spec(
        f"\nmodel = dict({model})\ngrad_scaler = dict(fp16=dict(initial_scale=2**10, growth_interval=7))"
    )
    assert found["training"]["precision"] == "fp16"
    assert found["training"]["lossScale"] == {"initial": 1024, "growthSteps": 7}


@pytest.mark.parametrize(("split", "micro"), [(1, 2), (2, 2), (4, 2), (8, 1)])
def test_without_model_parallelism_the_batch_stays_the_same(split: int, micro: int) -> None:
    found = spec(f"\nparallel = dict(zero1=1, tensor={split})")["training"]
    assert found["globalBatchTokens"] == 4 * 2 * 1024 * 16 // split
    assert found["microBatchSize"] == micro


@pytest.mark.parametrize(
    ("given", "path", "note"),
    [
        ("/a/b", "/a/b", None),
        ("local:/a/b", "/a/b", None),
        ("local:a", "a", None),
        ("s3://b/c", "s3://b/c", None),
        ("boto3:s3://b/c/", "s3://b/c", None),
        ("boto3:s3://b.10.0.0.1:9000/c/d", "s3://b/c/d", "AWS_ENDPOINT_URL=http://10.0.0.1:9000"),
        ("gs://b.c/d", "gs://b.c/d", None),
    ],
)
def test_prefixes_of_paths(given: str, path: str, note: str | None) -> None:
    converted = conversion(f"\nckpt = dict(save_ckpt_folder={given!r}, checkpoint_every=5)")
    assert converted.manifest["spec"]["checkpoint"]["path"] == path
    assert (note is None) or any(note in one for one in converted.notes)


def test_a_configuration_that_saves_nothing_saves_its_last_step() -> None:
    found = spec("\nckpt = dict(enable_save_ckpt=False, save_ckpt_folder='local:x', checkpoint_every=50)")
    assert found["checkpoint"] == {"path": "x", "everySteps": 2**31 - 1, "keep": 10000}


def test_what_internlm_is_told_outside_of_its_configuration_is_given_by_the_machine() -> None:
    machine = Machine(processes_per_node=2, tokenizer="t", train_folder="/mine", save_folder="s3://c/d")
    found = spec("\nparallel = dict(zero1=-1)", machine)
    assert (found["processesPerNode"], "gpusPerNode" in found) == (2, False)
    assert found["data"]["train"] == [{"path": "/mine"}]
    assert found["checkpoint"]["path"] == "s3://c/d"
    assert found["training"]["globalBatchTokens"] == 4 * 2 * 1024 * 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ("loss = dict(label_smoothing=0.1)", "c.py:{}: loss.label_smoothing: is 0.1, which is not supported"),
        ("model_type = 'INTERNLM_MoE'", "c.py:{}: model_type: is 'INTERNLM_MoE'; models here are"),
        ("model = dict(num_layers='4')", "c.py:{}: model.num_layers: is '4', which is no whole number"),
        ("model = dict(num_layers=True)", "c.py:{}: model.num_layers: is True, which is no whole number"),
        ("model = dict(num_layers=4)", "c.py:{}: model.hidden_size: must be given"),
        ("model = 3", "c.py:{}: model: must be a dict"),
        ("adam = dict(lr=1e-4, adam_beta2=0.98, amsgrad=True)", "c.py:{}: adam.amsgrad: is not known here"),
        ("moe = dict(top_k=2)", "c.py:{}: moe: is not known here"),
        ("parallel = dict(zero1=dict(size=8, fsdp=True))", "c.py:{}: parallel.zero1: asks for fsdp"),
        ("parallel = dict(zero1=1, tensor=3)", "c.py:7: data.micro_num: times micro_bsz must be a multiple"),
        (
            "lr_scheduler = dict(total_steps=7)",
            "c.py:{}: lr_scheduler.total_steps: is 7, and data.total_steps is 1000",
        ),
        (
            "lr_scheduler = dict(init_steps=7)",
            "c.py:{}: lr_scheduler.init_steps: is 7, which is not supported",
        ),
        (
            "ckpt = dict(save_ckpt_folder=SAVE, load_ckpt_folder='local:b', checkpoint_every=1)",
            "c.py:{}: ckpt.load_ckpt_folder: goes on from b",
        ),
        (
            "ckpt = dict(save_ckpt_folder='oss2:x', checkpoint_every=1)",
            "c.py:{}: ckpt.save_ckpt_folder: is 'oss2:x'",
        ),
        ("data = dict(data, x=1)", "c.py:{}: data.x: is not known here"),
        ("data['skip_batches'] = 1", "c.py:{}: assigns to something that is no name"),
        ("grad_scaler = dict(growth_factor=3)", "c.py:{}: grad_scaler.growth_factor: is 3.0; only 2.0"),
        ("JOB_NAME = 3", "c.py:{}: JOB_NAME: is 3, which is no text"),
    ],
)
def test_what_would_change_the_numbers_or_is_not_known_is_refused_with_its_line(
    changes: str, sentence: str
) -> None:
    line = SAMPLE.count("\n") + 1
    with pytest.raises(UserError) as refused:
        conversion(changes)
    assert str(refused.value).startswith(sentence.format(line)), refused.value


@pytest.mark.parametrize(
    "start",
    [
        "load_model_only_folder='local:/zoo/7b'",
        "auto_resume=False, load_ckpt_info=dict(path='local:/zoo/7b', content=('model',), ckpt_type='internlm')",
    ],
)
def test_weights_to_start_from_are_the_jobs(start: str) -> None:
    job = conversion(f"ckpt = dict(save_ckpt_folder=SAVE, checkpoint_every=1, {start})")
    assert job.manifest["spec"]["model"]["init"] == {"from": "/zoo/7b"}


def test_a_missing_tokenizer_or_folder_names_the_option_that_gives_it() -> None:
    with pytest.raises(UserError, match="by --tokenizer"):
        conversion("", Machine())
    with pytest.raises(UserError, match="by --train-folder"):
        conversion("\ndata = dict(seq_len=8, micro_bsz=1, total_steps=2)")


def test_fp16_and_a_growing_beta2_are_taken_over() -> None:
    shape = "num_layers=2, hidden_size=64, num_attention_heads=4, vocab_size=512"
    text = f"\nbeta2_scheduler = dict(init_beta2=0.98, c=0.8)\nmodel = dict({shape}, dtype='torch.float16')"
    found = spec(text)["training"]
    assert found["precision"] == "fp16"
    assert found["optimizer"]["beta2Exponent"] == 0.8
