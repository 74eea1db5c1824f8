"""`internlm eval`: how good a model is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from internlm_trainer.commands.common import DefaultGroup, bar, print_json, sentences, show, store_errors
from internlm_trainer.commands.opened import Source, context_of, of_newest, tokenizer_of
from internlm_trainer.errors import UserError

if TYPE_CHECKING:
    from internlm_trainer.data.tokenizer import Tokenizer
    from internlm_trainer.evaluation.likelihood import Scorer
    from internlm_trainer.evaluation.run import Result, Sample
    from internlm_trainer.weights.source import Weights

app = typer.Typer(
    cls=DefaultGroup,
    help="How good a model is: `internlm eval SOURCE --tasks mmlu --data DIR`, or --text FILE for perplexity.",
    no_args_is_help=True,
)


@app.command()
@sentences
def run(
    source: Source,
    tasks: Annotated[
        str, typer.Option(help="Names with commas between, such as mmlu,ceval,gsm8k.", show_default=False)
    ] = "",
    data: Annotated[
        str, typer.Option(help="Folder (path or URL) with one folder a task, its files as published.")
    ] = ".",
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Perplexity of text files (path, URL or pattern; txt, json, jsonl, parquet); may be repeated."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that each window of --text adds. Default: the context's length."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question. Default: the task's own.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many questions of each subject, or texts.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a written answer. Default: the task's own.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Answers that are written at once.")] = 8,
    run_code: Annotated[
        bool,
        typer.Option(
            "--run-code", help="Run the programs that the model writes, in a sandbox: for humaneval."
        ),
    ] = False,
    no_isolation: Annotated[
        bool,
        typer.Option(
            "--no-isolation", help="With --run-code: the programs may reach the network and other processes."
        ),
    ] = False,
    samples: Annotated[
        str | None, typer.Option(help="Write each question with its scores to this file (jsonl).")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="SentencePiece model. Default: the one the weights were trained with.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens that are read at most. Default: what it was trained with."),
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens read at once; fewer take less memory.")
    ] = 8192,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")] = False,
) -> None:
    """Evaluate a model on tasks and texts, from a checkpoint or a folder in Hugging Face's or InternLM's format.

    Prompts and metrics are those of lm-evaluation-harness. On a GPU in bf16 if there is one, else on the CPU in fp32.
    """
    from internlm_trainer.evaluation.run import Settings, evaluate, needs_code, prepare
    from internlm_trainer.sandbox import isolation
    from internlm_trainer.storage import user_errors, write_whole

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names and not text:
        raise UserError("--tasks or --text: give what to evaluate on")
    if unsafe := [name for name in names if needs_code(name) and not run_code]:
        raise UserError(
            f"--tasks {unsafe[0]}: runs programs that the model writes; give --run-code if that may be"
        )
    if not no_isolation and any(map(needs_code, names)):
        isolation()
    # Before the weights are read: mistakes in files are found at once.
    work = prepare(names, data, text or (), shots, limit)
    with store_errors():
        weights, (scorer, words) = of_newest(
            source, lambda weights: _open(weights, tokenizer, context, batch_tokens)
        )
    if stride and stride > scorer.context:
        raise UserError(f"--stride {stride}: a window has {scorer.context} tokens; give no more than that")
    settings = Settings(stride, rows, max_tokens, not no_isolation)
    results, lines = [], list[str]()
    for result, found in evaluate(scorer, words, work, settings, bar):
        results.append(result)
        lines += [_line(result.task, sample) for sample in found]
    if samples:
        with user_errors(samples, "--samples"), write_whole(samples) as file:
            file.write("".join(lines).encode())
    if as_json:
        print_json({"source": weights.url, "results": [result._asdict() for result in results]})
    else:
        _print(weights.url, results)


@app.command()
@sentences
def opencompass(
    model: Annotated[
        Path, typer.Argument(help="Folder that internlm export --format hf wrote.", show_default=False)
    ],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that hold the model together.")] = 1,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="It was trained on chats: ask it through the tokenizer's chat template."),
    ] = False,
) -> None:
    """Print an exported model's configuration for OpenCompass: internlm eval opencompass out > models.py."""
    from internlm_trainer.evaluation.opencompass import configuration

    try:
        config = json.loads((model / "config.json").read_bytes())
        dtype, context = str(config["torch_dtype"]), int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"MODEL: {model} is no folder of an exported model ({error}); write one with internlm export"
        ) from error
    path = model.resolve()
    typer.echo(configuration(str(path), path.name, dtype, context, gpus, chat), nl=False)


