"""`spec.training`: batches, precision, optimizer and schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from internlm_trainer.config.base import Spec, Tokens


class OptimizerSpec(Spec):
    """The optimizer of the fp32 master weights."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest."""
    lr: Annotated[float, Field(gt=0, le=1)] = 4e-5
    """Peak learning rate."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [
        0.9,
        0.95,
    ]
    """Decay rates of AdamW's first and second moment."""
    beta2_exponent: Annotated[float, Field(ge=0, le=10)] = 0.0
    """c > 0: the second moment's decay rate grows with the step as 1 - step^-c, from where that exceeds betas[1]."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay rate of Muon's momentum."""
    eps: Annotated[float, Field(gt=0, le=0.1)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Decoupled weight decay of matrices; norms and biases are not decayed."""
    clip_grad_norm: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    state_type: Literal["fp32", "bf16"] = "fp32"
    """Type of the moments. bf16 halves their memory."""
    backend: Literal["auto", "torch", "apex"] = "auto"
    """Kernels of AdamW. auto: on GPUs our own, which also clips and rounds; else PyTorch's, which torch always means.
    apex: apex's, where it is installed."""


class ScheduleSpec(Spec):
    """The learning rate over the steps: linear warm-up, then the named curve."""

    name: Literal["cosine", "constant"] = "cosine"
    """Curve after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Steps over which the learning rate rises linearly to its peak."""
    min_lr: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Learning rate at the last step of the cosine."""


class SkipSpec(Spec):
    """Steps whose update is left out, on all ranks alike: those whose loss or gradient norm is no finite number,
    and spikes of either. Their data counts as used, and they are counted and reported."""

    window: Annotated[int, Field(ge=8, le=8192)] = 128
    """Steps that a step is compared with; before there are that many, nothing is a spike."""
    spike_threshold: Annotated[int, Field(ge=0, le=1000)] = 10
    """How far above the window's median the logarithm of a loss or gradient norm may be, in standard deviations
    estimated from the median absolute deviation; 0: any finite number is good."""
    max_in_a_row: Annotated[int, Field(ge=1, le=100000)] = 10
    """Skipped steps in a row after which the job ends, with the reason Diverged."""


class LossScaleSpec(Spec):
    """Dynamic loss scaling, for fp16 alone."""

    initial: Annotated[int, Field(ge=1, le=2**30)] = 65536
    """First scale of a micro-batch's loss; halved whenever gradients overflow."""
    growth_steps: Annotated[int, Field(ge=1, le=1000000)] = 2000
    """Steps without an overflow after which the scale is doubled."""


class Float8Spec(Spec):
    """How training in fp8 is watched. Every so often part of a row is computed in bf16 as well, and where the two
    differ by more than they may twice in a row, training goes on in bf16."""

    check_every_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] = 250
    """Steps between two comparisons; 0: never."""
    max_loss_difference: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Largest difference of the loss, as a share of bf16's."""
    min_gradient_cosine: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Smallest cosine between the gradients of all norms' weights, which every product of the backward reaches."""


class BatchRampUpSpec(Spec):
    """A global batch that starts small and grows in equal increments to globalBatchTokens."""

    start_tokens: Tokens
    """Tokens of the first step."""
    increment_tokens: Tokens
    """Tokens by which the batch grows at a time."""
    over_tokens: Tokens
    """Tokens of training after which the batch is whole; the increments are equally far apart."""


class TrainingSpec(Spec):
    """How long, in which batches and with which optimizer the model is trained."""

    steps: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Optimizer steps. Give this or `tokens`."""
    tokens: Tokens | None = None
    """Tokens to train on, rounded up to whole steps. Give this or `steps`."""
    global_batch_tokens: Tokens | None = None
    """Tokens of one optimizer step over all ranks; gradient accumulation follows from it. Default: one
    micro-batch a rank."""
    micro_batch_size: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Sequences of seqLen tokens that a rank processes at once. Default 1, unless `microBatchTokens` is given."""
    micro_batch_tokens: Tokens | None = None
    """Tokens of one packed row, that is of a rank's micro-batch, where it is no multiple of seqLen; at least
    seqLen."""
    batch_ramp_up: BatchRampUpSpec | None = None
    """Smaller batches at the beginning."""
    precision: Literal["bf16", "fp8", "fp16", "fp32"] = "bf16"
    """Type of parameters and activations; fp16 is for cards without bf16. Master weights are fp32 always. fp8: bf16,
    but for the matrix products of the blocks, whose factors are rounded to 8 bits (L40S, H100 and later)."""
    fp8: Float8Spec = Float8Spec()
    """How training in fp8 is watched."""
    loss_scale: LossScaleSpec = LossScaleSpec()
    """Loss scaling in fp16."""
    optimizer: OptimizerSpec = OptimizerSpec()
    """The optimizer and its settings."""
    schedule: ScheduleSpec = ScheduleSpec()
    """The learning rate's schedule."""
    skip: SkipSpec = SkipSpec()
    """Which steps' updates are left out."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1024
    """Seed of initialisation and shuffling."""
    validate_every_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Steps between two evaluations on `data.validation`; 0: only after the last step."""
    validation_rows: Annotated[int, Field(ge=1, le=1048576)] = 64
    """Rows of `data.validation` that an evaluation looks at, at most."""
    log_every_steps: Annotated[int, Field(ge=1, le=2**31 - 1)] = 10
    """Steps between two log lines."""
    completions: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(max_length=16)
    ] = []
    """Prompts that the trained model completes at the end, in the log."""
