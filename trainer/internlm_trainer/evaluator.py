"""Evaluating a job's checkpoints beside its training: `python -m internlm_trainer.evaluator [--follow]`.

Environment: INTERNLM_JOB_FILE (the manifest), INTERNLM_TERMINATION_LOG, and INTERNLM_CHECKPOINT, the one that is to be
evaluated.  With --follow, on one machine, the newest ones in turn, until standard input ends: then the last.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from internlm_operator.api import JobSpec
from internlm_operator.manifest import JobError, load_manifests, parse_job
from internlm_trainer.checkpoint import BadCheckpoint, StorageUnavailable
from internlm_trainer.checkpoint.folder import Folder
from internlm_trainer.checkpoint.format import parse_step, step_name
from internlm_trainer.checkpoint.load import stored_steps
from internlm_trainer.config import EvaluationSpec, is_due
from internlm_trainer.data.tokenizer import load_tokenizer
from internlm_trainer.errors import EXIT_USER_ERROR, UserError
from internlm_trainer.evaluation import history
from internlm_trainer.evaluation.likelihood import Scorer
from internlm_trainer.evaluation.run import Result, Work, evaluate, found_in, prepare
from internlm_trainer.storage import join
from internlm_trainer.telemetry.progress import set_up_logging
from internlm_trainer.weights.load import load_model
from internlm_trainer.weights.recognise import open_weights

log = logging.getLogger("internlm_trainer.evaluator")

POLL_SECONDS = 2.0
NICE = 10
BATCH_TOKENS = 8192
# Of the termination message, which the kubelet cuts at 4096.
MAX_MESSAGE = 1000


def main(arguments: Sequence[str]) -> int:
    """Evaluate, and leave what came of it where the operator finds it.  Returns the exit code."""
    set_up_logging(0)
    try:
        spec = parse_job(load_manifests(Path(os.environ["INTERNLM_JOB_FILE"]))[0]).spec
        assert spec.evaluation is not None
        if "--follow" in arguments:
            _follow(spec, spec.evaluation)
            return 0
        results = evaluate_checkpoint(spec, spec.evaluation, os.environ["INTERNLM_CHECKPOINT"])
    except (UserError, JobError) as error:
        return _end("UserError", str(error), EXIT_USER_ERROR)
    except Exception as error:
        traceback.print_exc()
        return _end("Error", f"{type(error).__name__}: {error}", 1)
    return _end("Completed", "", 0, results)


def evaluate_checkpoint(
    spec: JobSpec, asked: EvaluationSpec, url: str, work: Work | None = None
) -> list[Result]:
    """Evaluate a checkpoint of the job; what came of it goes to the log and into the history, too.

    work: what is read for it, if it is known.  Raises UserError, BadCheckpoint, StorageUnavailable.
    """
    step = parse_step(url.rstrip("/").rpartition("/")[2])
    assert step is not None
    work = work or _work(asked)
    weights = open_weights(url, "INTERNLM_CHECKPOINT")
    tokenizer = load_tokenizer(weights.tokenizer or spec.data.tokenizer)
    scorer = Scorer(load_model(weights), spec.model.seq_len, BATCH_TOKENS)
    results = []
    for result, _ in evaluate(scorer, tokenizer, work):
        results.append(result)
        for name, value in found_in(result.metrics).items():
            fields = {"step": step, "task": result.task, "metric": name, "value": value}
            log.info("step %d: %s %s %.4f", step, result.task, name, value, extra={"fields": fields})
    history.add(spec.checkpoint.path, step, results)
    return results


def _work(asked: EvaluationSpec) -> Work:
    return prepare(asked.tasks, asked.data or ".", asked.text, asked.shots, asked.limit)


def _follow(spec: JobSpec, asked: EvaluationSpec) -> None:
    """Evaluate checkpoints as they come, below the training's priority."""
    os.nice(NICE)
    work, folder, last = _work(asked), Folder(spec.checkpoint.path), False
    evaluated = history.evaluated_step(history.read(spec.checkpoint.path))
    while True:
        last = last or bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
        steps, _ = stored_steps(folder)
        newest = max(steps, default=0)
        if is_due(asked, newest, evaluated, last):
            evaluated = newest
            try:
                evaluate_checkpoint(spec, asked, join(folder.url, step_name(newest)), work)
            except (BadCheckpoint, StorageUnavailable) as error:
                log.warning("step %d is not evaluated: %s", newest, error)
        elif last:
            return


def _end(reason: str, message: str, code: int, results: Sequence[Result] = ()) -> int:
    if message:
        log.error("the evaluation failed: %s", message)
    if path := os.environ.get("INTERNLM_TERMINATION_LOG"):
        found = [
            [result.task, name, round(value, 6)]
            for result in results
            for name, value in found_in(result.metrics).items()
        ]
        content = {"reason": reason, "message": message[:MAX_MESSAGE], "results": found}
        Path(path).write_text(json.dumps(content))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
