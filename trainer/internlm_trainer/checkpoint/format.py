"""What a checkpoint looks like in a store, and which bytes of it give what is wanted.  Pure: no I/O, no
torch.

    step-00000100/shard-00000.bin   one writer each: tensors back to back, little-endian, each 64-byte aligned
    step-00000100/shard-00001.bin
    step-00000100/manifest.json     written last: with it the checkpoint exists

Shards are lists of pieces, and a piece is named by what it is, not by who wrote it: a kind of state
(`master`, `exp_avg`, ...), a parameter, and a range of the flattened parameter's elements.  So any later
layout, on any number of ranks, finds what it needs by ranged reads.  The idea of layout-independent
coordinates is that of PyTorch's distributed checkpoint and of Lian et al., Universal Checkpointing,
arXiv:2406.18820; flat ranges in place of n-dimensional boxes fit flat-buffer ZeRO.

The manifest carries a digest of every `CHUNK` bytes of every shard and one over itself.  So reads are of whole
chunks, each is verified as it comes, and whatever is cut off or flipped is noticed without a second pass over
the bytes.  Digests are XXH3-128: they find damage at the speed of memory and are no protection against forgery.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import xxhash

from internlm_trainer.checkpoint.errors import BadCheckpoint
from internlm_trainer.errors import UserError

FORMAT = 2
ALIGNMENT = 64
MANIFEST = "manifest.json"
ITEM_SIZES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
# A ranged read costs about 20 ms on an object store, in which a connection moves a few megabytes: rounding reads
# to chunks of that size costs no time, and a terabyte has no more than 9 MB of digests.  Reads end at a size of
# which several fit into memory.
CHUNK = 4 << 20
LARGEST_READ = 16 << 20


class Elements(NamedTuple):
    """Elements [start, stop) of the flattened `parameter`'s state of a `kind`."""

    kind: str
    parameter: str
    start: int
    stop: int


class PieceEntry(NamedTuple):
    """Where a shard holds some elements: from byte `offset` on."""

    kind: str
    parameter: str
    start: int
    stop: int
    dtype: str
    offset: int


@dataclass(frozen=True)
class ShardEntry:
    """One file of a checkpoint."""

    file: str
    bytes: int
    chunks: tuple[str, ...]
    """Digest of each `CHUNK` bytes; the last chunk may be shorter."""
    pieces: tuple[PieceEntry, ...]

    @property
    def digest(self) -> str:
        """One digest for the whole shard: that of its chunks' digests."""
        return digest("".join(self.chunks).encode())


@dataclass(frozen=True)
class Manifest:
    """All that a checkpoint says about itself.

    `model` is the fingerprint that must equal the job's own; `state` is the loop's (counters, data, RNG).
    """

    job: str
    step: int
    created: datetime
    model: Mapping[str, Any]
    world_size: int
    parameters: Mapping[str, tuple[int, ...]]
    state: Mapping[str, Any]
    shards: tuple[ShardEntry, ...]


def step_name(step: int) -> str:
    """Folder of a step: `step-00000100`."""
    return f"step-{step:08d}"


def parse_step(name: str) -> int | None:
    """The step of a folder's name, or None for what is no step's folder."""
    found = re.fullmatch(r"step-(\d{8,})", name)
    return int(found[1]) if found and step_name(int(found[1])) == name else None


def shard_name(rank: int, writer: str = "") -> str:
    """File of a rank: `shard-00003.bin`, with the name of the run that writes it in between, if there is one."""
    return f"shard-{rank:05d}{'-' if writer else ''}{writer}.bin"


