"""Parts of files: by positioned reads where they are local, by cached blocks where they are not."""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event, Lock
from typing import Any, NamedTuple, Protocol

from internlm_trainer.data.block_cache import BlockCache
from internlm_trainer.errors import UserError
from internlm_trainer.storage import StorageUnreachableError, explain

log = logging.getLogger(__name__)
_READERS = 16
_TELL_SECONDS = 10.0

_Block = tuple["RemoteRanges", str, int]
"""(whose, path, number)"""
Range = tuple[str, int, int]
"""(path, first byte, one after the last byte)"""


class ByteRanges(Protocol):
    """Reads parts of files."""

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range; fewer where the file is shorter."""
        ...

    def prefetch(self, ranges: Sequence[Range]) -> None:
        """Begin to fetch what `read` will be asked for, if that takes time."""
        ...

    def forget(self, ranges: Sequence[Range]) -> None:
        """Let go of what `prefetch` was asked for and `read` was not, or will not be."""
        ...

    def stop(self) -> None:
        """Let reads that wait for a store fail at once."""
        ...

    def close(self) -> None:
        """Let go of threads and files."""
        ...


class LocalRanges:
    """Positioned reads of local files, of which up to `max_open` stay open.

    Not a memory map: a file that is truncated under a map kills the process, here it is a short read.
    """

    def __init__(self, max_open: int = 128) -> None:
        self._max_open = max_open
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range; fewer where the file is shorter."""
        return [_read_at(self._descriptor(path), start, stop) for path, start, stop in ranges]

    def prefetch(self, ranges: Sequence[Range]) -> None:
        """Nothing: the system reads ahead."""

    def forget(self, ranges: Sequence[Range]) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing: no read waits for long."""

    def close(self) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, path: str) -> int:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > self._max_open:
                os.close(self._open.popitem(last=False)[1])
        return self._open[path]

    def __del__(self) -> None:
        self.close()


def _read_at(descriptor: int, start: int, stop: int) -> bytes:
    """One call reads 2 GiB at most."""
    content = os.pread(descriptor, stop - start, start)
    while content and len(content) < stop - start:
        more = os.pread(descriptor, stop - start - len(content), start + len(content))
        if not more:
            break
        content += more
    return content


class RemoteFile(NamedTuple):
    """A file in a store: its size, and what changes when its content does."""

    size: int
    stamp: str


class BlockMemory:
    """Blocks of remote files in memory, and the threads that fetch them: one for all sources that a process reads.

    The last used ones stay, up to `cached_bytes`; those fetched ahead of `read` take up to `ahead_bytes` more.
    """

    def __init__(
        self, *, block_bytes: int = 256 << 10, cached_bytes: int = 64 << 20, ahead_bytes: int = 128 << 20
    ) -> None:
        self.block_bytes = block_bytes
        self.max_ahead = ahead_bytes // block_bytes
        self._max_blocks = max(cached_bytes // block_bytes, 1)
        self.blocks: OrderedDict[_Block, bytes] = OrderedDict()
        self.coming: dict[_Block, Future[bytes]] = {}
        self.lock = Lock()
        self.pool = ThreadPoolExecutor(_READERS, thread_name_prefix="blocks")

    def keep(self, blocks: Mapping[_Block, bytes]) -> None:
        """These were used last.  To be called with the lock."""
        for block, content in blocks.items():
            self.blocks[block] = content
            self.blocks.move_to_end(block)
        while len(self.blocks) > self._max_blocks:
            self.blocks.popitem(last=False)

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown(wait=False, cancel_futures=True)


class RemoteRanges:
    """Ranged reads through fsspec, in blocks of which the last used stay in memory and, with a `cache`, on disk.

    Samples are read in random order.  Blocks keep a small corpus of many short samples from being asked for
    line by line, and all blocks that a call lacks are asked for at the same time.  A read that fails is tried again
    for `patience` seconds, so `fs` need not.
    """

    patience = 60.0

    def __init__(
        self, fs: Any, files: Mapping[str, RemoteFile], memory: BlockMemory, cache: BlockCache | None = None
    ) -> None:
        self._fs, self._files, self._memory, self._cache = fs, files, memory, cache
        self._block_bytes = memory.block_bytes
        self._stopped = Event()
        self._told = -math.inf

    def prefetch(self, ranges: Sequence[Range]) -> None:
        """Begin to fetch what `read` will be asked for, as far as there is room for it.  Returns at once."""
        memory = self._memory
        with memory.lock:
            for block in self._wanted(ranges):
                if len(memory.coming) >= memory.max_ahead:
                    return
                if block not in memory.blocks and block not in memory.coming:
                    memory.coming[block] = memory.pool.submit(self._fetch, block)

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range; fewer where the file is shorter.

        Raises StorageUnreachableError if the store does not answer in time, other UserErrors for what only the user
        can mend.
        """
        memory, wanted = self._memory, self._wanted(ranges)
        with memory.lock:
            found = {block: memory.blocks[block] for block in wanted if block in memory.blocks}
            coming = {
                block: memory.coming.pop(block)
                if block in memory.coming
                else memory.pool.submit(self._fetch, block)
                for block in wanted
                if block not in found
            }
        found |= {block: future.result() for block, future in coming.items()}
        with memory.lock:
            memory.keep({block: found[block] for block in wanted})
        parts = []
        for path, start, stop in ranges:
            blocks = list(self._blocks_of((path, start, stop)))
            content = b"".join(found[block] for block in blocks)
            first = blocks[0][2] * self._block_bytes if blocks else 0
            parts.append(content[start - first : stop - first])
        return parts

    def forget(self, ranges: Sequence[Range]) -> None:
        """Let go of what `prefetch` was asked for and `read` was not, or will not be.

        What has come already counts as used, since a neighbour may want it.
        """
        memory = self._memory
        with memory.lock:
            left = {b: memory.coming.pop(b) for b in self._wanted(ranges) if b in memory.coming}
            come = {block: future for block, future in left.items() if not future.cancel() and future.done()}
            memory.keep({block: future.result() for block, future in come.items() if not future.exception()})

    def _wanted(self, ranges: Sequence[Range]) -> list[_Block]:
        """The blocks of the ranges, each once."""
        return list(dict.fromkeys(block for part in ranges for block in self._blocks_of(part)))

    def _blocks_of(self, part: Range) -> Iterable[_Block]:
        path, start, stop = part
        stop = min(stop, self._files[path].size)
        numbers = range(start // self._block_bytes, -(-stop // self._block_bytes))
        return ((self, path, number) for number in numbers)

    def _fetch(self, block: _Block) -> bytes:
        _, path, index = block
        size, stamp = self._files[path]
        key = f"{path}\0{size}\0{stamp}\0{self._block_bytes}\0{index}"
        content = self._cache.get(key) if self._cache else None
        if content is None:
            start = index * self._block_bytes
            content = self._patiently(path, start, min(start + self._block_bytes, size))
            if self._cache:
                self._cache.put(key, content)
        return content

    def _patiently(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop), tried again with growing pauses, random so that ranks do not come in step."""
        began = time.monotonic()
        for attempt in itertools.count():
            try:
                content: bytes = self._fs.cat_file(path, start=start, end=stop)
                if len(content) == stop - start:
                    return content
                told = f"{len(content)} of {stop - start} bytes came"
            except Exception as error:
                sentence, kind = explain(error, path)
                if sentence and not issubclass(kind, StorageUnreachableError):
                    raise UserError(sentence) from error
                told = sentence or str(error) or type(error).__name__
            waited = time.monotonic() - began
            if waited >= self.patience:
                raise StorageUnreachableError(
                    f"{path} could not be read for {waited:.0f} s, {attempt + 1} times (last: {told}); is the store up?"
                )
            if time.monotonic() - self._told > _TELL_SECONDS:
                self._told = time.monotonic()
                log.warning("%s could not be read (%s); trying again", path, told)
            if self._stopped.wait(min(0.1 * 2**attempt, 5.0) * random.uniform(0.5, 1.5)):  # noqa: S311 - not a secret
                raise StorageUnreachableError(f"{path} was given up")
        raise AssertionError

    def stop(self) -> None:
        """Let reads that wait for the store fail at once."""
        self._stopped.set()

    def close(self) -> None:
        """Nothing more than `stop`: the threads are the memory's."""
        self.stop()
