"""The `internlm` command: its subcommands, put together."""

from __future__ import annotations

import typer

from internlm_trainer.commands import bench, chat, checkpoint, convert, data, evaluate, job, plan, weights

app = typer.Typer(
    help="Train InternLM-family language models: the same job.yaml runs here and on Kubernetes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    job.validate,
    job.run,
    job.env,
    plan.plan,
    bench.bench,
    data.tokenize,
    convert.convert_config,
    weights.export,
    chat.chat,
    chat.serve,
    chat.demo,
    weights.models,
):
    app.command()(command)
app.command("import")(weights.import_)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(data.app, name="data")
app.add_typer(evaluate.app, name="eval")


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="internlm")


if __name__ == "__main__":
    main()