def aligned(offset: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def chunk_digest(data: bytes | memoryview) -> str:
    """Digest of a chunk as the manifest lists it, 32 hexadecimal digits of XXH3-128."""
    return xxhash.xxh3_128_hexdigest(data)


def digest(data: bytes) -> str:
    """Digest as the manifest writes it, `xxh3:` and 32 hexadecimal digits."""
    return f"xxh3:{xxhash.xxh3_128_hexdigest(data)}"


def canonical_json(content: object) -> bytes:
    """The one way to write `content`: sorted keys, no spaces, ASCII.  ValueError for NaN and infinities."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def time_string(time: datetime) -> str:
    """A time in UTC as Kubernetes writes it, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def encode(manifest: Manifest) -> tuple[bytes, str]:
    """The manifest's file and its digest."""
    content = {
        "format": FORMAT,
        "job": manifest.job,
        "step": manifest.step,
        "created": time_string(manifest.created),
        "model": dict(manifest.model),
        "worldSize": manifest.world_size,
        "parameters": {name: list(shape) for name, shape in manifest.parameters.items()},
        "state": dict(manifest.state),
        "shards": [
            {
                "file": s.file,
                "bytes": s.bytes,
                "digest": s.digest,
                "chunks": list(s.chunks),
                "pieces": [list(piece) for piece in s.pieces],
            }
            for s in manifest.shards
        ],
    }
    # Through JSON once, so that the digest is of what a reader will see: integer keys, say, become strings
    # there and sort differently.
    content = json.loads(canonical_json(content))
    content["digest"] = digest(canonical_json(content))
    return canonical_json(content), content["digest"]


def decode(data: bytes, name: str) -> tuple[Manifest, str]:
    """The manifest in a file of the checkpoint `name`, and its digest.

    Raises BadCheckpoint for anything that `encode` did not write, and UserError for a newer version's
    checkpoint.
    """
    try:
        content = json.loads(data)
        claimed = content.pop("digest")
        found = digest(canonical_json(content))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadCheckpoint(name, f"{MANIFEST} is cut off or damaged: it is no manifest") from error
    if found != claimed:
        raise BadCheckpoint(
            name, f"{MANIFEST} is damaged: its content has digest {found}, {claimed} expected"
        )
    if content.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {name} is of format {content.get('format')} and this version reads format {FORMAT}: "
            "resume with the version that wrote it, or a newer one"
        )
    try:
        return _manifest(content), claimed
    except (ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(
            name, f"{MANIFEST} lacks what a manifest of format {FORMAT} has: {error!r}"
        ) from error


def _manifest(content: dict[str, Any]) -> Manifest:
    return Manifest(
        job=content["job"],
        step=content["step"],
        created=datetime.fromisoformat(content["created"]),
        model=content["model"],
        world_size=content["worldSize"],
        parameters={name: tuple(shape) for name, shape in content["parameters"].items()},
        state=content["state"],
        shards=tuple(
            ShardEntry(
                s["file"], s["bytes"], tuple(s["chunks"]), tuple(PieceEntry(*piece) for piece in s["pieces"])
            )
            for s in content["shards"]
        ),
    )


def uncovered(parameters: Mapping[str, tuple[int, ...]], shards: Iterable[ShardEntry]) -> str | None:
    """What keeps the shards from holding every element of every parameter exactly once, for each kind that the
    parameter has: a sentence, or None.  Parameters of different optimizers have different kinds of state."""
    ranges: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for shard in shards:
        for piece in shard.pieces:
            if piece.parameter not in parameters:
                return f"{shard.file} holds {piece.parameter}, which is no parameter"
            ranges[piece.parameter, piece.kind].append((piece.start, piece.stop))
    found: dict[str, list[str]] = {parameter: [] for parameter in parameters}
    for parameter, kind in sorted(ranges):
        found[parameter].append(kind)
    most = max(map(len, found.values()), default=0)
    for parameter, shape in parameters.items():
        kinds = found[parameter]
        if len(kinds) < min(most, 2):
            return f"{parameter} has {kinds or 'nothing'} alone, and others have {most} kinds"
        for kind in kinds:
            end, size = 0, prod(shape)
            for start, stop in sorted(ranges[parameter, kind]):
                if start != end:
                    problem = "missing" if start > end else "written twice"
                    low, high = sorted((start, end))
                    return f"elements {low} to {high} of {kind} of {parameter} are {problem}"
                end = stop
            if end != size:
                return f"{kind} of {parameter} ends at element {end} of {size}"
    return None


class Copy(NamedTuple):
    """Bytes [start, stop) of a shard's file go to byte `to` on of the want with number `want`."""

    start: int
    stop: int
    want: int
    to: int


class Read(NamedTuple):
    """One ranged read of bytes [start, stop) of `file`, and where its parts go."""

    file: str
    start: int
    stop: int
    copies: tuple[Copy, ...]


class Index:
    """Finds the pieces of a checkpoint that hold given elements."""

    def __init__(self, shards: Iterable[ShardEntry]) -> None:
        pieces: dict[tuple[str, str], list[tuple[PieceEntry, str]]] = defaultdict(list)
        self.bytes: dict[str, int] = {}
        for shard in shards:
            self.bytes[shard.file] = shard.bytes
            for piece in shard.pieces:
                pieces[piece.kind, piece.parameter].append((piece, shard.file))
        self.pieces = {key: sorted(found, key=lambda p: p[0].start) for key, found in pieces.items()}
        self.kinds = sorted({kind for kind, _ in pieces})

    def dtype(self, kind: str, parameter: str) -> str | None:
        """Type of a parameter's state, or None if the checkpoint does not hold it."""
        found = self.pieces.get((kind, parameter))
        return found[0][0].dtype if found else None

    def plan(self, wants: Sequence[Elements], chunk: int = CHUNK, largest: int = LARGEST_READ) -> list[Read]:
        """The reads that fill every want: whole chunks, none read twice, at most `largest` bytes (a multiple of
        `chunk`) at once.  KeyError for elements that the checkpoint does not hold."""
        assert largest % chunk == 0
        copies: dict[str, list[Copy]] = defaultdict(list)
        for number, want in enumerate(wants):
            for file, copy in self._copies(number, want):
                copies[file] += _split(copy, largest)
        return [
            read
            for file in sorted(copies)
            for read in _coalesce(file, self.bytes[file], sorted(copies[file]), chunk, largest)
        ]

    def _copies(self, number: int, want: Elements) -> Iterable[tuple[str, Copy]]:
        pieces = self.pieces[want.kind, want.parameter]
        first = max(bisect_right(pieces, want.start, key=lambda p: p[0].start) - 1, 0)
        reached = want.start
        for piece, file in pieces[first:]:
            if reached >= want.stop or piece.start > reached:
                break
            size, stop = ITEM_SIZES[piece.dtype], min(piece.stop, want.stop)
            begin = piece.offset + (reached - piece.start) * size
            yield file, Copy(begin, begin + (stop - reached) * size, number, (reached - want.start) * size)
            reached = stop
        if reached < want.stop:
            raise KeyError(f"{want.kind} of {want.parameter} has no element {reached}")


def _split(copy: Copy, largest: int) -> list[Copy]:
    """The parts of a copy between multiples of `largest`, at which reads are cut."""
    cuts = range(copy.start // largest * largest + largest, copy.stop, largest)
    bounds = [copy.start, *cuts, copy.stop]
    return [Copy(start, stop, copy.want, copy.to + start - copy.start) for start, stop in pairwise(bounds)]


def _coalesce(file: str, size: int, copies: list[Copy], chunk: int, largest: int) -> list[Read]:
    """One read for what lies in neighbouring chunks and between the same multiples of `largest`."""
    groups: list[list[Copy]] = []
    end = 0
    for copy in copies:
        near = groups and copy.start // chunk <= -(-end // chunk)
        if near and copy.start // largest == groups[-1][0].start // largest:
            groups[-1].append(copy)
            end = max(end, copy.stop)
        else:
            groups.append([copy])
            end = copy.stop
    return [
        Read(
            file,
            group[0].start // chunk * chunk,
            min(-(-max(copy.stop for copy in group) // chunk) * chunk, size),
            tuple(group),
        )
        for group in groups
    ]
