"""Parts of files: by positioned reads where they are local, by cached blocks where they are not."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

Range = tuple[str, int, int]
"""(path, first byte, one after the last byte)"""


class ByteRanges(Protocol):
    """Reads parts of files."""

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range; fewer where the file is shorter."""
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

    def _descriptor(self, path: str) -> int:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._open) > self._max_open:
                os.close(self._open.popitem(last=False)[1])
        return self._open[path]

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def _read_at(descriptor: int, start: int, stop: int) -> bytes:
    """One call reads 2 GiB at most."""
    content = os.pread(descriptor, stop - start, start)
    while content and len(content) < stop - start:
        more = os.pread(descriptor, stop - start - len(content), start + len(content))
        if not more:
            break
        content += more
    return content


class RemoteRanges:
    """Ranged reads through fsspec, in blocks of which the last used stay in memory.

    Samples are read in random order.  Blocks keep a small corpus of many short samples from being asked for
    line by line, and all blocks that a call lacks are asked for at the same time.
    """

    def __init__(self, fs: Any, block_bytes: int = 256 << 10, cached_bytes: int = 64 << 20) -> None:
        self._fs = fs
        self._block_bytes = block_bytes
        self._max_blocks = cached_bytes // block_bytes
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range; fewer where the file is shorter."""
        wanted = list(dict.fromkeys(block for part in ranges for block in self._blocks_of(part)))
        self._fetch(block for block in wanted if block not in self._blocks)
        parts = []
        for path, start, stop in ranges:
            blocks = list(self._blocks_of((path, start, stop)))
            content = b"".join(self._blocks[block] for block in blocks)
            first = blocks[0][1] * self._block_bytes if blocks else 0
            parts.append(content[start - first : stop - first])
        for block in wanted:
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)
        return parts

    def _blocks_of(self, part: Range) -> Iterable[tuple[str, int]]:
        path, start, stop = part
        return ((path, index) for index in range(start // self._block_bytes, -(-stop // self._block_bytes)))

    def _fetch(self, blocks: Iterable[tuple[str, int]]) -> None:
        missing = list(blocks)
        if not missing:
            return
        contents = self._fs.cat_ranges(
            [path for path, _ in missing],
            [index * self._block_bytes for _, index in missing],
            [(index + 1) * self._block_bytes for _, index in missing],
            on_error="raise",
        )
        self._blocks.update(zip(missing, contents, strict=True))
