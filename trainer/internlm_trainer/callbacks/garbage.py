"""Python's garbage collection, out of the steps."""

from __future__ import annotations

import gc

from internlm_trainer.callbacks.base import Callback, StepResult

EVERY_STEPS = 200


class Garbage(Callback):
    """Collects on all ranks after the same steps.

    Left to itself, each rank collects in a step of its own choice, and all others wait for it in the next
    collective: with a thousand ranks, in most steps (Megatron-LM's manual gc; MegaScale, arXiv:2402.15627).
    """

    section = "garbage"

    def start(self) -> None:
        gc.collect()
        gc.freeze()
        gc.disable()

    def after_step(self, result: StepResult) -> None:
        if result.step % EVERY_STEPS == 0:
            gc.collect()

    def close(self) -> None:
        gc.enable()
        gc.unfreeze()
