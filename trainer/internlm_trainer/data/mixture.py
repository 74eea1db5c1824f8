"""Which source each row comes from.  Pure.

Every row is taken from the source that is furthest behind its share (the method of largest deficit), so the
mix is as even as whole rows allow at any moment, needs no randomness, and goes on from the counts alone.
"""

from __future__ import annotations

from collections.abc import Sequence


def next_sources(counts: Sequence[int], weights: Sequence[float], rows: int) -> list[int]:
    """The sources of the next `rows` rows, after `counts` [sources] rows of each were taken.

    With n rows taken in all, a source has fewer than n * share + 1 of them, always.  The first of equals
    wins.
    """
    if len(weights) == 1:
        return [0] * rows
    total = float(sum(weights))
    shares = [weight / total for weight in weights]
    taken = list(counts)
    done = sum(taken)
    chosen = []
    for number in range(done + 1, done + rows + 1):
        behind = [number * share - count for share, count in zip(shares, taken, strict=True)]
        source = behind.index(max(behind))
        taken[source] += 1
        chosen.append(source)
    return chosen
