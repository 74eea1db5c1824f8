"""Trains one small job in many layouts and compares each with one process: the table of docs/numerics.md.

    python tests/trainer/parallel/matrix.py            run all rows and write the table into docs/numerics.md
    python tests/trainer/parallel/matrix.py FOLDER     run all rows, and leave what each gave in FOLDER
    python tests/trainer/parallel/matrix.py FOLDER nccl   the same with the rows for two ranks on GPUs

Every row is the trainer's own loop, on real processes: the data, the checkpoints and the resumes are those of any
job.  The processes are forks of this one, so that PyTorch is imported once.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from internlm_operator.manifest import parse_job, parse_spec
from internlm_trainer import train
from internlm_trainer.callbacks.base import Callback, StepResult
from internlm_trainer.data.prepare import prepare
from internlm_trainer.processes import Processes
from ports import free_port
from trainer.loop.jobs import Corpus, TinyJob

PAGE = Path(__file__).parents[3] / "docs" / "numerics.md"
BEGIN, END = "<!-- table of layouts, written by tests/trainer/parallel/matrix.py -->", "<!-- end of table -->"
STEPS, SAVED, ROWS_A_STEP, TOKENS = 4, 2, 16, 32


class Layout(NamedTuple):
    """Processes, degrees, and what else of `parallel.zero` is not the default."""

    processes: int
    degrees: tuple[int, int, int]
    accumulation: str = "shards"
    reduce: str = "fp32"
    offload: str = "none"
    node: int = 0
    """Ranks of a pretended node; 0: all are on one."""

    def __str__(self) -> str:
        special = [f"nodes of {self.node}"] * bool(self.node)
        special += [f"{self.accumulation} accumulation"] * (self.accumulation != "shards")
        special += [f"{self.reduce} reduction"] * (self.reduce != "fp32")
        special += ["offload"] * (self.offload != "none")
        return ", ".join([f"{self.processes}: {self.degrees}", *special])


class Difference(NamedTuple):
    """Of a row from one process, relative: the largest of a loss and of a norm, and that of all weights."""

    loss: float
    norm: float
    weights: float


class Row(NamedTuple):
    """One line of the table."""

    layout: Layout
    precision: str = "fp32"
    before: Layout | None = None
    """The layout of the first half of the steps; then it is saved, and resumed in `layout`."""
    compiled: bool = False
    """Whether the blocks are compiled."""

    @property
    def bounds(self) -> Difference:
        """How far it may be from one process."""
        lossy = "bf16" in (self.precision, self.layout.reduce)
        return Difference(1e-4, 1e-2, 1e-2) if lossy else Difference(1e-6, 1e-5, 1e-6)

    @property
    def cells(self) -> list[str]:
        """What the table says of the row before the numbers."""
        bounds = ", ".join(f"{bound:.0e}" for bound in self.bounds)
        return [str(self.layout), str(self.before or ""), self.precision, bounds]

    @property
    def twins(self) -> list[Row]:
        """Rows that it must equal to the bit: without a stop, if it goes on as it began, and without offload."""
        plain = self._replace(layout=self.layout._replace(offload="none"))
        uninterrupted = self._replace(before=None)
        return [plain] * (plain != self and not self.before) + [uninterrupted] * (self.before == self.layout)


ONE = Layout(1, (1, 1, 1))
FOUR = [Layout(4, degrees) for degrees in (
    (1, 1, 1), (1, 1, 2), (1, 1, 4), (1, 2, 2), (1, 2, 4), (1, 4, 4), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4),
)]  # fmt: skip
EIGHT = [Layout(8, degrees) for degrees in (
    (1, 1, 8), (1, 2, 8), (1, 4, 4), (2, 2, 4), (2, 2, 8), (2, 4, 8), (8, 8, 8),
)]  # fmt: skip
SPECIAL = [
    Layout(1, (1, 1, 1), offload="optimizer"),
    Layout(4, (1, 1, 4), node=2),
    Layout(4, (1, 2, 4), accumulation="full"),
    Layout(4, (1, 2, 4), offload="optimizer"),
    Layout(4, (4, 4, 4), node=2, accumulation="full"),
    Layout(4, (4, 4, 4), node=2, accumulation="full", offload="optimizer"),
    Layout(4, (1, 1, 1), reduce="bf16"),
    Layout(4, (1, 2, 4), reduce="bf16"),
    Layout(8, (1, 1, 8), node=4, reduce="bf16"),
    Layout(8, (2, 8, 8), node=4),
    Layout(8, (1, 4, 8), node=2, accumulation="full"),
]
RESUMED = [
    Row(Layout(4, (1, 2, 4)), before=Layout(4, (1, 2, 4))),
    Row(Layout(4, (1, 2, 4)), "bf16", Layout(4, (1, 2, 4))),
    Row(Layout(4, (1, 2, 4), offload="optimizer"), before=Layout(4, (1, 2, 4), offload="optimizer")),
    Row(Layout(8, (2, 4, 8)), before=Layout(8, (2, 4, 8))),
    Row(Layout(4, (1, 2, 4)), before=Layout(8, (8, 8, 8))),
    Row(Layout(1, (1, 1, 1)), "bf16", Layout(8, (1, 1, 8), node=4)),
    Row(Layout(8, (2, 2, 8), node=4), before=Layout(4, (1, 2, 4), offload="optimizer")),
    Row(Layout(4, (1, 1, 2), accumulation="full"), "bf16", Layout(4, (4, 4, 4))),
    Row(Layout(4, (1, 1, 4), node=2), before=Layout(4, (1, 1, 4))),
    Row(Layout(4, (1, 4, 4), offload="optimizer"), before=Layout(1, (1, 1, 1))),
]
NCCL = [
    Row(Layout(processes, degrees, offload=offload), precision, compiled=compiled)
    for precision, compiled in (("fp32", False), ("bf16", False), ("bf16", True))
    for processes, degrees, offload in (
        (1, (1, 1, 1), "none"),
        (1, (1, 1, 1), "optimizer"),
        (2, (1, 1, 1), "none"),
        (2, (1, 1, 2), "none"),
        (2, (1, 2, 2), "none"),
        (2, (2, 2, 2), "none"),
        (2, (2, 2, 2), "optimizer"),
    )
]
"""For two GPUs.  On a machine with one, each rank is a node of its own: NCCL then lets them share the GPU."""
ROWS = [
    *(Row(layout) for layout in (ONE, *FOUR, *EIGHT, *SPECIAL)),
    *(Row(layout, "bf16") for layout in (ONE, *FOUR[::2], FOUR[-1], EIGHT[0], EIGHT[-1])),
    *RESUMED,
]


class Recorder(Callback):
    """Keeps each step's loss and gradient norm, and the fp32 weights after the last one."""

    found: dict[str, Any]

    def __init__(self, trainer: train.Trainer) -> None:
        super().__init__(trainer)
        Recorder.found = {"losses": [], "norms": []}

    def after_step(self, result: StepResult) -> None:
        loss = torch.stack(list(result.row_losses)).double().sum()
        dist.all_reduce(loss)
        self.found["losses"].append(float(loss))
        self.found["norms"].append(float(result.grad_norm))

    def finish(self) -> None:
        trainer = self.trainer
        own = [
            (piece.parameter, *piece.span, piece.values.cpu().clone())
            for piece in trainer.optimizer.pieces()
            if piece.kind == "master"
        ]
        weights = {
            name: torch.full(shape, torch.nan).flatten() for name, shape in trainer.zero.shapes().items()
        }
        for pieces in trainer.world.gather(own):
            for name, start, stop, values in pieces:
                weights[name][start:stop] = values
        self.found["weights"] = weights


