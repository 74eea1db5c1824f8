"""The memory of one rank: what stays through a step, and what is there at its worst moment.

Buffers of parameters, gradients and optimizer states are counted to the byte, from the arithmetic that makes them.
Activations are counted from what each operation keeps for the backward pass; temporaries of single operations
only where they matter (logits, gradients of a unit).  The CUDA context, NCCL's buffers and fragmentation are not
counted: `MARGIN` leaves room for them.
"""

from __future__ import annotations

from typing import NamedTuple

from internlm_trainer import config
from internlm_trainer.config import LOSS_CHUNK, ModelShape, OptimizerSpec, TrainSpec, ZeroSpec
from internlm_trainer.config.parallel import recomputed_blocks
from internlm_trainer.parallel.layout import GradientBuffers, ZeroLayout, gradient_buffers
from internlm_trainer.plan.units import Unit, Units, model_units, qkv_width

FP32 = 4
TYPE_BYTES = {"bf16": 2, "fp8": 2, "fp16": 2, "fp32": 4}
MARGIN = 0.1
"""Share of a GPU's memory to leave free: about 1 GiB of CUDA context and NCCL buffers, and fragmentation."""


class Memory(NamedTuple):
    """Bytes on the device of one rank at the step's worst moment, by what they hold."""

    parameters: int
    """Parameters, or the rank's shard of them, in the model's type."""
    gradients: int
    """Reduced and accumulated gradients."""
    optimizer: int
    """fp32 master weights and the optimizer's states."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    logits: int
    """Logits, their softmax and gradients."""
    buffers: int
    """Parameters gathered for use, and gradients on their way."""
    host: int
    """Host memory of offloaded master weights, states and gradients; no part of the total."""
    moment: str
    """When the most memory is in use: `loss`, `head`, `block` or `embedding` (their backward), or `update`."""

    @property
    def total(self) -> int:
        return (
            self.parameters + self.gradients + self.optimizer + self.activations + self.logits + self.buffers
        )

    def fits(self, memory: int) -> bool:
        """Whether a device of `memory` bytes holds it, with `MARGIN` to spare."""
        return self.total <= memory * (1 - MARGIN)


class Work(NamedTuple):
    """What a job is, whatever its layout."""

    shape: ModelShape
    units: Units
    kept: Activations
    zero: ZeroSpec
    optimizer: OptimizerSpec
    world_size: int
    tokens: int
    """Of a row, that is of a micro-batch of a rank."""
    micro_batches: int
    """Of a rank, in a step."""
    width: int
    """Bytes of a number in the model's type."""
    state_width: int
    """Bytes of a number of the optimizer's moments."""
    sent: int
    """Bytes of a gradient's number on its way into the reduction."""
    gpu: bool
    copies: int
    """Bytes of a weight's float8 copies in the blocks' matrices."""
    chunked: bool
    """Some tokens' logits at a time are made, and their gradients with them (kernels.head_loss)."""

    @classmethod
    def of(cls, spec: TrainSpec, world_size: int, *, gpu: bool = True) -> Work:
        """The work of `spec` on so many ranks; on CPUs or GPUs."""
        shape, zero = config.model_shape(spec.model), spec.parallel.zero
        return cls(
            shape=shape,
            units=model_units(shape),
            kept=Activations.of(spec, shape, gpu=gpu),
            zero=zero,
            optimizer=spec.training.optimizer,
            world_size=world_size,
            tokens=config.row_tokens(spec),
            micro_batches=config.gradient_accumulation(spec, world_size),
            width=TYPE_BYTES[spec.training.precision],
            state_width=TYPE_BYTES[spec.training.optimizer.state_type],
            sent=2 if zero.reduce_precision == "bf16" and world_size > 1 else FP32,
            gpu=gpu,
            copies=2 if spec.training.precision == "fp8" else 0,
            chunked=gpu and spec.training.precision in ("bf16", "fp8"),
        )

    def gradient_buffers(self, layout: ZeroLayout, unit: Unit) -> GradientBuffers:
        """Where a unit's gradients are."""
        return gradient_buffers(
            layout,
            unit.padded(layout.optimizer),
            accumulation=self.zero.accumulation,
            offload=self.zero.offload == "optimizer",
            micro_batches=self.micro_batches,
        )


