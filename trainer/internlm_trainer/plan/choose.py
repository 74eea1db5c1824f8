"""Every legal layout of a job, and the one to take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from internlm_trainer.config import TrainSpec
from internlm_trainer.config.parallel import recomputed_blocks
from internlm_trainer.parallel.layout import ZeroLayout
from internlm_trainer.plan.memory import MARGIN, Memory, Work, memory
from internlm_trainer.plan.traffic import Traffic, traffic

RECOMPUTE = ("none", "selective", "25%", "50%", "75%", "full")
"""Settings that are tried, the least computation first."""
SHORT = 12
"""Options that are shown, at most, beside the job's own."""
RULE = (
    f"of what leaves {MARGIN:.0%} of the memory free, what sends least to other nodes; of equals, what computes "
    "least again, then sends least inside the node, then needs least memory"
)


class Option(NamedTuple):
    """A layout with a `parallel.recompute`, and what it costs."""

    layout: ZeroLayout
    recompute: str
    memory: Memory
    traffic: Traffic
    own: bool
    """It is the job's own."""

    @property
    def degrees(self) -> tuple[int, int, int]:
        return self.layout.parameters, self.layout.gradients, self.layout.optimizer

    def cost(self) -> tuple[float, ...]:
        """What `RULE` compares, and the degrees, so that there is one least."""
        sent = self.traffic.total
        again = _computed_again(self.recompute)
        return sent.across, again, sent.inside, self.memory.total, *self.degrees

    def beats(self, other: Option) -> bool:
        """Whether this one is nowhere worse than the other, and somewhere better."""
        mine, theirs = self.cost()[:4], other.cost()[:4]
        return mine != theirs and all(a <= b for a, b in zip(mine, theirs, strict=True))

    def __str__(self) -> str:
        return f"zero {self.degrees}, recompute {self.recompute}"


class Plan(NamedTuple):
    """What a job can be laid out as."""

    options: tuple[Option, ...]
    """Of each layout, from the least recomputation to the first that fits."""
    device_memory: int
    best: Option | None
    """By `RULE`; None where nothing fits."""
    reason: str

    @property
    def own(self) -> Option | None:
        """The job's own; None where its degrees do not divide the ranks."""
        return next((option for option in self.options if option.own), None)

    @property
    def shortlist(self) -> tuple[Option, ...]:
        """Those worth a look: of each layout the least recomputation that fits, and of these the ones that no other
        one beats in memory, in recomputation and in both kinds of traffic at once."""
        first: dict[tuple[int, int, int], Option] = {}
        for option in self.options:
            if option.memory.fits(self.device_memory):
                first.setdefault(option.degrees, option)
        front: list[Option] = []
        for option in sorted(first.values(), key=Option.cost):  # what beats one comes before it
            if len(front) < SHORT and not any(one.beats(option) for one in front):
                front.append(option)
        own = [self.own] if self.own and self.own not in front else []
        return tuple(sorted([*front, *own], key=Option.cost))


def make_plan(
    spec: TrainSpec, world_size: int, ranks_per_node: int, device_memory: int, *, gpu: bool = True
) -> Plan:
    """Every layout of `world_size` ranks on devices of `device_memory` bytes, and the one to take."""
    zero, recompute = spec.parallel.zero.degrees(world_size), spec.parallel.recompute
    work = Work.of(spec, world_size, gpu=gpu)
    settings = (*RECOMPUTE, *({recompute} - set(RECOMPUTE)))
    ordered = sorted(settings, key=_computed_again)
    options = []
    for degrees in legal_degrees(world_size):
        if work.copies and degrees[0] > 1:
            continue  # a rule of the job's
        layout = ZeroLayout(world_size, *degrees, ranks_per_node)
        sent, enough = traffic(work, layout), False
        for setting in ordered:
            own = degrees == zero and setting == recompute
            if own or not enough:
                need = memory(work, layout, setting)
                options.append(Option(layout, setting, need, sent, own))
                enough = enough or need.fits(device_memory)
    fitting = [option for option in options if option.memory.fits(device_memory)]
    best = min(fitting, key=Option.cost) if fitting else None
    if best is None:
        offload = _with_offload(spec, world_size, ranks_per_node, device_memory)
        why = f"nothing fits into {_gib(device_memory)} with {MARGIN:.0%} to spare: {_too_much(options, offload)}"
        return Plan(tuple(options), device_memory, None, why)
    return Plan(tuple(options), device_memory, best, _reason(best, device_memory))