def manifest(
    corpus: Corpus, folder: Path, layout: Layout, precision: str, steps: int, compiled: bool
) -> dict[str, Any]:
    """The job's description.  Its rate is constant, so that a run of half the steps is half of the run."""
    job = TinyJob(corpus, folder, layout.processes, layout.degrees, "matrix")
    job.model = {"seqLen": TOKENS}
    job.data = {"validation": []}
    job.training = {
        "steps": steps,
        "globalBatchTokens": ROWS_A_STEP * TOKENS,
        "microBatchSize": 1,
        "precision": precision,
        "schedule": {"name": "constant", "warmupSteps": 2},
    }
    job.parallel = {"compile": "blocks" if compiled else "none"}
    described = job.manifest()
    described["spec"]["parallel"]["zero"] |= {
        "accumulation": layout.accumulation,
        "reducePrecision": layout.reduce,
        "offload": layout.offload,
    }
    return described


class Run(NamedTuple):
    """A row's training, or the first half of it."""

    folder: Path
    layout: Layout
    precision: str
    steps: int
    compiled: bool


def run(one: Run, corpus: Corpus) -> None:
    """Train in processes of their own; leaves `result.pt` in the folder.  Raises RuntimeError if one fails."""
    port = free_port()
    children = {_fork(rank, port, one, corpus) for rank in range(one.layout.processes)}
    failed = 0
    while children:
        child, status = os.wait()
        children.discard(child)
        if status and not failed:  # the others would wait for it
            failed = status
            for other in children:
                os.kill(other, signal.SIGKILL)
    if failed:
        raise RuntimeError(f"failed: {one}")