class States(NamedTuple):
    """What a rank holds from step to step, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    host: int


def memory(work: Work, layout: ZeroLayout, recompute: str) -> Memory:
    """The memory of one rank under a layout and a `parallel.recompute`."""
    shape, units, kept, tokens, width = work.shape, work.units, work.kept, work.tokens, work.width
    held = states(work, layout)
    at_loss, at_head = _loss(work)

    def gathered(*some: Unit) -> int:
        return sum(unit.padded(layout.optimizer) * width for unit in some) if layout.parameters > 1 else 0

    def arriving(*some: Unit) -> int:
        return sum(work.gradient_buffers(layout, unit).incoming * work.sent for unit in some)

    blocks = recomputed_blocks(recompute, shape.layers)
    of_blocks = tokens * sum(kept.block("full" if whole else recompute) for whole in blocks)
    everything = of_blocks + tokens * kept.rest
    again = tokens * kept.recomputed("full" if blocks[-1] else recompute)
    # On a GPU a reduction holds what it reads until the unit after the next; on a CPU it has ended at once.
    previous = [units.block] if work.gpu else []
    earlier = [units.block, units.embedding] if work.gpu and work.micro_batches > 1 else []
    moments = {
        "loss": (everything, at_loss.logits, at_loss.others + gathered(units.head) + arriving(*earlier)),
        "head": (
            everything,
            at_head.logits,
            at_head.others + gathered(units.head, units.norm) + arriving(units.head),
        ),
        "block": (
            of_blocks + again + tokens * kept.gradients,
            0,
            gathered(units.block, units.block)
            + arriving(units.block, *previous)
            # The gradient of a matrix, in float8 of the two that are multiplied together.
            + width * shape.ffn_size * shape.hidden_size * (2 if work.copies else 1),
        ),
        "embedding": (
            tokens * width * shape.hidden_size,
            0,
            arriving(units.embedding, *previous) + width * units.embedding.parameters,
        ),
        "update": (0, 0, _update(work, layout)),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    activations, of_logits, buffers = moments[moment]
    return Memory(
        held.parameters, held.gradients, held.optimizer, activations, of_logits, buffers, held.host, moment
    )


def states(work: Work, layout: ZeroLayout) -> States:
    """What a rank holds from step to step, exactly."""
    parameters = accumulated = elements = optimizer = 0
    for unit in work.units:
        shard = unit.padded(layout.optimizer) // layout.optimizer
        elements += unit.copies * shard
        parameters += unit.copies * unit.padded(layout.optimizer) // layout.parameters * work.width
        accumulated += unit.copies * work.gradient_buffers(layout, unit).accumulated * FP32
        if unit.name == "block":
            parameters += unit.copies * (unit.parameters - unit.other) * work.copies
        optimizer += unit.copies * (shard * FP32 + _moments(work, layout, unit) * work.state_width)
    reduced = elements * FP32
    if work.zero.offload == "none":
        return States(parameters, accumulated + reduced, optimizer, 0)
    rounded = elements * work.width if work.gpu else 0
    return States(parameters, accumulated, 0, optimizer + reduced + rounded)


class _AtHead(NamedTuple):
    """Bytes of logits or their gradients, and of the gradients of what the head reads and of its weights."""

    logits: int
    others: int


def _loss(work: Work) -> tuple[_AtHead, _AtHead]:
    """When the loss is computed, and in the head's backward."""
    tokens, width, head = work.tokens, work.width, work.units.head.parameters
    of_hidden = tokens * work.shape.hidden_size * width
    if work.chunked:  # all gradients at once
        logits = min(tokens, LOSS_CHUNK) * work.shape.vocab_size
        gradients = of_hidden + head * (FP32 if tokens > LOSS_CHUNK else width)
        return _AtHead(width * logits, gradients), _AtHead(0, gradients + width * head)
    # In the backward of log-softmax: its output, the gradient of that, and that of the logits, in fp32.
    logits = tokens * work.shape.vocab_size
    return _AtHead(3 * FP32 * logits, 0), _AtHead(width * logits, of_hidden + width * head)


