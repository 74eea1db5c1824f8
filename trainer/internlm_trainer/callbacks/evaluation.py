"""What the model makes of text that it was not trained on."""

from __future__ import annotations

import logging

import numpy as np
import torch
import torch.distributed as dist

from internlm_trainer.callbacks.base import Callback, StepResult
from internlm_trainer.data.packing import IGNORED, Row
from internlm_trainer.generate import complete
from internlm_trainer.telemetry.tally import source_names

log = logging.getLogger(__name__)


class Evaluation(Callback):
    """The mean loss of the held-out tokens, every `validateEverySteps` steps and after the last one."""

    section = "evaluation"

    def after_step(self, result: StepResult) -> None:
        if self.trainer.validates(result):
            self.validate()

    @torch.no_grad()
    def validate(self) -> None:
        trainer = self.trainer
        count = trainer.world.largest(len(trainer.held_out))
        if not count:
            return
        sources = trainer.spec.data.validation
        sums = torch.zeros(2, len(sources), dtype=torch.float64, device=trainer.world.device)
        for index in range(count):
            # Ranks with fewer rows go along with the others' gathers of sharded parameters.
            row = trainer.held_out[index] if index < len(trainer.held_out) else _blank(trainer.row_tokens)
            sums[0, row.source] += trainer.loss(row)
            sums[1, row.source] += row.learned
        dist.all_reduce(sums)
        losses, tokens = sums.tolist()
        values = {"validation_loss": sum(losses) / max(sum(tokens), 1)}
        if len(sources) > 1:
            names = source_names([source.path for source in sources])
            values |= {
                f"validation_loss/{name}": loss / labels
                for name, loss, labels in zip(names, losses, tokens, strict=True)
                if labels
            }
        trainer.telemetry.validated(trainer.step, values)


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
        labels=np.full(tokens, IGNORED, np.int64),
        cu_seqlens=np.array([0, tokens], np.int32),
        positions=np.arange(tokens),
        max_seqlen=tokens,
        source=0,
    )