def legal_degrees(world_size: int) -> Iterable[tuple[int, int, int]]:
    """Every (p, g, o) in which each divides the next and the last the ranks."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    for o in divisors:
        for g in (n for n in divisors if o % n == 0):
            for p in (n for n in divisors if g % n == 0):
                yield p, g, o


def out_of_memory_advice(spec: TrainSpec, world_size: int, ranks_per_node: int, memory_bytes: int) -> str:
    """What to change in a job that ran out of memory on devices of `memory_bytes`: one sentence, with numbers.

    First what changes no result and no layout, recomputation; then the layout; then the micro-batch.
    """
    found = make_plan(spec, world_size, ranks_per_node, memory_bytes)
    own = found.own
    assert own, "a job that runs has a legal layout"
    needs = f"the planner counts {_gib(own.memory.total)} of {_gib(memory_bytes)} a GPU for {own}"
    smaller = [
        option
        for option in found.options
        if option.memory.fits(memory_bytes) and option.memory.total < own.memory.total
    ]
    same = [option for option in smaller if option.degrees == own.degrees]
    if same:
        return f"{needs}: set parallel.recompute to {same[0].recompute}, which needs {_gib(same[0].memory.total)}"
    if smaller:
        best = min(smaller, key=Option.cost)
        p, g, o = best.degrees
        also = f" and parallel.recompute to {best.recompute}" if best.recompute != own.recompute else ""
        return (
            f"{needs}: set parallel.zero to {{parameters: {p}, gradients: {g}, optimizer: {o}}}{also}, which needs "
            f"{_gib(best.memory.total)}"
        )
    offload = _with_offload(spec, world_size, ranks_per_node, memory_bytes)
    return f"{needs}, and no layout leaves {MARGIN:.0%} free: {_too_much(found.options, offload)}"


def _with_offload(spec: TrainSpec, world_size: int, ranks_per_node: int, device_memory: int) -> str:
    """What fits once the optimizer is in the host's memory, as the beginning of an advice; empty where nothing does."""
    zero = spec.parallel.zero
    if zero.offload != "none":
        return ""
    parallel = spec.parallel.model_copy(update={"zero": zero.model_copy(update={"offload": "optimizer"})})
    best = make_plan(
        spec.model_copy(update={"parallel": parallel}), world_size, ranks_per_node, device_memory
    ).best
    if best is None:
        return ""
    return (
        f"set parallel.zero.offload to optimizer, with which {best} needs {_gib(best.memory.total)} and "
        f"{_gib(best.memory.host)} of the host's memory a GPU; or "
    )


def _computed_again(recompute: str) -> float:
    """Share of the forward pass that is computed twice; a few percent by operation."""
    return 0.05 if recompute == "selective" else sum(recomputed_blocks(recompute, 100)) / 100


def _too_much(options: Sequence[Option], offload: str) -> str:
    """What the least is, and what to do."""
    least = min(options, key=lambda option: option.memory.total)
    return (
        f"the least is {_gib(least.memory.total)} for {least}, of it "
        f"{_gib(least.memory.activations + least.memory.logits)} activations and logits; {offload}make "
        "training.microBatchSize (or microBatchTokens) or model.seqLen smaller, or use more GPUs"
    )


def _reason(best: Option, device_memory: int) -> str:
    sent = best.traffic.total
    return (
        f"{best}: {RULE}. It needs {_gib(best.memory.total)} of {_gib(device_memory)}, and a rank sends "
        f"{_gib(sent.across)} to other nodes and {_gib(sent.inside)} inside its node in a step"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