def _moments(work: Work, layout: ZeroLayout, unit: Unit) -> int:
    """Numbers that the optimizer keeps of a unit beside its weights, on the rank that has the most.

    AdamW keeps two of each parameter, Muon one of a block's matrices; norms and biases lie at a bucket's end.
    """
    padded = unit.padded(layout.optimizer)
    shard = padded // layout.optimizer
    if work.optimizer.name == "muon" and unit.name == "block":
        return shard + min(shard, padded - unit.parameters + unit.other)
    return 2 * shard


def _update(work: Work, layout: ZeroLayout) -> int:
    """Temporaries of the optimizer's update.

    Moments in bf16 are computed in fp32, a unit at a time; Muon gathers a block's momentum and
    iterates on a matrix of it.
    """
    if work.zero.offload != "none":
        return 0
    shard = max(unit.padded(layout.optimizer) for unit in work.units) // layout.optimizer
    fused = work.gpu and work.optimizer.backend == "auto"
    fp32 = 2 * shard * FP32 if work.optimizer.state_type == "bf16" and not fused else 0
    if work.optimizer.name != "muon":
        return fp32
    block = work.units.block.padded(layout.optimizer)
    matrix = work.shape.ffn_size * work.shape.hidden_size
    return max(fp32, work.width * (block + block // layout.optimizer + 5 * matrix) + FP32 * 3 * matrix)


class Activations(NamedTuple):
    """Bytes a token that operations keep for the backward pass."""

    stream: int
    """The residual stream."""
    attention: int
    """q, k and v, rotated and not, what attention gave, and its log-sum-exp."""
    norms: int
    """The inputs and outputs of both norms, but for the block's input; in fp8, the outputs as they are multiplied."""
    feed_forward: int
    """All that the SwiGLU keeps."""
    products: int
    """What the first two products of the SwiGLU give."""
    rest: int
    """Of the model outside of the blocks."""
    gradients: int
    """Temporaries of a block's backward."""

    @classmethod
    def of(cls, spec: TrainSpec, shape: ModelShape, *, gpu: bool) -> Activations:
        """For a model of this shape.

        A GPU's RMSNorm is one operation; a CPU's is several, which keep the normalised input, in fp32 too. A CPU
        attends to each document apart, and keeps what each gave beside all of it.
        """
        width, setting = TYPE_BYTES[spec.training.precision], spec.parallel.compile
        compiled = setting == "blocks" or (gpu and setting == "auto")
        float8 = spec.training.precision == "fp8"
        stream, ffn = shape.hidden_size * width, shape.ffn_size * width
        factor = shape.hidden_size if float8 else stream
        head_dim = shape.hidden_size // shape.heads
        rotated = head_dim * (shape.heads + shape.kv_heads) * width
        apart = stream if not gpu and spec.data.packing == "documents" else 0
        attention = qkv_width(shape) * width + rotated + stream + apart + shape.heads * FP32
        norm = FP32 + (0 if gpu else stream + (0 if width == FP32 else shape.hidden_size * FP32))
        in_block = 0 if compiled else norm
        return cls(
            stream=stream,
            attention=attention + (factor if float8 else 0),
            norms=stream + 2 * factor + 2 * in_block,
            feed_forward=2 * ffn + shape.ffn_size if float8 else (3 if compiled else 4) * ffn,
            products=2 * ffn,
            rest=2 * stream
            + norm
            + 2 * 8
            + 2 * (head_dim // 2) * FP32,  # tokens and labels, int64; cos and sin
            # SwiGLU's product has gone for its gradient; in float8, its gradients are there thrice.
            gradients=(4 if float8 else 2) * ffn + 2 * stream,
        )

    def block(self, recompute: str) -> int:
        """Kept of a block: `none`, `selective` or `full`; any other means `none`."""
        if recompute == "full":
            return self.stream
        if recompute == "selective":
            return 2 * self.stream + self.attention + self.products
        return self.stream + self.attention + self.norms + self.feed_forward

    def recomputed(self, recompute: str) -> int:
        """Of a block that is in its backward, beyond what was kept.

        By operation only its second half, whose backward is first and needs more, is there at that moment.
        """
        if recompute == "full":
            return self.block("none") - self.stream
        return self.feed_forward - self.products + self.norms // 2 if recompute == "selective" else 0
