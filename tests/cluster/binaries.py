"""The programs a test cluster consists of: Go programs built from tests/controlplane, and Debian packages.

Run as a script, it prepares everything ahead of time; the cluster calls the same functions when it starts.
Nothing is built twice: a finished binary is named by a hash of all that goes into it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MODULES = Path(__file__).resolve().parents[1] / "controlplane"
MINIMUM_GO = (1, 26)

# Debian package -> a program (or file) that shows it is there.
NODE_PACKAGES = {
    "runc": "runc",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "iproute2": "ip",
    "util-linux": "nsenter",
}
IMAGE_PACKAGES = {"debootstrap": "debootstrap", "buildah": "buildah", "crun": "crun"}
BASE_PACKAGES = {"openssl": "openssl"}

Log = Callable[[str], None]


@dataclass(frozen=True)
class Program:
    """One binary: which module builds it, and from which package of that module."""

    module: str
    package: str = "."


PROGRAMS = {
    "kubernetes": Program("kubernetes"),
    "minio": Program("minio", "github.com/minio/minio"),
    "pause": Program("pause"),
    "containerd": Program("containerd", "github.com/containerd/containerd/v2/cmd/containerd"),
    "containerd-shim-runc-v2": Program(
        "containerd", "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"
    ),
    "ctr": Program("containerd", "github.com/containerd/containerd/v2/cmd/ctr"),
    "coredns": Program("coredns", "github.com/coredns/coredns"),
    "helm": Program("helm", "helm.sh/helm/v4/cmd/helm"),
    "kwok": Program("kwok", "sigs.k8s.io/kwok/cmd/kwok"),
}
CONTROL_PLANE = ("kubernetes", "minio")
NODE = ("containerd", "containerd-shim-runc-v2", "ctr", "coredns", "pause", "helm")


def cache_dir() -> Path:
    """Where finished binaries, images and Go's build cache live; safe to delete at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "internlm-test"


def which(program: str) -> str | None:
    """Like shutil.which, but also in the folders of system programs, which may not be on a user's PATH."""
    if program.startswith("/"):
        return program if Path(program).exists() else None
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def missing_packages(packages: dict[str, str]) -> list[str]:
    return [package for package, probe in packages.items() if which(probe) is None]


def unavailable(*, nodes: bool = True) -> str | None:
    """Why no cluster can run here, in one sentence, or None. Without nodes much less is needed."""
    if not sys.platform.startswith("linux"):
        return "a test cluster needs Linux"
    if nodes and os.geteuid() != 0:
        return "a test cluster with nodes needs root (namespaces, cgroups, overlay mounts)"
    needed = CONTROL_PLANE + (NODE if nodes else ())
    if any(not binary_path(name).exists() for name in needed):
        reason = _go_problem()
        if reason:
            return reason
    packages = missing_packages(BASE_PACKAGES | (NODE_PACKAGES if nodes else {}))
    if packages and (os.geteuid() != 0 or which("apt-get") is None):
        return f"a test cluster needs these packages: {' '.join(packages)}"
    return None


