"""Running tasks on a model: their questions from files, the scores of each, and what they come to."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, NamedTuple

from internlm_trainer.data.tokenizer import Tokenizer
from internlm_trainer.errors import UserError
from internlm_trainer.evaluation.likelihood import Likelihood, Progress, Scorer, request_of
from internlm_trainer.evaluation.perplexity import perplexity, requests_of
from internlm_trainer.evaluation.records import Record, RecordFile, find, texts
from internlm_trainer.evaluation.tasks import TASKS, Question, Task, Writing
from internlm_trainer.evaluation.writing import grade, write
from internlm_trainer.generate import Decoder
from internlm_trainer.storage import join

_STDERR = "_stderr"
# With which lm-evaluation-harness draws examples, a generator for each subject, where no other is asked for.
_SEED = 1234
Bars = Callable[[str, int], AbstractContextManager[Progress]]


class Item(NamedTuple):
    """A question of a task, with the whole text before the answer, in which there are so many examples."""

    subject: str
    prompt: str
    shots: int
    question: Question


class Sample(NamedTuple):
    """What came of a question."""

    item: Item
    scores: dict[str, float]
    """Metrics, each in 0 to 1."""
    details: dict[str, Any]
    """What they were found from."""


class Work(NamedTuple):
    """All that a model is evaluated on: questions of tasks, and texts for the perplexity."""

    questions: list[tuple[Task, list[Item]]]
    texts: list[str]


class Settings(NamedTuple):
    """How it is done.

    stride: of the windows of texts; default: the context.  rows: answers that are written at once.  max_tokens: of an
    answer; default: the task's own.  isolated: whether programs that the model writes run without network.
    """

    stride: int | None = None
    rows: int = 8
    max_tokens: int | None = None
    isolated: bool = True


class Result(NamedTuple):
    """Of a task. metrics: means over all questions, with their standard errors; subjects: of each subject."""

    task: str
    shots: int
    questions: int
    metrics: dict[str, float]
    subjects: dict[str, dict[str, float]]


def found_in(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics without their standard errors."""
    return {name: value for name, value in metrics.items() if not name.endswith(_STDERR)}


def task_of(name: str) -> Task:
    """The task of a name.  Raises UserError."""
    if name not in TASKS:
        raise UserError(f"--tasks: {name} is not known; tasks are {', '.join(TASKS)}")
    return TASKS[name]


def needs_code(name: str) -> bool:
    """Whether a task runs programs that the model writes."""
    task = task_of(name)
    return isinstance(task, Writing) and task.program is not None


def prepare(
    tasks: Iterable[str], data: str, text: Iterable[str], shots: int | None, limit: int | None
) -> Work:
    """Read what is asked for.  Raises UserError for what is not there or not right."""
    chosen = [task_of(name) for name in tasks]
    questions = [(task, load(task, data, shots, limit)) for task in chosen]
    found = [one for pattern in text for one in texts(pattern)][:limit]
    if text and not found:
        raise UserError("--text: there is no text in the files")
    return Work(questions, found)


def evaluate(
    scorer: Scorer,
    tokenizer: Tokenizer,
    work: Work,
    settings: Settings = Settings(),
    bars: Bars = lambda *_: nullcontext(_silent),
) -> Iterator[tuple[Result, list[Sample]]]:
    """What comes of each part of the work, one after the other.

    bars: makes a progress bar of a name and a total.
    """
    if work.texts:
        parts = requests_of(work.texts, tokenizer, scorer.context, settings.stride or scorer.context)
        with bars("perplexity", sum(map(len, parts))) as advance:
            found = perplexity(scorer, work.texts, parts, advance)
        yield Result("perplexity", 0, len(work.texts), found.metrics, {}), []
    for task, items in work.questions:
        choices = sum(len(item.question.choices) for item in items)
        with bars(task.name, choices or len(items)) as advance:
            if isinstance(task, Writing):
                samples = answer(scorer, tokenizer, task, items, settings, advance)
            else:
                samples = choose(scorer, tokenizer, items, advance)
        yield summary(task, samples), samples


def answer(
    scorer: Scorer,
    tokenizer: Tokenizer,
    task: Writing,
    items: Sequence[Item],
    settings: Settings,
    progress: Progress,
) -> list[Sample]:
    """Write an answer to each question, and grade it."""
    decoder = Decoder(scorer.model, scorer.context, min(settings.rows, len(items)))
    tokens = settings.max_tokens or task.max_tokens
    texts = write(decoder, tokenizer, [item.prompt for item in items], task.stop, tokens, progress)
    return [
        Sample(
            item,
            grade(task, item.question, text, settings.isolated),
            {"answer": text, "expected": item.question.answer},
        )
        for item, text in zip(items, texts, strict=True)
    ]


