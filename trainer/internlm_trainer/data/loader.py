"""The stream of rows that a job trains on: one global order, of which each rank reads its own part.

The order is a function of the data, the seed and the weights alone, whatever the number of ranks.  Where
a job is in it is a count of rows for each source; so a job that resumes with the counts of its
checkpoint sees exactly the rows that it would have seen without the interruption.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from internlm_trainer.config import SourceSpec
from internlm_trainer.data.bin_format import Ids
from internlm_trainer.data.mixture import next_sources
from internlm_trainer.data.packing import Packing, Row, pack
from internlm_trainer.data.source import Place, Source, open_source
from internlm_trainer.errors import UserError

_STATE_VERSION = 1
# Rows of one step, and of neighbouring ones, share long samples.
_CACHED_TOKENS = 4 << 20


_Key = tuple[int, int, int]
"""A sample: source, file, number in the file."""


class _Request(NamedTuple):
    """What the rows of a step depend on."""

    taken: tuple[int, ...]
    rows: int
    take: tuple[int, ...]


class RowLoader:
    """Rows of one or several sources, mixed by their weights, for ever: a source that ends starts again,
    shuffled anew.

    The next step is prepared in the background while the trainer computes; `state_dict` describes what
    was taken from `next_step`, not what was prepared.
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
        field: str = "data.train",
    ) -> None:
        """Opens the sources and reads their metas.

        `row_tokens`: tokens of a row.  `seq_len`: longest sequence in it.  `field`: the sources' name in
        errors. Raises UserError if a source is missing, empty, broken, or shorter than a row.
        """
        self._specs = list(sources)
        self._row_tokens, self._seq_len, self._packing = row_tokens, seq_len, packing
        self._seed, self._vocab_size = seed, vocab_size
        self.sources = [
            open_source(spec.path, row_tokens, seed, f"{field}[{index}].path")
            for index, spec in enumerate(self._specs)
        ]
        self._taken: tuple[int, ...] = (0,) * len(self.sources)
        self._samples = _SampleCache(_CACHED_TOKENS)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows")
        self._prepared: tuple[_Request, Future[list[Row]]] | None = None

    def next_step(self, rows: int, take: Sequence[int]) -> list[Row]:
        """Advance the global order by `rows` rows and return those at the offsets `take` in [0, rows).

        All ranks call this with the same `rows` and each with its own `take`.
        """
        if not all(0 <= offset < rows for offset in take):
            raise ValueError(f"take {list(take)} must be offsets of the {rows} rows of a step")
        request = _Request(self._taken, rows, tuple(take))
        if self._prepared and self._prepared[0] == request:
            taken_rows = self._prepared[1].result()
        else:
            self._drop_prepared()
            taken_rows = self._rows_of(request)
        self._taken = _advance(request.taken, self._order(request))
        following = _Request(self._taken, rows, tuple(take))
        self._prepared = following, self._worker.submit(self._rows_of, following)
        return taken_rows

    def state_dict(self) -> dict[str, Any]:
        """Where the job is in the data, as plain JSON: rows taken of each source, and what identifies
        them.
        """
        return {
            "version": _STATE_VERSION,
            "seed": self._seed,
            "rowTokens": self._row_tokens,
            "sources": [
                {"path": spec.path, "weight": spec.weight, "fingerprint": source.fingerprint, "rows": rows}
                for spec, source, rows in zip(self._specs, self.sources, self._taken, strict=True)
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

    def epochs(self) -> list[float]:
        """How often each source has been seen so far, as a fraction of its rows."""
        return [taken / source.rows for taken, source in zip(self._taken, self.sources, strict=True)]

    def close(self) -> None:
        """End the background thread."""
        self._drop_prepared()
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _drop_prepared(self) -> None:
        """Forget the prepared step; waits for it, since its thread and this one share files and caches."""
        if self._prepared:
            prepared = self._prepared[1]
            self._prepared = None
            if not prepared.cancel():
                prepared.exception()

    def _order(self, request: _Request) -> list[int]:
        return next_sources(request.taken, [spec.weight for spec in self._specs], request.rows)

    def _rows_of(self, request: _Request) -> list[Row]:
        places = list(_places(self.sources, request.taken, self._order(request)))
        return self.read([places[offset] for offset in request.take])

    def read(self, places: Sequence[tuple[int, Place]]) -> list[Row]:
        """The rows at `places`, each with its source's number."""
        cuts = [(number, place.file, *self.sources[number].cut(place)) for number, place in places]
        wanted = dict.fromkeys((number, file, s) for number, file, samples, _ in cuts for s in samples)
        found = self._samples.get_many(wanted, self._read_samples)
        return [
            pack([found[number, file, s] for s in samples], parts, self._seq_len, self._packing, number)
            for number, file, samples, parts in cuts
        ]

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
        places = list(_places(loader.sources, (0,) * len(sources), order))
        return loader.read(places[rank::world_size])
    finally:
        loader.close()


def _places(
    sources: Sequence[Source], taken: Sequence[int], order: Sequence[int]
) -> Iterator[tuple[int, Place]]:
    """Where the rows of `order` are, if `taken` rows of each source came before."""
    numbers = list(taken)
    for source in order:
        yield source, sources[source].place(numbers[source])
        numbers[source] += 1


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
