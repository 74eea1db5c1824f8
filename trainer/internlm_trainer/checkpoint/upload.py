"""One object of an S3 store, written in parts that travel side by side.

fsspec's own file object sends one part after the other; its parallel `put_file` wants a file on disk.  Both give
up the whole object for one part that fails; here each part is tried again by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

PART = 16 << 20  # bytes; S3 wants at least 5 MiB
PARTS = 10_000  # that S3 takes of one object
UPLOADS = 8  # parts in flight; with the one being put together they hold 144 MiB


class PartedUpload:
    """An upload of `size` bytes to `path` of the s3fs file system `fs`.

    `patiently(what, work)` runs a request, again and again if need be.  `write`, then `close` or `discard`;
    until `close` has returned there is no object.
    """

    def __init__(
        self, fs: Any, path: str, size: int, patiently: Callable[[str, Callable[[], Any]], Any]
    ) -> None:
        self._fs, self._path, self._size, self._patiently = fs, path, size, patiently
        bucket, key, _ = fs.split_path(path)
        self._target = {"Bucket": bucket, "Key": key}
        self._part = max(PART, -(-size // PARTS))
        self._waiting: list[memoryview] = []
        self._bytes = self._number = 0
        self._flying: deque[Future[dict[str, Any]]] = deque()
        self._done: list[dict[str, Any]] = []
        self._pool = ThreadPoolExecutor(UPLOADS, "upload")
        begun = patiently("beginning the upload", lambda: self._call("create_multipart_upload"))
        self._target["UploadId"] = begun["UploadId"]

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._fs.call_s3(method, **self._target, **arguments)

    def write(self, data: memoryview) -> None:
        """Take `data`, which stays as it is until it is sent; blocks while enough is in flight."""
        while len(data):
            taken = data[: self._part - self._bytes]
            self._waiting.append(taken)
            self._bytes += len(taken)
            data = data[len(taken) :]
            if self._bytes == self._part:
                self._send()

    def _send(self) -> None:
        if len(self._flying) == UPLOADS:
            self._done.append(self._flying.popleft().result())
        self._number += 1
        self._flying.append(self._pool.submit(self._upload, self._number, b"".join(self._waiting)))
        self._waiting, self._bytes = [], 0

    def _upload(self, number: int, body: bytes) -> dict[str, Any]:
        sent = self._patiently(
            f"part {number}", lambda: self._call("upload_part", PartNumber=number, Body=body)
        )
        return {"PartNumber": number, "ETag": sent["ETag"]}

    def close(self) -> None:
        """Send the rest and make the object."""
        if self._bytes:
            self._send()
        self._done += [future.result() for future in self._flying]
        parts = {"Parts": self._done}

        def complete() -> None:
            try:
                self._call("complete_multipart_upload", MultipartUpload=parts)
            except FileNotFoundError:
                # The upload is gone: this is so when it was completed and the answer got lost.
                if self._fs.info(self._path, refresh=True)["size"] != self._size:
                    raise

        self._patiently("completing the upload", complete)
        self._pool.shutdown()

    def discard(self) -> None:
        """Give it up, and let the store forget the parts that it has.  Never raises."""
        self._pool.shutdown(cancel_futures=True)
        with suppress(Exception):
            self._call("abort_multipart_upload")