def _silent(_: int) -> None:
    """Hears progress and says nothing."""


def load(task: Task, data: str, shots: int | None, limit: int | None) -> list[Item]:
    """The task's questions, by subject.

    data: folder (path or URL) of all tasks.  shots: examples before each, instead of as many as the task has.  limit:
    questions of each subject.  Raises UserError for files that are missing or are none of the task's.
    """
    url = join(data, task.folder)
    files = [file for file in find(url) if task.takes(file.part.subject)]
    questions = _of_first_split(files, task.questions)
    if not questions:  # a folder that holds something else
        wanted = " or ".join(split or "any" for split in task.questions)
        raise UserError(f"--data: {url} holds no {wanted} files of {task.name}")
    shots = task.shots if shots is None else shots
    examples = _of_first_split(files, task.examples) if shots else {}
    items = [
        item
        for subject, found in questions.items()
        for item in _items(task, subject, found, shots, examples.get(subject, []), limit)
    ]
    if not items:
        raise UserError(f"--data: {url} holds no questions of {task.name}, only empty files")
    return items


def _of_first_split(files: Sequence[RecordFile], splits: Sequence[str]) -> dict[str, list[RecordFile]]:
    """The files of the first of the splits that has any, by subject."""
    for split in splits:
        found: dict[str, list[RecordFile]] = defaultdict(list)
        for file in files:
            if file.part.split == split:
                found[file.part.subject].append(file)
        if found:
            return found
    return {}


def _items(
    task: Task,
    subject: str,
    files: Iterable[RecordFile],
    shots: int,
    example_files: Iterable[RecordFile],
    limit: int | None,
) -> Iterator[Item]:
    pool = list(_records(example_files)) if shots else []
    if len(pool) < shots:
        splits = " or ".join(task.examples) or "example"
        raise UserError(
            f"--shots {shots}: {task.name} has {len(pool)} examples of {subject or 'its questions'}, which are in "
            f"its {splits} files; copy those too, or give --shots {len(pool)}"
        )
    draw, number = random.Random(_SEED), min(shots + task.spare, len(pool))  # noqa: S311
    for record in islice(_records(files), limit):
        question = task.read(*record)
        chosen = draw.sample(pool, number) if task.drawn else pool
        examples = [task.read(*one) for one in chosen[:shots]]
        yield Item(subject, task.prompt(subject, examples, question), shots, question)


def _records(files: Iterable[RecordFile]) -> Iterator[tuple[Record, str]]:
    """All records, each with its place in words."""
    for file in files:
        for number, record in enumerate(file.records(), start=1):
            yield record, f"{file.url}, record {number}"


def choose(
    scorer: Scorer, tokenizer: Tokenizer, items: Sequence[Item], progress: Progress = lambda _: None
) -> list[Sample]:
    """Take the likeliest choice of each question, by itself (`acc`) and a character (`acc_norm`).

    progress: hears how many choices are done.
    """
    requests = [
        request_of(tokenizer, item.prompt, f" {choice}") for item in items for choice in item.question.choices
    ]
    scores = iter(scorer.score(requests, progress))
    return [_chosen(item, list(islice(scores, len(item.question.choices)))) for item in items]


def _chosen(item: Item, found: list[Likelihood]) -> Sample:
    logprobs = [one.logprob for one in found]
    by_length = [one / max(1, len(text)) for one, text in zip(logprobs, item.question.choices, strict=True)]
    best, best_by_length = (values.index(max(values)) for values in (logprobs, by_length))
    right = item.question.right
    scores = {"acc": float(best in right), "acc_norm": float(best_by_length in right)}
    return Sample(item, scores, {"choices": item.question.choices, "logprobs": logprobs, "right": right})


def summary(task: Task, samples: Sequence[Sample]) -> Result:
    """Means over all questions, and over those of each subject where there are several."""
    by_subject: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_subject[sample.item.subject].append(sample)
    subjects = (
        {subject: _means(found) for subject, found in by_subject.items()} if len(by_subject) > 1 else {}
    )
    metrics = _means(samples)
    for name in list(metrics):
        spread = sum((sample.scores[name] - metrics[name]) ** 2 for sample in samples)
        metrics[name + _STDERR] = math.sqrt(spread / max(1, len(samples) - 1) / len(samples))
    return Result(task.name, samples[0].item.shots, len(samples), metrics, subjects)


def _means(samples: Sequence[Sample]) -> dict[str, float]:
    return {name: math.fsum(s.scores[name] for s in samples) / len(samples) for name in samples[0].scores}
