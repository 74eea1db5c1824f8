"""What code that a model writes may do, and where it does not run."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from internlm_trainer import sandbox
from internlm_trainer.chat.messages import INTERPRETER, Call, Message, form_of, prompt
from internlm_trainer.chat.tools import PYTHON, PYTHON_BESIDE, run
from internlm_trainer.cli import app
from internlm_trainer.commands.chat import chosen_tools
from internlm_trainer.errors import UserError
from trainer.chat.chatml import chatml_tokenizer
from trainer.isolated import can_isolate


@pytest.fixture(params=[True, False], ids=["isolated", "not isolated"])
def isolated(request: pytest.FixtureRequest) -> bool:
    if request.param and not can_isolate():
        pytest.skip("this kernel lets this user make no namespaces")
    return bool(request.param)


def test_code_runs_with_limits(isolated: bool) -> None:
    tool = PYTHON if isolated else PYTHON_BESIDE
    assert run({tool.name: tool}, Call(INTERPRETER, '{"code": "print(6 * 7)"}')) == "42\n"
    code = "import os; print(sorted(os.environ)); print(os.listdir('.')); open('x', 'w').write('y' * 2**21)"
    ran = sandbox.run_python(code, isolated=isolated)
    assert ran.output.startswith("['HOME', 'LC_CTYPE', 'PATH', 'PYTHONIOENCODING']\n[]\n")
    assert not ran.ok
    assert "MemoryError" in sandbox.run_python("'a' * 2**31", isolated=isolated).output
    assert len(sandbox.run_python("print('a' * 10**6)", isolated=isolated).output) == 4000


def test_code_ends_in_time_with_all_that_it_started(tmp_path: Path, isolated: bool) -> None:
    left = tmp_path / "left"
    later = f"import time; time.sleep(4); open({str(left)!r}, 'w')"
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {later!r}])\nwhile True: pass"
    ran = sandbox.run_python(code, seconds=2, isolated=isolated)
    assert ran.timed_out
    assert ran.output.endswith("stopped after 2 s")
    time.sleep(3)
    assert not left.exists()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import socket; socket.create_connection(('192.0.2.1', 80), 5)", "unreachable"),
        ("import os; print([one for one in os.listdir('/proc') if one.isdigit()])", "['1']\n"),
    ],
)
def test_isolated_code_has_no_network_and_sees_no_other_process(code: str, says: str) -> None:
    if not can_isolate():
        pytest.skip("this kernel lets this user make no namespaces")
    assert says in sandbox.run_python(code).output


def test_isolated_code_starts_few_processes() -> None:
    if not can_isolate():
        pytest.skip("this kernel lets this user make no namespaces")
    if os.geteuid() == 0:
        pytest.skip("the kernel counts no processes of root")
    code = "import os, time\nfor _ in range(100):\n    os.fork() or time.sleep(60)"
    assert "BlockingIOError" in sandbox.run_python(code).output


@pytest.fixture
def no_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without unshare(1)."""
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.isolation.cache_clear()
    yield
    sandbox.isolation.cache_clear()


@pytest.mark.usefixtures("no_namespaces")
def test_no_code_runs_where_nothing_keeps_it_apart_unless_that_is_allowed() -> None:
    refused = "does not run here, since nothing would keep it from the network .*unshare.*give --no-isolation"
    with pytest.raises(UserError, match=refused):
        sandbox.run_python("print(1)")
    call = Call(INTERPRETER, '{"code": "print(6 * 7)"}')
    assert re.match(f"error: .*{refused}", run({PYTHON.name: PYTHON}, call))
    for command in ("chat", "demo"):
        shown = CliRunner().invoke(app, [command, "nothing", "--allow-code"])
        assert shown.exit_code == 65
        assert re.search(refused, shown.output)
    assert run({PYTHON_BESIDE.name: PYTHON_BESIDE}, call) == "42\n"
    assert chosen_tools(None, True, False) == [PYTHON_BESIDE]
    assert chosen_tools(None, False, True) == []


def test_a_model_is_told_of_no_isolation_that_its_code_does_not_have() -> None:
    words = chatml_tokenizer()
    assert "without network" in PYTHON.spec["description"]
    assert "network" not in json.dumps(PYTHON_BESIDE.spec)
    told = prompt(form_of(words), words, [Message("user", "?")], [PYTHON_BESIDE.spec])
    assert "network" not in words.decode(told)
