"""The chain's parts, put together once: images by the Dockerfile, the operator by helm, a namespace, data."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import binaries, images
from cluster.cluster import Cluster
from cluster.controlplane import wait_until
from e2e.chain import OPERATOR_NAMESPACE, SECRET, Jobs, helm
from e2e.recovery_times import PASSED

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "team-a"
TAGS = {target: f"localhost/internlm-{target}" for target in ("operator", "trainer")}
# Real text that every machine has: about half a megabyte of Python's standard library.
TEXTS = ("argparse", "ast", "datetime", "decimal", "doctest", "inspect", "pathlib", "tarfile", "typing")


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    passed = item.session.stash.setdefault(PASSED, set())
    if call.when == "call" and call.excinfo is None:
        passed.add(item.nodeid)


@pytest.fixture(scope="session")
def torch_layer() -> Path:
    """torch and what it requires, from the environment that runs the tests."""
    return images.torch_layer(ROOT / ".venv", binaries.progress())


@pytest.fixture(scope="session")
def built(cluster: Cluster, torch_layer: Path) -> dict[str, Path]:
    """Both images, built from the Dockerfile and imported into the nodes."""
    base = {"OPERATOR_BASE": images.BASE_TAG, "TRAINER_BASE": images.BASE_TAG}
    archives = {}
    for target, tag in TAGS.items():
        # torch is there while pip looks what is missing, as it is in the real base image.
        volumes = {torch_layer: images.TORCH_MOUNT} if target == "trainer" else None
        archives[target] = images.build(
            ROOT, target, f"{tag}:e2e", build_args=base, volumes=volumes, log=binaries.progress()
        )
        cluster.import_image(archives[target])
    return archives


@pytest.fixture(scope="module")
def operator(cluster: Cluster, built: dict[str, Path]) -> Iterator[str]:  # noqa: ARG001
    """The operator, installed by helm as a user would, while the module's tests run; gives its namespace."""
    restricted_namespace(cluster, OPERATOR_NAMESPACE)
    values = {
        "image.repository": TAGS["operator"],
        "image.tag": "e2e",
        "image.pullPolicy": "Never",
        "trainer.image.repository": TAGS["trainer"],
        "trainer.image.tag": "e2e",
    }
    settings = [f"--set-string={name}={value}" for name, value in values.items()]
    chart = str(ROOT / "charts" / "internlm-operator")
    try:
        # Another test of this session may have applied the definition by kubectl.
        helm(
            cluster,
            "install",
            "internlm-operator",
            chart,
            *settings,
            "--take-ownership",
            "--timeout=120s",
            "--wait",
        )
    except RuntimeError as error:
        about = cluster.kubectl("describe", "pods", f"--namespace={OPERATOR_NAMESPACE}")
        logs = ("logs", "deployment/internlm-operator", f"--namespace={OPERATOR_NAMESPACE}")
        pytest.fail(f"{error}\n{about}\n{cluster.kubectl(*logs, check=False)}")
    yield OPERATOR_NAMESPACE
    helm(cluster, "uninstall", "internlm-operator", "--wait")
    cluster.kubectl("delete", "namespace", OPERATOR_NAMESPACE, "--wait=false")


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, operator: str, torch_layer: Path) -> Iterator[Jobs]:  # noqa: ARG001
    """A namespace that admits restricted pods only, with credentials, and raw text in the bucket."""
    restricted_namespace(cluster, NAMESPACE)
    credentials = cluster.s3.environment()
    for name, extra in ((SECRET, {}), ("wrong-credentials", {"AWS_SECRET_ACCESS_KEY": "wrong"})):
        metadata = {"name": name, "namespace": NAMESPACE}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata}
        cluster.apply(secret | {"stringData": credentials | extra})
    found = Jobs(cluster, NAMESPACE, cluster.torch_volume(NAMESPACE, torch_layer))
    library = Path(sysconfig.get_path("stdlib"))
    for text in TEXTS:
        found.store.pipe(found.url(f"text/{text}.txt"), (library / f"{text}.py").read_bytes())
    yield found
    cluster.kubectl("delete", "ilj", "--all", f"--namespace={NAMESPACE}", "--timeout=60s")
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def restricted_namespace(cluster: Cluster, name: str) -> None:
    """A namespace in which Pod Security 'restricted' is enforced."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    account = ("get", "serviceaccount", "default", f"--namespace={name}", "--ignore-not-found", "-o=name")
    wait_until(lambda: cluster.kubectl(*account), "the default service account", 30)
