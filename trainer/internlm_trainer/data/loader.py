"""The stream of rows that a job trains on: one global order, of which each rank reads its own part.

The order is a function of the data, the seed and the weights alone, whatever the number of ranks.  Where
a job is in it is a count of rows for each source; so a job that resumes with the counts of its
checkpoint sees exactly the rows that it would have seen without the interruption.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np

from internlm_trainer.config import CacheSpec, SourceSpec
from internlm_trainer.data.bin_format import Ids, open_cache
from internlm_trainer.data.mixture import next_sources
from internlm_trainer.data.packing import Packing, Part, Row, pack
from internlm_trainer.data.source import Place, Source, open_source
from internlm_trainer.errors import UserError

_STATE_VERSION = 1
# Rows of one step, and of neighbouring ones, share long samples.
_CACHED_TOKENS = 4 << 20
# Steps that are prepared ahead: several, since a store answers late, but no more than a little memory holds.
_AHEAD_STEPS, _AHEAD_TOKENS = 8, 1 << 20


_Key = tuple[int, int, int]
"""A sample: source, file, number in the file."""


_Cut = tuple[int, int, list[int], list[Part]]
"""What a row consists of: source, file, numbers of its samples in the file, and the part of each."""


class _Plan(NamedTuple):
    """One step: the rows to read, and how many of each source are taken after it."""

    cuts: list[_Cut]
    after: tuple[int, ...]


class _Prepared(NamedTuple):
    """A step in the making: what was asked for, and what will come of it."""

    rows: int
    take: tuple[int, ...]
    plan: Future[_Plan]
    result: Future[list[Row]]


class RowLoader:
    """Rows of one or several sources, mixed by their weights, for ever: a source that ends starts again,
    shuffled anew.

    The next steps are prepared in the background while the trainer computes: one thread finds out which samples they
    need, so that stores are asked early, another one reads and packs them.  Threads, not processes: the work is some
    dozen calls a row into NumPy and the system, and a rank that trains takes few rows a second.  `state_dict`
    describes what was taken from `next_step`, not what was prepared.
    """

    def __init__(
        self,
        sources: Sequence[SourceSpec],
        *,
        row_tokens: int,
        seq_len: int,
        packing: Packing,
        seed: int,
        vocab_size: int,
        min_length: int = 0,
        cache: CacheSpec | None = None,
        field: str = "data.train",
    ) -> None:
        """Opens the sources and reads their metas.

        `row_tokens`: tokens of a row.  `seq_len`: longest sequence in it.  `min_length`: shorter samples are left
        out.  `field`: the sources' name in errors.  Raises UserError if a source is missing, empty, broken, or
        shorter than a row.
        """
        self._specs = list(sources)
        self._row_tokens, self._seq_len, self._packing = row_tokens, seq_len, packing
        self._seed, self._vocab_size, self._min_length = seed, vocab_size, min_length
        self._cache = open_cache(cache)
        self.sources = [
            open_source(spec.path, row_tokens, seed, f"{field}[{index}].path", min_length, self._cache)
            for index, spec in enumerate(self._specs)
        ]
        self._taken: tuple[int, ...] = (0,) * len(self.sources)
        self._skipped: tuple[int, ...] = (0,) * len(self.sources)
        self._samples = _SampleCache(_CACHED_TOKENS)
        self._planner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="plan")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        self._prepared: deque[_Prepared] = deque()

    def next_step(self, rows: int, take: Sequence[int]) -> list[Row]:
        """Advance the global order by `rows` rows and return those at the offsets `take` in [0, rows).

        All ranks call this with the same `rows` and each with its own `take`.
        """
        if not all(0 <= offset < rows for offset in take):
            raise ValueError(f"take {list(take)} must be offsets of the {rows} rows of a step")
        asked = rows, tuple(take)
        if not self._prepared or self._prepared[0][:2] != asked:
            self._drop_prepared()
            self._prepare(*asked)
        step = self._prepared.popleft()
        ahead = min(_AHEAD_STEPS, max(1, _AHEAD_TOKENS // (max(len(take), 1) * self._row_tokens)))
        while len(self._prepared) < ahead:
            self._prepare(*asked, after=self._prepared[-1] if self._prepared else step)
        taken_rows = step.result.result()
        self._taken = step.plan.result().after
        return taken_rows

    def skip(self, rows: int) -> None:
        """Advance the global order by `rows` rows that nobody trains on; the ledger counts them apart."""
        self._drop_prepared()
        after = self._plan(self._taken, rows, ()).after
        self._skipped = tuple(
            old + new - before for old, new, before in zip(self._skipped, after, self._taken, strict=True)
        )
        self._taken = after

    def _prepare(self, rows: int, take: tuple[int, ...], after: _Prepared | None = None) -> None:
        """Begin with the step that follows `after`, or the one at hand."""
        taken = self._taken

        def plan() -> _Plan:
            made = self._plan(after.plan.result().after if after else taken, rows, take)
            for number, source in enumerate(self.sources):
                source.prefetch(_samples_of(made.cuts, number))
            return made

        planned = self._planner.submit(plan)
        result = self._reader.submit(lambda: self._read(planned.result().cuts))
        self._prepared.append(_Prepared(rows, take, planned, result))

    def state_dict(self) -> dict[str, Any]:
        """Where the job is in the data, as plain JSON: the token ledger.

        Of each source the rows taken, in all epochs and with those that were skipped, and what identifies them.
        """
        return {
            "version": _STATE_VERSION,
            "seed": self._seed,
            "rowTokens": self._row_tokens,
            "minLength": self._min_length,
            "sources": [
                {
                    "path": spec.path,
                    "weight": spec.weight,
                    "fingerprint": source.fingerprint,
                    "rows": rows,
                    "skippedRows": skipped,
                    "rowsOfEpoch": source.rows,
                }
                for spec, source, rows, skipped in zip(
                    self._specs, self.sources, self._taken, self._skipped, strict=True
                )
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, on any number of ranks.

        Raises UserError if the data, the seed, the weights or the rows are not those of the state.
        """
        if state.get("version") != _STATE_VERSION:
            raise UserError(
                f"the checkpoint's data state has version {state.get('version')}, not {_STATE_VERSION}; "
                "resume it with the version of this software that wrote it"
            )
        _check_same("training.seed", state["seed"], self._seed)
        _check_same(
            "tokens of a row (training.microBatchSize x model.seqLen, or training.microBatchTokens)",
            state["rowTokens"],
            self._row_tokens,
        )
        _check_same("data.minLength", state.get("minLength", 0), self._min_length)
        saved = state["sources"]
        _check_same("number of data.train sources", len(saved), len(self.sources))
        for index, (old, spec, source) in enumerate(zip(saved, self._specs, self.sources, strict=True)):
            _check_same(f"data.train[{index}].weight", old["weight"], spec.weight)
            if old["fingerprint"] != source.fingerprint:
                raise UserError(
                    f"data.train[{index}].path: the data in {spec.path} is not what the checkpoint was "
                    f"trained on ({old['path']}); put that data back, or start anew with another "
                    "checkpoint.path"
                )
        self._drop_prepared()
        self._taken = tuple(int(old["rows"]) for old in saved)
        self._skipped = tuple(int(old.get("skippedRows", 0)) for old in saved)

    def epochs(self) -> list[float]:
        """How often each source has been seen so far, as a fraction of its rows."""
        return [taken / source.rows for taken, source in zip(self._taken, self.sources, strict=True)]

    def close(self) -> None:
        """End the background threads."""
        for source in self.sources:
            source.stop()
        self._drop_prepared()
        for worker in (self._planner, self._reader):
            worker.shutdown(wait=True, cancel_futures=True)
        for source in self.sources:
            source.close()
        self._cache.memory.close()

    def _drop_prepared(self) -> None:
        """Forget the prepared steps; waits for them, since their threads and this one share files and caches."""
        dropped = list(self._prepared)
        self._prepared.clear()
        futures: list[Future[Any]] = [f for step in dropped for f in (step.result, step.plan)]
        for future in futures:
            future.cancel()
        wait(futures)
        for step in dropped:
            if not step.plan.cancelled() and not step.plan.exception():
                self._forget(step.plan.result().cuts)

    def _plan(self, taken: tuple[int, ...], rows: int, take: Sequence[int]) -> _Plan:
        """The step of `rows` rows that comes when `taken` rows of each source are."""
        order = next_sources(taken, [spec.weight for spec in self._specs], rows)
        return _Plan(self._cuts(_places(self.sources, taken, order, take)), _advance(taken, order))

    def _cuts(self, places: Iterable[tuple[int, Place]]) -> list[_Cut]:
        return [(number, place.file, *self.sources[number].cut(place)) for number, place in places]

    def read(self, places: Sequence[tuple[int, Place]]) -> list[Row]:
        """The rows at `places`, each with its source's number."""
        return self._read(self._cuts(places))

    def _read(self, cuts: Sequence[_Cut]) -> list[Row]:
        wanted = dict.fromkeys((number, file, s) for number, file, samples, _ in cuts for s in samples)
        found = self._samples.get_many(wanted, self._read_samples)
        self._forget(cuts)  # samples that were here already had been asked for all the same
        return [
            pack([found[number, file, s] for s in samples], parts, self._seq_len, self._packing, number)
            for number, file, samples, parts in cuts
        ]

    def _forget(self, cuts: Sequence[_Cut]) -> None:
        """Keep no more room for what was fetched ahead for these."""
        for number, source in enumerate(self.sources):
            source.forget(_samples_of(cuts, number))

    def _read_samples(self, keys: list[_Key]) -> list[Ids]:
        """The samples (source, file, number in the file), each source's with one read."""
        samples: dict[_Key, Ids] = {}
        for number, source in enumerate(self.sources):
            mine = [key for key in keys if key[0] == number]
            ids = source.read([(file, sample) for _, file, sample in mine], self._vocab_size)
            samples.update(zip(mine, ids, strict=True))
        return [samples[key] for key in keys]


