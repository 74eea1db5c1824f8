"""A corpus, a job channel and a run without interruptions, made once for all tests of the loop."""

from __future__ import annotations

import json
import os
import shutil
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from internlm_operator import tls
from internlm_operator.manifest import parse_job
from internlm_trainer.data.prepare import prepare
from trainer.loop.jobs import Corpus, Running, TinyJob

MODULES = ("argparse", "ast", "dataclasses", "difflib", "inspect", "pathlib", "pickle", "tarfile", "typing")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Some of Python's own sources, tokenized with a vocabulary of 512."""
    folder = tmp_path_factory.mktemp("corpus")
    for module in MODULES:
        shutil.copy(Path(os.__file__).parent / f"{module}.py", folder)
    corpus = Corpus(folder / "tokenizer.model", folder / "train", folder / "validation")
    job = TinyJob(corpus, folder)
    job.data = {"prepare": {"text": [f"{folder}/*.py"], "sample": "line", "validationPercent": 4}}
    prepare(parse_job(job.manifest()).spec)
    return corpus


@pytest.fixture
def tiny(corpus: Corpus, tmp_path: Path) -> Callable[..., TinyJob]:
    """Makes jobs in the test's own folder."""
    return lambda **settings: TinyJob(corpus, **({"folder": tmp_path / "job"} | settings))


@dataclass
class Channel:
    """An operator that only listens: what it was told, and what it answers."""

    url: str = ""
    ca_file: Path = Path()
    token_file: Path = Path()
    answer: int | bytes = 200
    reports: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    agents: list[dict[str, Any]] = field(default_factory=list)
    attempt: int = 1
    checkpoint: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """What a pod has in its environment to report here."""
        return {
            "INTERNLM_REPORT_URL": self.url,
            "INTERNLM_REPORT_TOKEN_FILE": str(self.token_file),
            "INTERNLM_REPORT_CA_FILE": str(self.ca_file),
        }


@pytest.fixture(scope="session")
def channel_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Channel]:
    """A job channel over TLS with the operator's own kind of certificates."""
    folder = tmp_path_factory.mktemp("channel")
    channel = Channel(ca_file=folder / "ca.crt", token_file=folder / "token")
    now = datetime.now(UTC)
    authority = tls.new_authority(now)
    channel.ca_file.write_bytes(authority.certificate_pem)
    channel.token_file.write_text("the-token\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"channel": channel}))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load(context, tls.new_server(authority, ["localhost"], now))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    channel.url = f"https://localhost:{server.server_port}/v1/namespaces/default/internlmjobs/tiny/report"
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield channel
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def channel(channel_server: Channel) -> Channel:
    """The job channel, with nothing told yet."""
    channel_server.answer = 200
    channel_server.reports.clear()
    channel_server.tokens.clear()
    channel_server.agents.clear()
    channel_server.attempt, channel_server.checkpoint = 1, ""
    return channel_server


class _Handler(BaseHTTPRequestHandler):
    channel: Channel

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.channel.tokens.add(self.headers["Authorization"])
        of_agent = self.path.endswith("/agent")
        (self.channel.agents if of_agent else self.channel.reports).append(json.loads(body))
        if isinstance(self.channel.answer, bytes):
            self.wfile.write(self.channel.answer)
            return
        self.send_response(self.channel.answer)
        directive = {"attempt": self.channel.attempt} if of_agent else {"checkpoint": self.channel.checkpoint}
        answer = json.dumps(directive).encode()
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@dataclass(frozen=True)
class Finished:
    """A run that nothing interrupted."""

    job: TinyJob
    run: Running
    code: int
    last_report: dict[str, Any]


@pytest.fixture(scope="session")
def uninterrupted(
    corpus: Corpus, channel_server: Channel, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """Two processes that train the job from its first to its last step, and report it."""
    job = TinyJob(corpus, tmp_path_factory.mktemp("uninterrupted"))
    job.training = {"completions": ["import ", "class "], "validateEverySteps": 60}
    channel_server.reports.clear()
    run = job.torchrun(**channel_server.environment)
    code = run.end()
    return Finished(job, run, code, channel_server.reports[-1])
