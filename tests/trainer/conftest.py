"""What tests of the trainer share: a real S3 server, and a proxy in front of it that answers errors."""

from __future__ import annotations

import http.client
import os
import secrets
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, ClassVar

import botocore.session
import pytest
from s3fs import S3FileSystem

from cluster import binaries
from ports import free_port

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when Triton is imported: without a GPU its kernels are run by it
    )


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of the size that the test's parameter says, as mount(8) writes it."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", folder]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@dataclass(frozen=True)
class Minio:
    """A running MinIO, and how to get in."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use `s3://` URLs here."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def bucket(self) -> str:
        """URL of a new, empty bucket."""
        name = f"test-{secrets.token_hex(8)}"
        _client(self.endpoint, self.access_key, self.secret_key).create_bucket(Bucket=name)
        return f"s3://{name}"


@cache
def _client(endpoint: str, access_key: str, secret_key: str) -> Any:
    return botocore.session.get_session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=endpoint,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
    )


@pytest.fixture(scope="session")
def minio_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Minio]:
    """One MinIO for the session; skips where its program is not there and cannot be built."""
    try:
        program = binaries.ensure(["minio"], print)["minio"]
    except RuntimeError as error:
        pytest.skip(f"no S3 server: {error}")
    folder = tmp_path_factory.mktemp("minio")
    key, secret = secrets.token_hex(8), secrets.token_hex(16)
    for _ in range(5):  # another process may take the port between its choice and its use
        port = free_port()
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [program, "server", folder / "data", "--address", f"127.0.0.1:{port}", "--quiet"],
                env=os.environ
                | {
                    "MINIO_ROOT_USER": key,
                    "MINIO_ROOT_PASSWORD": secret,
                    "MINIO_BROWSER": "off",
                    "MINIO_UPDATE": "off",
                    "HOME": str(folder),
                },
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        server = Minio(f"http://127.0.0.1:{port}", key, secret)
        try:
            if _is_ready(process, server.endpoint):
                yield server
                return
        finally:
            process.kill()
            process.wait()
    pytest.fail(f"MinIO did not start:\n{(folder / 'log').read_text()}")


def _is_ready(process: subprocess.Popen[bytes], endpoint: str) -> bool:
    for _ in range(600):
        if process.poll() is not None:
            return False
        try:
            with urllib.request.urlopen(f"{endpoint}/minio/health/ready", timeout=5):
                return True
        except OSError:
            time.sleep(0.1)
    return False


@pytest.fixture
def minio(minio_server: Minio, monkeypatch: pytest.MonkeyPatch) -> Iterator[Minio]:
    """MinIO with this process's environment set for it: `s3://` URLs work. `bucket()` makes a bucket."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in minio_server.environment.items():
        monkeypatch.setenv(name, value)
    # fsspec keeps file systems, and so the environment that they were made in, for the whole process.
    S3FileSystem.clear_instance_cache()
    yield minio_server
    S3FileSystem.clear_instance_cache()


CUT, HANG, HALF = -1, -2, -3


@dataclass
class FaultProxy:
    """Passes requests on to an S3 server, but for those that `fault` gives a status for.

    Besides statuses there are CUT, which ends the connection without an answer, HANG, which does so after two
    seconds, and HALF, which ends it in the middle of the answer. `rewrite` may change answers' bodies.

    `fault` is called with the method and the path (query included) of each request, one at a time, so it may
    count. `seen` lists "METHOD path status" of all answers.
    """

    endpoint: str
    fault: Callable[[str, str], int | None] = lambda _method, _path: None
    rewrite: Callable[[str, bytes], bytes] = lambda _path, content: content
    seen: list[str] = field(default_factory=list)
    sent: int = 0
    """Bytes of all answers' bodies."""


@pytest.fixture
def fault_proxy(minio: Minio, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """MinIO behind a proxy that can answer errors; `s3://` URLs of this process go through it."""
    host = minio.endpoint.removeprefix("http://")
    proxy = FaultProxy("")
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy, "target": host})
    )
    proxy.endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield proxy
    server.shutdown()
    thread.join()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One connection of the proxy. The Host header is part of what the client signed, so it is passed on."""

    protocol_version = "HTTP/1.1"
    lock: ClassVar[Lock] = Lock()
    proxy: ClassVar[FaultProxy]
    target: ClassVar[str]

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.lock:
            status = self.proxy.fault(self.command, self.path)
        if status in (CUT, HANG):
            time.sleep(2.0 if status == HANG else 0.0)
            self.close_connection = True
            return
        if status is not None and status != HALF:
            content = (
                f"<Error><Code>{'SlowDown' if status == 503 else 'InternalError'}</Code>"
                "<Message>This error was made for a test.</Message></Error>"
            ).encode()
            self._answer(status, [("Content-Type", "application/xml")], content)
            return
        connection = http.client.HTTPConnection(self.target)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        headers = [
            (n, v) for n, v in answer.getheaders() if n.lower() not in ("connection", "transfer-encoding")
        ]
        content = self.proxy.rewrite(self.path, answer.read())
        self._answer(answer.status, headers, content, len(content) // 2 if status == HALF else None)
        connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815 - http.server's names

    def _answer(
        self, status: int, headers: list[tuple[str, str]], content: bytes, stop: int | None = None
    ) -> None:
        with self.lock:
            self.proxy.seen.append(f"{self.command} {self.path} {status}")
            self.proxy.sent += len(content)
        self.send_response(status)
        for name, value in headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:stop])
        if stop is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the test looks at `seen`."""


@pytest.fixture(params=["local", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that is not there yet, in each kind of store."""
    if request.param == "s3":
        server: Minio = request.getfixturevalue("minio")
        return f"{server.bucket()}/folder"
    return str(tmp_path / "folder") if request.param == "local" else f"memory://{secrets.token_hex(8)}/folder"