def validation_rows(
    sources: Sequence[SourceSpec],
    *,
    row_tokens: int,
    seq_len: int,
    packing: Packing,
    seed: int,
    vocab_size: int,
    count: int,
    cache: CacheSpec | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> list[Row]:
    """Every `world_size`-th, from `rank` on, of the first `count` rows of the held-out sources, none of them
    twice: fewer where there are fewer.  Always the same rows."""
    loader = RowLoader(
        sources,
        row_tokens=row_tokens,
        seq_len=seq_len,
        packing=packing,
        seed=seed,
        vocab_size=vocab_size,
        cache=cache,
        field="data.validation",
    )
    try:
        taken = [0] * len(loader.sources)
        order: list[int] = []
        while len(order) < count:
            left = [s for s, source in enumerate(loader.sources) if taken[s] < source.rows]
            if not left:
                break
            (chosen,) = next_sources([taken[s] for s in left], [sources[s].weight for s in left], 1)
            taken[left[chosen]] += 1
            order.append(left[chosen])
        mine = range(rank, len(order), world_size)
        return loader.read(list(_places(loader.sources, (0,) * len(sources), order, mine)))
    finally:
        loader.close()


def _samples_of(cuts: Iterable[_Cut], source: int) -> list[tuple[int, int]]:
    """The samples (file, number in the file) of a source that the cuts need."""
    return [(file, sample) for of, file, samples, _ in cuts if of == source for sample in samples]


def _places(
    sources: Sequence[Source], taken: Sequence[int], order: Sequence[int], take: Iterable[int]
) -> Iterator[tuple[int, Place]]:
    """Where the rows at the offsets `take` of `order` are, if `taken` rows of each source came before."""
    numbers, counted = list(taken), []
    for source in order:
        counted.append(numbers[source])
        numbers[source] += 1
    for offset in take:
        yield order[offset], sources[order[offset]].place(counted[offset])


def _advance(taken: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    added = np.bincount(order, minlength=len(taken)) if order else np.zeros(len(taken), dtype=np.int64)
    return tuple(count + int(more) for count, more in zip(taken, added, strict=True))


def _check_same(what: str, old: object, new: object) -> None:
    if old != new:
        raise UserError(
            f"{what} was {old} when the checkpoint was written and is {new} now, which would change the "
            "order of the data; set it back, or start anew with another checkpoint.path"
        )


class _SampleCache:
    """The samples that were used last, up to a number of tokens."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._tokens = 0
        self._samples: OrderedDict[_Key, Ids] = OrderedDict()

    def get_many(self, keys: Mapping[_Key, None], read: Any) -> dict[_Key, Ids]:
        """The samples of `keys`; those that are not here come from `read`, all at once."""
        missing = [key for key in keys if key not in self._samples]
        for key, ids in zip(missing, read(missing) if missing else [], strict=True):
            self._samples[key] = ids
            self._tokens += len(ids)
        found = {}
        for key in keys:
            self._samples.move_to_end(key)
            found[key] = self._samples[key]
        while self._tokens > self._max_tokens and len(self._samples) > 1:
            self._tokens -= len(self._samples.popitem(last=False)[1])
        return found
