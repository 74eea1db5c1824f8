"""pytest fixtures with a real Kubernetes: load them with `pytest_plugins = ["cluster.fixtures"]` in tests/conftest.py.

`control_plane` is enough for whatever does not run pods and starts in seconds; `cluster` has two nodes. A session
whose tests use both gets one cluster for both. Skips, with the reason, where no cluster can run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import binaries
from cluster.cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster with two nodes of two GPUs each. Tests share it: use a namespace of your own."""
    reason = binaries.unavailable()
    if reason:
        pytest.skip(reason)
    with running(nodes=2) as started:
        yield started


@pytest.fixture(scope="session")
def control_plane(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """An API server with its controllers, maybe without nodes. Tests share it: use a namespace of your own."""
    others = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    if "cluster" in others and binaries.unavailable() is None:
        yield request.getfixturevalue("cluster")
        return
    reason = binaries.unavailable(nodes=False)
    if reason:
        pytest.skip(reason)
    with running(nodes=0) as started:
        yield started


@contextmanager
def running(nodes: int) -> Iterator[Cluster]:
    """A cluster of this test session's own, beside any that a developer has running."""
    log = binaries.progress()
    started = Cluster.up(nodes=nodes, name=f"pytest-{os.getpid()}", log=log)
    try:
        yield started
    finally:
        logs = os.environ.get("INTERNLM_TEST_CLUSTER_LOGS")
        started.down(keep_logs=Path(logs) if logs else None)