@app.command()
@sentences
def plot(
    checkpoints: Annotated[
        str, typer.Argument(help="A job's checkpoint.path (path or URL).", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="Draw to this file (png, svg, pdf) instead of the terminal.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, for programs.")] = False,
) -> None:
    """Show what evaluations of a job's checkpoints found, step by step (spec.evaluation)."""
    from internlm_trainer.evaluation import history

    entries = history.read(checkpoints)
    if not entries:
        raise UserError(f"{checkpoints}: holds no {history.FILE}; a job with spec.evaluation writes it")
    courses = history.courses(entries)
    if as_json:
        print_json(entries)
    elif out:
        _draw(courses, out)
        typer.echo(
            f"{out}: {len(courses)} metrics of {len({entry['step'] for entry in entries})} checkpoints"
        )
    else:
        table = Table("task", "metric", "steps", "first", "last", "course", box=None, header_style="bold")
        for name, points in courses.items():
            task, _, metric = name.partition(" ")
            steps, values = zip(*points, strict=True)
            span = f"{steps[0]:,} to {steps[-1]:,}" if len(steps) > 1 else f"{steps[0]:,}"
            table.add_row(task, metric, span, f"{values[0]:.4f}", f"{values[-1]:.4f}", sparkline(values))
        show(table)


_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, from the least to the greatest."""
    least, greatest = min(values), max(values)
    scale = (len(_BARS) - 1) / ((greatest - least) or 1)
    return "".join(_BARS[round((value - least) * scale)] for value in values)


def _draw(courses: dict[str, list[tuple[int, float]]], out: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "--out: drawing needs matplotlib; pip install matplotlib, or leave --out away"
        ) from None
    figure = Figure(figsize=(8, 2.2 * len(courses)), layout="constrained")
    panes = figure.subplots(len(courses), 1, sharex=True, squeeze=False)[:, 0]
    for pane, (name, points) in zip(panes, courses.items(), strict=True):
        pane.plot(*zip(*points, strict=True), marker="o", markersize=3)
        pane.set_ylabel(name)
        pane.grid(alpha=0.3)
    panes[-1].set_xlabel("step")
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise UserError(f"--out: {out} cannot be written: {error}") from error


def _open(
    weights: Weights, asked: str | None, context: int | None, batch_tokens: int
) -> tuple[Scorer, Tokenizer]:
    from internlm_trainer.evaluation.likelihood import Scorer
    from internlm_trainer.weights.load import load_model

    words, tokens = tokenizer_of(weights, asked), context_of(weights, context)
    if words is None:
        raise UserError("--tokenizer none: an evaluation needs one")
    return Scorer(load_model(weights), tokens, batch_tokens), words


def _line(task: str, sample: Sample) -> str:
    item = sample.item
    content = {"task": task, "subject": item.subject, "prompt": item.prompt, **sample.details}
    return json.dumps(content | {"scores": sample.scores}, ensure_ascii=False) + "\n"


def _print(source: str, results: list[Result]) -> None:
    from internlm_trainer.evaluation.run import found_in

    table = Table("task", "questions", "shots", "metric", "value", "± stderr", box=None, header_style="bold")
    for result in results:
        first = [result.task, f"{result.questions:,}", str(result.shots)]
        for name, value in found_in(result.metrics).items():
            error = result.metrics.get(f"{name}_stderr")
            table.add_row(*first, name, f"{value:.4f}", "" if error is None else f"{error:.4f}")
            first = ["", "", ""]
    typer.echo(source)
    show(table)
