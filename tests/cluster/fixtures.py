"""pytest fixtures with a real Kubernetes; in tests/conftest.py: `pytest_plugins = ["cluster.fixtures"]`.

`control_plane` is enough for whatever does not run pods and starts in seconds; `cluster` has two nodes. A
session whose tests use both gets one cluster for both. Skips, with the reason, where no cluster can run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path

import pytest

from cluster import binaries
from cluster.cluster import Cluster
from cluster.state import clusters_dir, start_time

SINGLE_PROGRAMS = {"minio_server": "minio", "helm": "helm"}
"""Fixtures that run one program without a cluster."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster with two nodes of two GPUs each. Tests share it: use a namespace of your own."""
    reason = binaries.unavailable()
    if reason:
        pytest.skip(reason)
    if name := os.environ.get("INTERNLM_TEST_CLUSTER"):
        known = Cluster.attach(name)
        if known is None or len(known.nodes) != 2:
            pytest.fail(f"INTERNLM_TEST_CLUSTER: there is no cluster {name!r} of two nodes (make cluster)")
        yield known
        return
    with running(nodes=2) as started:
        yield started


@pytest.fixture(scope="session")
def control_plane() -> Iterator[Cluster]:
    """An API server with its controllers, without nodes, for tests that play the kubelet.

    Not `cluster`, whose garbage collector deletes pods on nodes that it does not know.
    """
    reason = binaries.unavailable(nodes=False)
    if reason:
        pytest.skip(reason)
    with running(nodes=0, name="plane") as started:
        yield started


@pytest.fixture(scope="session")
def helm() -> str:
    """A helm: the one on the PATH, or the test cluster's."""
    found = shutil.which("helm")
    if found is None:
        reason = binaries.unavailable(nodes=False)
        if reason:
            pytest.skip(f"no helm on the PATH, and none can be built: {reason}")
        found = str(binaries.ensure(["helm"], binaries.progress())["helm"])
    return found


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Build what a test runs before its time starts to count: on a new machine that takes longer than a test may."""
    used = set(getattr(item, "fixturenames", ()))
    if hasattr(item, "callspec") and "s3" in map(str, item.callspec.params.values()):
        used.add("minio_server")  # the fixture of that parameter asks for it
    capture = item.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        if used & {"cluster", "control_plane"}:
            _prepare(nodes="cluster" in _all_fixtures(item.session))
        elif names := [program for fixture, program in SINGLE_PROGRAMS.items() if fixture in used]:
            with suppress(RuntimeError):  # the fixture says it
                binaries.ensure(names, binaries.progress())
    return (yield)


@cache
def _prepare(*, nodes: bool) -> None:
    nodes = nodes and binaries.unavailable() is None
    if binaries.unavailable(nodes=nodes) is None:
        binaries.prepare(nodes=nodes, log=binaries.progress())


def _all_fixtures(session: pytest.Session) -> set[str]:
    return {name for item in session.items for name in getattr(item, "fixturenames", ())}


@contextmanager
def running(nodes: int, name: str = "pytest") -> Iterator[Cluster]:
    """A cluster of this test session's own, beside any that a developer has running."""
    remove_orphans(name)
    started = Cluster.up(nodes=nodes, name=f"{name}-{os.getpid()}", log=binaries.progress())
    try:
        yield started
    finally:
        logs = os.environ.get("INTERNLM_TEST_CLUSTER_LOGS")
        started.down(keep_logs=Path(logs) if logs else None)


def remove_orphans(name: str) -> None:
    """Take down clusters of earlier test sessions that were killed before they could do so themselves."""
    for folder in clusters_dir().glob(f"{name}-*"):
        owner = folder.name.removeprefix(f"{name}-")
        if owner.isdigit() and start_time(int(owner)) is None and (orphan := Cluster.attach(root=folder)):
            orphan.down()
