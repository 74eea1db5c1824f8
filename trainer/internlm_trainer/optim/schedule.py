"""Learning rates and Adam's beta2 as pure functions of the step."""

from __future__ import annotations

import math

from internlm_trainer.config import OptimizerSpec, TrainingSpec


def learning_rate(training: TrainingSpec, step: int, total_steps: int) -> float:
    """The learning rate of a step (0 is the first): linear warm-up, then the spec's curve down to `minLr`.

    The first step's rate is already above 0, so no step is lost; the last step of the cosine has `minLr`.
    """
    peak, schedule = training.optimizer.lr, training.schedule
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.name == "constant":
        return peak
    span = max(1, total_steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    return schedule.min_lr + (peak - schedule.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def beta2(optimizer: OptimizerSpec, step: int) -> float:
    """Adam's beta2 of a step (0 is the first): InternLM's schedule, where the second moment's memory grows with time.

    Adafactor's, Shazeer and Stern, arXiv:1804.04235, with a floor.
    """
    first = optimizer.betas[1]
    if not optimizer.beta2_exponent or step == 0:
        return first
    return max(first, 1 - math.pow(step, -optimizer.beta2_exponent))