def _fork(rank: int, port: int, one: Run, corpus: Corpus) -> int:
    if child := os.fork():
        return child
    code, size = 1, one.layout.processes
    node = one.layout.node or size
    if torch.cuda.device_count() == 1:
        node = 1
    try:
        place = {"RANK": rank, "LOCAL_RANK": rank % node, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
        place |= {"LOCAL_WORLD_SIZE": node, "MASTER_PORT": port, "NCCL_HOSTID": f"node-{rank // node}"}
        os.environ |= {name: str(value) for name, value in place.items()}
        world = Processes()
        described = manifest(corpus, one.folder, one.layout, one.precision, one.steps, one.compiled)
        train.train("matrix", parse_spec(described["spec"], size), world, 1)
        if rank == 0:
            torch.save(Recorder.found, one.folder / "result.pt")
        world.close()
        code = 0
    except BaseException:
        logging.exception("rank %d of %s", rank, one)
    finally:
        os._exit(code)


def run_rows(folder: Path, rows: Sequence[Row] = ROWS) -> None:
    """Run the rows, each in the folder of its number below `folder`."""
    # How PyTorch looks for GPUs by default leaves a state behind that forks cannot use.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    train.CALLBACKS = (*train.CALLBACKS, Recorder)
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # which an optimizer imports, here once for all forks
    corpus = _corpus(folder)
    gc.freeze()
    for number, row in enumerate(rows):
        at = folder / str(number)
        if row.before:
            run(Run(at, row.before, row.precision, SAVED, row.compiled), corpus)
        run(Run(at, row.layout, row.precision, STEPS, row.compiled), corpus)


def _corpus(folder: Path) -> Corpus:
    corpus = Corpus(folder / "tokenizer.model", folder / "train", folder / "validation")
    shutil.copy(Path(shutil.__file__), folder)
    job = TinyJob(corpus, folder)
    job.data = {"prepare": {"text": [f"{folder}/*.py"], "sample": "line", "validationPercent": 4}}
    prepare(parse_job(job.manifest()).spec)
    return corpus


def read(folder: Path, number: int) -> dict[str, Any]:
    """What a row gave: the losses and norms of the steps since it was resumed, and the last weights."""
    found: dict[str, Any] = torch.load(folder / str(number) / "result.pt", weights_only=True)
    return found


def difference(folder: Path, number: int, rows: Sequence[Row] = ROWS) -> Difference:
    reference = rows.index(Row(ONE, rows[number].precision, compiled=rows[number].compiled))
    return apart(read(folder, number), read(folder, reference))


def apart(ours: dict[str, Any], reference: dict[str, Any]) -> Difference:
    """`ours` may have only the last steps of the reference."""

    def largest(kind: str) -> float:
        pairs = zip(ours[kind], reference[kind][-len(ours[kind]) :], strict=True)
        return max(abs(one / other - 1) for one, other in pairs)

    weights, others = _joined(ours["weights"]), _joined(reference["weights"])
    return Difference(largest("losses"), largest("norms"), float((weights - others).norm() / others.norm()))


def _joined(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([weights[name] for name in sorted(weights)])


def write_table(folder: Path) -> None:
    """Put the table into the page, between its marks."""
    lines = [
        "| processes: (p, g, o) | saved half-way in | precision | bounds | loss | gradient norm | weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, row in enumerate(ROWS):
        numbers = ["0" if value == 0 else f"{value:.1e}" for value in difference(folder, number)]
        lines.append(f"| {' | '.join(row.cells + numbers)} |")
    page = PAGE.read_text()
    table = "\n".join((BEGIN, "", *lines, "", END))
    PAGE.write_text(re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: table, page, flags=re.S))


def main() -> None:
    if len(sys.argv) > 1:
        run_rows(Path(sys.argv[1]), NCCL if "nccl" in sys.argv else ROWS)
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        run_rows(Path(folder))
        write_table(Path(folder))


if __name__ == "__main__":
    main()
