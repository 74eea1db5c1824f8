"""Compare loss curves of the same training: how far apart they are, against how far apart two references are.

    python benchmarks/loss_curve/compare.py OURS.csv REFERENCE.csv OTHER_REFERENCE.csv PICTURE.png

The two references differ only in where they round to bf16: what they differ by is the noise that any
other implementation may differ by too.  Exit code 1 where ours differs by more than twice
that, beyond the rounding of the log.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from matplotlib import pyplot
from numpy.typing import NDArray

PRINTED = 5e-5  # the log rounds losses to four places
WINDOW = 50  # steps of a moving mean
SETTLED = 0.2  # share of the steps after which curves are compared: before, the loss falls too fast


def read(file: Path) -> tuple[dict[int, float], dict[int, float]]:
    """(loss by step, validation loss by step)."""
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    losses = {int(row["step"]): float(row["loss"]) for row in rows}
    return losses, {int(r["step"]): float(r["validation_loss"]) for r in rows if r["validation_loss"]}


def gaps(one: dict[int, float], other: dict[int, float]) -> NDArray[np.float64]:
    """Differences at the steps that both have, once the loss has settled."""
    steps = [step for step in sorted(one.keys() & other.keys()) if step > SETTLED * max(one)]
    return np.array([one[step] - other[step] for step in steps])


def draw(ours: dict[int, float], first: dict[int, float], second: dict[int, float], picture: Path) -> None:
    """The three curves at the steps that all have, and below them how far two are from the first reference."""
    steps = sorted(ours.keys() & first.keys() & second.keys())
    width = max(1, WINDOW * len(steps) // max(steps))

    def smooth(losses: dict[int, float]) -> NDArray[np.float64]:
        return np.convolve([losses[step] for step in steps], np.ones(width) / width, mode="valid")

    figure, (curves, differences) = pyplot.subplots(
        2, figsize=(8, 7), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    labels = {
        "Hugging Face's Llama, plain PyTorch, fp32 weights under autocast": first,
        "the same, bf16 weights with a master copy": second,
        "internlm run, killed twice": ours,
    }
    for label, losses in labels.items():
        curves.plot(steps[width - 1 :], smooth(losses), label=label, linewidth=1)
        differences.plot(steps[width - 1 :], smooth(losses) - smooth(first), linewidth=1)
    curves.set(ylabel=f"training loss (nats a token),\nmean of {WINDOW} steps", yscale="log")
    curves.legend()
    differences.set(xlabel="step", ylabel="difference from the first")
    for axes in (curves, differences):
        axes.grid(visible=True, which="both", alpha=0.3)
    figure.savefig(picture, dpi=120)


def main() -> None:
    """Print the differences and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("ours", "reference", "other", "picture"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    (ours, ours_v), (first, first_v), (second, second_v) = (
        read(file) for file in (arguments.ours, arguments.reference, arguments.other)
    )
    mean, noise = np.abs(gaps(ours, first)).mean(), np.abs(gaps(first, second)).mean()
    print(f"mean |difference| of the loss: ours to reference {mean:.5f}, reference to reference {noise:.5f}")
    print(f"mean difference of the loss: ours to reference {gaps(ours, first).mean():+.5f}")
    last = max(ours_v.keys() & first_v.keys() & second_v.keys())
    print(
        f"validation loss at step {last}: ours {ours_v[last]:.4f}, references {first_v[last]:.4f}, {second_v[last]:.4f}"
    )

    draw(ours, first, second, arguments.picture)
    sys.exit(bool(mean > 2 * noise + PRINTED))


if __name__ == "__main__":
    main()
