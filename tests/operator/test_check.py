"""`internlm-operator check`, which `helm test` runs, against a server of its own."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from internlm_operator import tls
from internlm_operator.cli import app


@contextmanager
def channel(folder: Path, answers: list[int]) -> Iterator[tuple[str, Path]]:
    """URL and authority of a server that gives these answers, the last of them for ever."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    now = datetime.now(UTC)
    authority = tls.new_authority(now)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load(context, tls.new_server(authority, ["localhost"], now))
    file = folder / "ca.crt"
    file.write_bytes(authority.certificate_pem)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"https://localhost:{server.server_port}", file
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("answers", "seconds", "code", "sentence"),
    [
        ([401], 0, 0, "the job channel at https://localhost:PORT answers"),
        ([503, 503, 401], 30, 0, "the job channel at https://localhost:PORT answers"),
        ([503], 0, 1, "https://localhost:PORT answers 503, where a job channel says 401"),
        ([200], 0, 1, "https://localhost:PORT lets in who has no token: it is no job channel"),
    ],
)
def test_the_channel_refuses_whom_it_does_not_know_as_soon_as_it_has_a_leader(
    tmp_path: Path, answers: list[int], seconds: int, code: int, sentence: str
) -> None:
    with channel(tmp_path, answers) as (url, file):
        found = CliRunner().invoke(app, ["check", url, f"--ca-file={file}", f"--wait-seconds={seconds}"])
    assert found.exit_code == code
    said = found.stdout.strip() or str(found.exception)
    assert said == sentence.replace("PORT", url.rpartition(":")[2])


def test_who_is_not_there_is_asked_until_the_end(tmp_path: Path) -> None:
    with channel(tmp_path, [401]) as (url, file):
        pass
    found = CliRunner().invoke(app, ["check", url, f"--ca-file={file}", "--wait-seconds=1.5"])
    assert found.exit_code == 1
    assert f"{url} does not answer: " in (str(found.exception) + found.output)