def _go_problem() -> str | None:
    wanted = ".".join(map(str, MINIMUM_GO))
    if which("go") is None:
        return f"a test cluster is built from source and needs Go {wanted} or newer"
    version = subprocess.run(["go", "env", "GOVERSION"], capture_output=True, text=True, cwd=MODULES).stdout
    found = re.match(r"go(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < MINIMUM_GO:
        return f"a test cluster needs Go {wanted} or newer, not {version.strip() or 'an unknown version'}"
    return None


def install_packages(packages: dict[str, str], log: Log) -> None:
    """Install what is missing with apt-get; does nothing, quickly, where all is there."""
    missing = missing_packages(packages)
    if not missing:
        return
    log(f"installing Debian packages: {' '.join(missing)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        # Another apt-get may run at the same moment, so wait for its lock.
        done = subprocess.run(
            ["apt-get", "--quiet", "-o", "DPkg::Lock::Timeout=300", *command],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"apt-get {command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def binary_path(name: str) -> Path:
    """Where a program is, or will be once it is built."""
    folder = MODULES / PROGRAMS[name].module
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.go"), folder / "go.mod", folder / "go.sum"]):
        if file.exists():
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    digest.update(repr((PROGRAMS[name], _link_flags(PROGRAMS[name].module))).encode())
    return cache_dir() / "bin" / f"{name}-{digest.hexdigest()[:12]}"


def _link_flags(module: str) -> str:
    flags = "-s -w"
    if module == "kubernetes":
        # Without these every program says v0.0.0-master, which kubectl and helm cannot parse.
        text = (MODULES / module / "go.mod").read_text()
        major, minor, patch = re.findall(r"^\tk8s\.io/kubernetes v(\d+)\.(\d+)\.(\d+)$", text, re.M)[0]
        version = {"gitVersion": f"v{major}.{minor}.{patch}", "gitMajor": major, "gitMinor": minor}
        flags += "".join(f" -X k8s.io/component-base/version.{key}={value}" for key, value in version.items())
    return flags


def ensure(names: Iterable[str], log: Log) -> dict[str, Path]:
    """Paths of the programs, building those that are not in the cache yet."""
    paths = {name: binary_path(name) for name in names}
    if all(path.exists() for path in paths.values()):
        return paths
    reason = _go_problem()
    if reason:
        raise RuntimeError(reason)
    by_module: dict[str, list[str]] = {}
    for name in names:
        by_module.setdefault(PROGRAMS[name].module, []).append(name)
    # The big one first: its single-threaded link overlaps with the compilation of the others.
    order = sorted(by_module, key=lambda module: (module != "kubernetes", module))
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda module: _build(module, by_module[module], log), order))
    return paths


def prepare(*, nodes: bool, log: Log) -> None:
    """Install and build all that a cluster needs; quick where that was done before."""
    install_packages(BASE_PACKAGES | (NODE_PACKAGES if nodes else {}), log)
    ensure(CONTROL_PLANE + (NODE if nodes else ()), log)


def _build(module: str, names: Iterable[str], log: Log) -> None:
    # Another process may be building other programs, or these.
    with _lock(cache_dir() / f"{module}.lock"):
        for name in names:
            if not binary_path(name).exists():
                with _heartbeat(name, log):
                    _build_one(name)


def _build_one(name: str) -> None:
    program, path = PROGRAMS[name], binary_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    environment = os.environ | {
        "CGO_ENABLED": "0",
        "GOCACHE": str(cache_dir() / "go-build"),
        "GOFLAGS": "-buildvcs=false -mod=readonly",
        "GOWORK": "off",
    }
    command = ["go", "build", "-trimpath", "-ldflags", _link_flags(program.module), "-o", str(temporary)]
    done = subprocess.run(
        [*command, program.package],
        cwd=MODULES / program.module,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        temporary.unlink(missing_ok=True)
        raise RuntimeError(f"building {name} failed:\n{done.stderr[-4000:]}")
    temporary.rename(path)


@contextmanager
def _heartbeat(name: str, log: Log) -> Iterator[None]:
    """Say that a long build lives: the first one takes minutes and prints nothing itself."""
    started, done = time.monotonic(), threading.Event()

    def beat() -> None:
        while not done.wait(30):
            log(f"{name}: still building after {time.monotonic() - started:.0f} s")

    log(f"{name}: building")
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    log(f"{name}: built in {time.monotonic() - started:.0f} s")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def silent(_: str) -> None:
    """A log function for those who want none."""


def progress() -> Log:
    """A log function that puts the seconds since now in front of each line."""
    started = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - started:6.1f} s] {line}", file=sys.stderr, flush=True)

    return log


def main() -> None:
    parser = argparse.ArgumentParser(description="Build and install what a test cluster needs.")
    parser.add_argument(
        "--control-plane", action="store_true", help="only what runs without nodes and images"
    )
    options = parser.parse_args()
    reason = unavailable(nodes=not options.control_plane)
    if reason:
        sys.exit(reason)
    log = progress()
    packages = BASE_PACKAGES | ({} if options.control_plane else NODE_PACKAGES | IMAGE_PACKAGES)
    install_packages(packages, log)
    for path in ensure(CONTROL_PLANE + (() if options.control_plane else NODE), log).values():
        log(str(path))


if __name__ == "__main__":
    main()
