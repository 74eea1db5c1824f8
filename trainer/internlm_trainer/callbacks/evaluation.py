"""What the model makes of text that it was not trained on."""

from __future__ import annotations

import logging

import numpy as np
import torch
import torch.distributed as dist

from internlm_trainer.callbacks.base import Callback, StepResult
from internlm_trainer.data.packing import Row
from internlm_trainer.generate import complete

log = logging.getLogger(__name__)


class Evaluation(Callback):
    """The mean loss of the held-out tokens, every `validateEverySteps` steps and after the last one."""

    def after_step(self, result: StepResult) -> None:
        every = self.trainer.spec.training.validate_every_steps
        final = result.step == self.trainer.total_steps
        if final or (every and result.step % every == 0 and not result.last):  # a stop has only so much time
            self.validate()

    @torch.no_grad()
    def validate(self) -> None:
        trainer = self.trainer
        count = trainer.world.largest(len(trainer.held_out))
        if not count:
            return
        sums = torch.zeros(2, dtype=torch.float64, device=trainer.world.device)
        for index in range(count):
            # Ranks with fewer rows go along with the others' gathers of sharded parameters.
            row = trainer.held_out[index] if index < len(trainer.held_out) else _blank(trainer.row_tokens)
            sums[0] += trainer.loss(row)
            sums[1] += int((row.labels != -100).sum())
        dist.all_reduce(sums)
        loss, tokens = sums.tolist()
        trainer.telemetry.validated(loss / max(tokens, 1))


class Completions(Callback):
    """Completes the spec's prompts in the end; every rank takes part, since parameters may be sharded."""

    def finish(self) -> None:
        tokenizer, spec = self.trainer.tokenizer, self.trainer.spec
        for prompt in spec.training.completions:
            ids = [tokenizer.bos, *tokenizer.encode(prompt)]
            words = complete(self.trainer.model, ids, stop=tokenizer.eos, context=spec.model.seq_len)
            log.info("the model completes %r with %r", prompt, tokenizer.decode(words))


def _blank(tokens: int) -> Row:
    """A row without any label."""
    return Row(
        tokens=np.zeros(tokens, np.int64),
        labels=np.full(tokens, -100, np.int64),
        cu_seqlens=np.array([0, tokens], np.int32),
        positions=np.arange(tokens),
        max_seqlen=tokens,
        source=0,
    )
