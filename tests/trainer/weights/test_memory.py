"""How much of a model an export has in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def test_an_export_takes_little_memory_however_large_the_model(tmp_path: Path) -> None:
    command = [sys.executable, Path(__file__).with_name("large.py"), tmp_path]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    read, taken = json.loads(done.stdout)
    assert read > 2_500_000_000
    assert taken < 800_000_000
