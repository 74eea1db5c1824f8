"""Which checkpoints stay.  Pure."""

from __future__ import annotations

from collections.abc import Collection


def superseded(
    committed: Collection[int],
    unfinished: Collection[int],
    newest: int,
    keep: int,
    keep_every: int | None = None,
    refused: Collection[int] = (),
    verified: int | None = None,
) -> list[int]:
    """The steps to remove once step `newest` is committed, oldest first.

    Kept are the `keep` newest up to `newest`, and for ever the first one in each span of `keep_every` steps
    (saves may come late, so their steps need not be multiples of it; before step `keep_every` there is none).
    The `refused` ones, which did not verify, count for neither.  What is newer than `newest` is left alone
    unless it was refused: it may be a save that is under way.  `verified`, the newest one that is known to be whole,
    stays: all that came after it may have been damaged as it was written.
    """
    good = sorted((set(committed) - set(refused)) | {newest})
    kept = set([step for step in good if step <= newest][-keep:])
    if keep_every:
        firsts: dict[int, int] = {}
        for step in good:
            firsts.setdefault(step // keep_every, step)
        kept |= {step for span, step in firsts.items() if span}
    if verified is not None:
        kept.add(verified)
    whole = {step for step in committed if step not in kept and (step < newest or step in refused)}
    return sorted(whole | {step for step in unfinished if step < newest})
