"""InternLM's fields as a job's.  Pure.

A field either becomes one of ours, or is told in a note where it changes nothing that is computed, or is refused
where it would.  The fields are those of InternLM 0.1 and 0.2 (`configs/7B_sft.py`,
`internlm/initialize/launch.py`).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import yaml

from internlm_trainer.config.model import PRESETS
from internlm_trainer.errors import UserError
from internlm_trainer.legacy_config.evaluate import Config
from internlm_trainer.legacy_config.reader import Reader

MAX_STEPS = 2**31 - 1
MAX_KEEP = 10_000

_PRECISIONS = {
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
    "torch.float32": "fp32",
    "torch.tf32": "fp32",
}
_MODEL_TYPES = ("INTERNLM", "INTERNLM2", "INTERNLM2_PUBLIC")


class Machine(NamedTuple):
    """What InternLM's users give its launcher and its tools, not its configuration."""

    nodes: int = 1
    gpus_per_node: int = 0
    processes_per_node: int = 1
    tokenizer: str | None = None
    train_folder: str | None = None
    save_folder: str | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * (self.gpus_per_node or self.processes_per_node)


class Conversion(NamedTuple):
    """A job's manifest, and what its reader should know of how it came about."""

    manifest: dict[str, Any]
    notes: list[str]


def convert(config: Config, machine: Machine) -> Conversion:
    """The job that trains as `config` says on `machine`.

    Raises UserError, with file and line, for what cannot be had here, and for what is not known.
    """
    reader = Reader(config)
    name = _name(reader)
    spec: dict[str, Any] = {
        "nodes": machine.nodes,
        "gpusPerNode": machine.gpus_per_node,
        "processesPerNode": machine.processes_per_node,
        "model": _model(reader),
        "data": _data(reader, machine),
        "training": _training(reader, machine.world_size),
        "parallel": _parallel(reader),
        "checkpoint": _checkpoint(reader, machine, name),
        "telemetry": _telemetry(reader),
    }
    if weights := _start(reader, spec["checkpoint"]["path"]):
        spec["model"]["init"] = {"from": weights}
    reader.settle_the_rest()
    del spec["gpusPerNode" if not machine.gpus_per_node else "processesPerNode"]
    manifest = {
        "apiVersion": "training.internlm.io/v1alpha1",
        "kind": "InternLMJob",
        "metadata": {"name": name},
        "spec": {part: content for part, content in spec.items() if content != {}},
    }
    return Conversion(manifest, reader.notes)


def job_yaml(conversion: Conversion, source: str) -> str:
    """The manifest's file, with the notes as comments at its top."""
    lines = [f"Made from {source} by internlm convert-config.", *conversion.notes]
    comment = "".join(f"# {line}\n" for text in lines for line in text.splitlines())
    return comment + yaml.safe_dump(conversion.manifest, sort_keys=False, allow_unicode=True)


def _name(reader: Reader) -> str:
    """A name that Kubernetes takes."""
    given = reader.get("JOB_NAME", str, "internlm")
    name = re.sub(r"[^a-z0-9]+", "-", given.lower()).strip("-")
    name = name if name[:1].isalpha() else f"job-{name}".rstrip("-")
    name = name[:50].rstrip("-")
    if name != given:
        reader.note("JOB_NAME", f"{given!r} is {name!r} here, as Kubernetes' names must be")
    return name


