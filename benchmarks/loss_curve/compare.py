"""Compare loss curves of the same training: how far apart they are, against how far apart two references are.

    python benchmarks/loss_curve/compare.py OURS.csv REFERENCE.csv OTHER_REFERENCE.csv PICTURE.png

The two references differ only in the attention's kernel, so in rounding: what they differ by is the noise that any
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

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for losses, label in (
        (ours, "internlm run, killed twice"),
        (first, "Hugging Face's Llama, plain PyTorch"),
        (second, "the same with the other attention"),
    ):
        steps = np.array(sorted(losses))
        values = np.array([losses[step] for step in steps])
        width = max(1, int(WINDOW / max(1, np.diff(steps).mean())))
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, label=label, linewidth=1)
    axes.set(xlabel="step", ylabel=f"training loss, mean of {WINDOW} steps (nats a token)", yscale="log")
    axes.legend()
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.savefig(arguments.picture, dpi=120, bbox_inches="tight")
    sys.exit(bool(mean > 2 * noise + PRINTED))


if __name__ == "__main__":
    main()