def _model(reader: Reader) -> dict[str, Any]:
    model_type = reader.get("model_type", str, "INTERNLM")
    if model_type not in _MODEL_TYPES:
        reader.refuse("model_type", f"is {model_type!r}; models here are {', '.join(_MODEL_TYPES)}")
    layers, hidden = reader.need("model.num_layers", int), reader.need("model.hidden_size", int)
    heads, vocab = reader.need("model.num_attention_heads", int), reader.need("model.vocab_size", int)
    kv_heads = reader.get("model.num_kv_attention_heads", int, heads)
    ffn = -(-int(hidden * reader.get("model.mlp_ratio", float, 4.0)) // 256) * 256
    bias = not reader.get("model.no_bias", bool, model_type != "INTERNLM")
    shape: dict[str, Any] = {
        "layers": layers,
        "hiddenSize": hidden,
        "heads": heads,
        "kvHeads": kv_heads,
        "ffnSize": ffn,
        "vocabSize": vocab,
    }
    for preset, known in PRESETS.items():
        if (layers, hidden, heads, kv_heads, ffn, vocab) == known[:6]:
            shape = {"preset": preset}
    seq_len = reader.need("data.seq_len", int)
    eps = reader.get("model.layer_norm_epsilon", float, 1e-5)
    base = reader.get("model.rope_base", int, 10000)
    return {**shape, "seqLen": seq_len, "normEps": eps, "ropeBase": base, "attentionBias": bias}


def _data(reader: Reader, machine: Machine) -> dict[str, Any]:
    folder = machine.train_folder or reader.get("data.train_folder", str)
    reader.get("data.train_folder", str)
    if not folder:
        reader.refuse(
            "data", "names no train_folder: InternLM would make up random tokens; give one by --train-folder"
        )
    if not machine.tokenizer:
        raise UserError(
            f"{reader.config.file}: names no tokenizer, as InternLM's configurations do not: give the tokenizer of "
            "the data by --tokenizer"
        )
    data: dict[str, Any] = {
        "tokenizer": machine.tokenizer,
        "train": [{"path": _path(reader, "data.train_folder", folder)}],
    }
    if valid := reader.get("data.valid_folder", str):
        data["validation"] = [{"path": _path(reader, "data.valid_folder", valid)}]
    data["packing"] = "contiguous" if reader.get("data.pack_sample_into_one", bool, False) else "documents"
    if shortest := reader.get("data.min_length", int, 0):
        data["minLength"] = shortest
    if reader.get("data.min_length_dict", dict, {}):
        reader.note("data.min_length_dict", "data.min_length counts for all samples here")
    if skipped := _skipped(reader):
        data["skipSteps"] = skipped
    return data


def _skipped(reader: Reader) -> list[str]:
    """Steps to skip, counted from 1; InternLM counts batches from 0: `"1-10,20"`."""
    given = reader.get("data.skip_batches", str, "")
    if not re.fullmatch(r"(\d+(-\d+)?(,\d+(-\d+)?)*)?", given):
        reader.refuse("data.skip_batches", f'is {given!r}, which is no list such as "1-10,20"')
    spans = [span.split("-") for span in given.split(",") if span]
    return ["-".join(str(int(batch) + 1) for batch in span) for span in spans]


def _training(reader: Reader, world_size: int) -> dict[str, Any]:
    steps = reader.need("data.total_steps", int)
    if (scheduled := reader.get("lr_scheduler.total_steps", int, steps)) != steps:
        reader.refuse(
            "lr_scheduler.total_steps",
            f"is {scheduled}, and data.total_steps is {steps}: the schedule ends with the job here",
        )
    precision = reader.get("model.dtype", str, "torch.float16")
    if precision not in _PRECISIONS:
        reader.refuse(
            "model.dtype",
            f"is {precision!r}; use one of {', '.join(_PRECISIONS)}",
        )
    if precision == "torch.tf32":
        reader.note("model.dtype", "fp32 without TF32 is used")
    micro, seq_len = reader.need("data.micro_bsz", int), reader.need("data.seq_len", int)
    sequences, left = divmod(micro * reader.get("data.micro_num", int, 1), _model_parallel(reader))
    if left or not sequences:
        reader.refuse(
            "data.micro_num",
            "times micro_bsz must be a multiple of the tensor and pipeline parallel sizes: without these, all ranks "
            "share the batch",
        )
    micro = next(size for size in range(micro, 0, -1) if sequences % size == 0)
    beta2 = reader.get("adam.adam_beta2", float, 0.95)
    if reader.get("beta2_scheduler.init_beta2", float, beta2) != beta2:
        reader.refuse("beta2_scheduler.init_beta2", f"must be adam.adam_beta2, {beta2}")
    reader.get("adam.adam_beta2_c", (int, float), 0)  # only a name for the scheduler's
    exponent = reader.get("beta2_scheduler.c", (int, float), 0)
    decay = reader.get("adam.weight_decay", float, 0.01)
    if decay:
        reader.note("adam.weight_decay", "norms and biases are not decayed here; InternLM decays them too")
    reader.note("lr_scheduler", "the last step has eta_min; InternLM's would reach it one step after")
    if reader.get("data.valid_every", int, 0) and not reader.get("data.valid_folder", str):
        reader.note("data.valid_every", "has no effect without a valid_folder")
    batch: dict[str, Any] = {
        "globalBatchTokens": sequences * seq_len * world_size,
        "microBatchSize": micro,
    }
    if ramp := _ramp(reader, batch["globalBatchTokens"]):
        batch["batchRampUp"] = ramp
    scale = _loss_scale(reader)
    if precision == "torch.float16":
        batch["lossScale"] = scale
    return {
        "steps": steps,
        **batch,
        "precision": _PRECISIONS[precision],
        "optimizer": {
            "lr": reader.need("adam.lr", float),
            "betas": [reader.get("adam.adam_beta1", float, 0.9), beta2],
            "eps": reader.get("adam.adam_eps", float, 1e-8),
            "weightDecay": decay,
            "clipGradNorm": reader.get("hybrid_zero_optimizer.clip_grad_norm", float, 0.0),
        }
        | ({"beta2Exponent": exponent} if exponent > 0 else {}),
        "schedule": {
            "name": "cosine",
            "warmupSteps": int(steps * reader.get("lr_scheduler.warmup_ratio", float, 0.0)),
            "minLr": reader.get("lr_scheduler.eta_min", float, 0.0),
        },
        "skip": {"spikeThreshold": 0},  # InternLM skips steps whose gradients are no numbers, and no others
        "seed": 1024,
        "validateEverySteps": reader.get("data.valid_every", int, 0),
        "logEverySteps": 1,
    }


def _ramp(reader: Reader, full: int) -> dict[str, int]:
    """A growing batch from InternLM's `"start increment steps"`, in micro-batches of a rank."""
    given = reader.get("data.rampup_batch_size", str, "")
    if not given:
        return {}
    if not re.fullmatch(r"\d+ +\d+ +\d+", given):
        reader.refuse("data.rampup_batch_size", f'is {given!r}, which is no "start increment steps"')
    start, increment, steps = map(int, given.split())
    whole = reader.get("data.micro_num", int, 1)
    if not 0 < start < whole or not increment or (whole - start) % increment:
        reader.refuse(
            "data.rampup_batch_size", f"must lead from start to micro_num, {whole}, in whole increments"
        )
    reader.note(
        "data.rampup_batch_size", "the batch grows after equally many tokens here, not equally many steps"
    )
    unit = full // whole
    over = sum(size * unit * steps for size in range(start, whole, increment))
    return {"startTokens": start * unit, "incrementTokens": increment * unit, "overTokens": over}


def _loss_scale(reader: Reader) -> dict[str, int]:
    """fp16's dynamic loss scale; the other precisions need none."""
    fp16 = reader.get("grad_scaler.fp16", dict, {})
    numbers = {"initial": fp16.get("initial_scale", 65536), "growthSteps": fp16.get("growth_interval", 1000)}
    for field, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            reader.refuse("grad_scaler.fp16", f"gives {value!r} where {field} is a whole number")
    for path, here in (("grad_scaler.growth_factor", 2.0), ("grad_scaler.backoff_factor", 0.5)):
        if (factor := reader.get(path, float, here)) != here:
            reader.refuse(path, f"is {factor}; only {here} is supported")
    return numbers


def _model_parallel(reader: Reader) -> int:
    """Ranks that InternLM would split one model over, by tensor and pipeline parallelism."""
    return _size(reader, "parallel.tensor", 1) * _size(reader, "parallel.pipeline", 1)


def _parallel(reader: Reader) -> dict[str, Any]:
    """Hybrid ZeRO in place of whatever InternLM would split: the same memory a rank for states."""
    split, zero1 = _model_parallel(reader), _size(reader, "parallel.zero1", -1)
    if split > 1:
        reader.note(
            "parallel",
            f"parameters and gradients are sharded over {split} ranks instead of tensor and pipeline parallelism; "
            "the batch stays the same",
        )
    if (weight := _size(reader, "parallel.weight", 1)) > 1:
        reader.refuse(
            "parallel.weight", f"is {weight}: shard parameters by parallel.zero in a manifest instead"
        )
    optimizer = split * zero1 if zero1 > 0 else -1
    zero = {"parameters": split, "gradients": split, "optimizer": optimizer}
    return {"zero": zero, "recompute": _recompute(reader)}


def _recompute(reader: Reader) -> str:
    """Recomputed blocks: InternLM takes False, True or a share of the layers, in 0.1 by a second field."""
    asked = reader.get("model.checkpoint", (bool, int, float), False)
    share = float(asked)
    if share and "model.checkpoint_fraction" in reader.config.lines:
        share = reader.get("model.checkpoint_fraction", float, 1.0)
    reader.get("model.checkpoint_fraction", float)
    if not 0 <= share <= 1:
        reader.refuse("model.checkpoint", f"is {share}, which is no share of the layers from 0 to 1")
    percent = round(share * 100)
    return {0: "none", 100: "full"}.get(percent, f"{percent}%")


def _size(reader: Reader, path: str, default: int) -> int:
    """A degree, given as a number or as a dict with `size`."""
    given = reader.get(path, (int, dict), default)
    if isinstance(given, dict):
        if given.get("fsdp"):
            reader.refuse(path, "asks for fsdp: use parallel.zero (-1, -1, -1) in a manifest")
        given = given.get("size", default)
    if isinstance(given, bool) or not isinstance(given, int):
        reader.refuse(path, "must be a whole number")
    size: int = given
    return size


def _checkpoint(reader: Reader, machine: Machine, name: str) -> dict[str, Any]:
    saves = reader.get("ckpt.enable_save_ckpt", bool, True)
    given = machine.save_folder or reader.get("ckpt.save_ckpt_folder", str)
    reader.get("ckpt.save_ckpt_folder", str)
    path = _path(reader, "ckpt.save_ckpt_folder", given) if given else f"{name}-checkpoints"
    every = reader.get("ckpt.checkpoint_every", (int, float), 0)
    if not saves or not 1 <= every <= MAX_STEPS:
        reader.note("ckpt", f"the last step is always saved here, in {path}")
        every = MAX_STEPS
    reader.note("ckpt", "InternLM keeps all checkpoints; checkpoint.keep says how many stay here")
    return {"path": path, "everySteps": int(every), "keep": MAX_KEEP}


def _start(reader: Reader, own: str) -> str | None:
    """The weights to start from, if any.  Refuses to go on from any checkpoint but the job's own.

    InternLM 0.2 takes no notice of `load_ckpt_info` unless auto_resume is off.
    """
    given = reader.get("ckpt.load_given_ckpt", bool)
    resumes = reader.get("ckpt.auto_resume", bool, not given)
    for field in ("ckpt.load_ckpt_folder", "ckpt.load_model_only_folder", "ckpt.load_ckpt_info"):
        start = reader.get(field, (str, dict))
        folder = start.get("path") if isinstance(start, dict) else start
        if folder is None:
            continue
        if given is False or (resumes and field == "ckpt.load_ckpt_info"):
            reader.note(field, "has no effect, as in InternLM without auto_resume=False")
            continue
        if not isinstance(folder, str):
            reader.refuse(field, "must name a folder")
        path = _path(reader, field, folder)
        if path.rstrip("/") == own.rstrip("/"):
            reader.note(field, "a job always resumes from its newest good checkpoint")
            continue
        content = start.get("content") if isinstance(start, dict) else None
        if field == "ckpt.load_model_only_folder" or list(content or ()) == ["model"]:
            return path
        reader.refuse(
            field,
            f"goes on from {path}: a job goes on from its own checkpoints, in {own}, or starts from weights alone, by "
            "load_ckpt_info with content=('model',); take the field out to train from scratch",
        )
    return None


def _telemetry(reader: Reader) -> dict[str, Any]:
    folder = reader.get("tensorboard_folder", str)
    if folder and reader.get("enable_tb", bool, True):
        return {"tensorboard": {"path": folder}}
    return {}


def _path(reader: Reader, field: str, given: str) -> str:
    """A path or URL without InternLM's prefix: `local:/p`, `boto3:s3://bucket.endpoint/p`."""
    if given.startswith("local:"):
        return given.removeprefix("local:")
    if given.startswith(("boto3:", "s3:")):
        found = re.fullmatch(r"s3://([^./]+)(?:\.([^/]+))?/?(.*)", given.removeprefix("boto3:"))
        if not found:
            reader.refuse(field, f"is {given!r}, which is no boto3:s3://bucket.endpoint/path")
            raise AssertionError
        bucket, endpoint, path = found.groups()
        if endpoint:
            reader.note(
                field, f"the store's address goes into the environment: AWS_ENDPOINT_URL=http://{endpoint}"
            )
        return f"s3://{bucket}/{path}".rstrip("/")
    if re.match(r"[a-z0-9]+:(?!//)", given):
        reader.refuse(field, f"is {given!r}; known are local:/path, boto3:s3://bucket.endpoint/path and URLs")
    return given
