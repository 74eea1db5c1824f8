"""Container images without a registry or a daemon: a Debian base, the project's Dockerfile, PyTorch.

An image is a tar in docker-archive format that `Cluster.import_image` loads into every node.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from cluster import binaries
from cluster.binaries import Log, cache_dir

BASE_TAG = "localhost/internlm-test-base:1"
DEBIAN = "bookworm"
PYTHON = "python3.11"  # the one of this Debian release
DEBIAN_PACKAGES = ("ca-certificates", "python3", "python3-pip", "python3-venv", "python-is-python3")
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
TORCH_MOUNT = "/opt/torch"
# What a pip in a RUN step must share with the pip of this machine to reach the same index.
PIP_SETTINGS = (
    "index-url",
    "extra-index-url",
    "trusted-host",
    "proxy",
    "timeout",
    "default-timeout",
    "retries",
)


def docker_archive(tag: str, files: Mapping[str, Path], config: dict[str, object]) -> bytes:
    """A small image of single files, all executable."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name, path in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = path.stat().st_size, 0o755
            with path.open("rb") as file:
                tar.addfile(entry, file)
    archive = io.BytesIO()
    _write_archive(archive, tag, layer, config)
    return archive.getvalue()


def _write_archive(target: io.IOBase, tag: str, layer: io.IOBase, config: dict[str, object]) -> None:
    layer.seek(0)
    digest = hashlib.file_digest(layer, "sha256").hexdigest()  # type: ignore[arg-type]
    size = layer.seek(0, io.SEEK_END)
    layer.seek(0)
    image = {
        "architecture": "arm64" if os.uname().machine == "aarch64" else "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [tag], "Layers": ["layer.tar"]}]
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, content in (("manifest.json", manifest), ("config.json", image)):
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        entry = tarfile.TarInfo("layer.tar")
        entry.size = size
        tar.addfile(entry, layer)


def base_image(log: Log = print) -> Path:
    """Debian with Python, pip and this machine's certificates, as a docker-archive tagged BASE_TAG.

    Behaves as the official Python images do: `python` and `pip` are there and pip may install system-wide.
    Packages in TORCH_MOUNT, if anything is mounted there, count as installed.
    """
    pip_config = "[global]\n" + "".join(f"{key} = {value}\n" for key, value in _pip_settings().items())
    certificates = CA_BUNDLE.read_bytes() if CA_BUNDLE.exists() else b""
    recipe = hashlib.sha256(repr((DEBIAN, DEBIAN_PACKAGES, pip_config, certificates, 1)).encode()).hexdigest()
    path = cache_dir() / "images" / f"base-{recipe[:12]}.tar"
    if path.exists():
        return path
    binaries.install_packages(binaries.IMAGE_PACKAGES, log)
    path.parent.mkdir(parents=True, exist_ok=True)
    log("making the Debian base image")
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        root = Path(temporary, "root")
        # In a mount namespace of its own, as debootstrap leaves /proc mounted when it is interrupted.
        _run(
            *("unshare", "--mount", "--propagation", "private", "debootstrap", "--variant=minbase"),
            *(f"--include={','.join(DEBIAN_PACKAGES)}", DEBIAN, str(root)),
        )
        if certificates:
            (root / CA_BUNDLE.relative_to("/")).write_bytes(certificates)
        (root / "etc" / "pip.conf").write_text(pip_config)
        for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            marker.unlink()
        site = root / "usr/local/lib" / PYTHON / "dist-packages"
        site.mkdir(parents=True, exist_ok=True)
        (site / "torch-layer.pth").write_text(TORCH_MOUNT + "\n")
        (root / TORCH_MOUNT.lstrip("/")).mkdir()
        for waste in (
            "var/cache/apt",
            "var/lib/apt/lists",
            "usr/share/doc",
            "usr/share/locale",
            "usr/share/man",
        ):
            shutil.rmtree(root / waste, ignore_errors=True)
        _run(
            "tar",
            "--create",
            "--file",
            f"{temporary}/layer.tar",
            "--directory",
            str(root),
            "--numeric-owner",
            ".",
        )
        config = {
            "Env": ["PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"],
            "Cmd": ["python"],
        }
        with (
            Path(temporary, "layer.tar").open("rb") as layer,
            Path(temporary, "image.tar").open("wb") as image,
        ):
            _write_archive(image, BASE_TAG, layer, dict(config))
        Path(temporary, "image.tar").rename(path)
    return path


def _pip_settings() -> dict[str, str]:
    """This machine's pip settings that a RUN step needs too, from its files and its environment."""
    settings = {"cert": str(CA_BUNDLE)} if CA_BUNDLE.exists() else {}
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
    ).stdout
    for line in listed.splitlines():
        found = re.match(r"(?:[\w:]+)\.([\w-]+)=(.*)$", line)
        if found and found[1] in PIP_SETTINGS:
            settings[found[1]] = str(ast.literal_eval(found[2])).replace("\n", " ")
    return settings


def build(
    context: Path,
    target: str,
    tag: str,
    *,
    dockerfile: Path | None = None,
    build_args: Mapping[str, str] | None = None,
    volumes: Mapping[Path, str] | None = None,
    output: Path | None = None,
    log: Log = print,
) -> Path:
    """Build one target of a Dockerfile (by default the context's own) and return it as a docker-archive.

    Args:
        build_args: the Dockerfile's ARGs; the base image is there under BASE_TAG.
        volumes: folders to mount read-only in RUN steps, and where.
        output: the tar to write; by default in the cache, replaced by the next build of the same tag.
    """
    binaries.install_packages(binaries.IMAGE_PACKAGES, log)
    base = base_image(log)
    output = output or cache_dir() / "images" / (re.sub(r"\W+", "-", tag) + ".tar")
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = cache_dir() / "buildah"  # where buildah keeps what RUN --mount=type=cache asks for
    scratch.mkdir(parents=True, exist_ok=True)
    mounts = [f"--volume={folder}:{place}:ro" for folder, place in (volumes or {}).items()]
    arguments = [f"--build-arg={key}={value}" for key, value in (build_args or {}).items()]
    with tempfile.TemporaryDirectory(dir=output.parent) as temporary:
        buildah = f"buildah --root {temporary}/storage --runroot {temporary}/run --storage-driver overlay"
        result = Path(temporary, "image.tar")
        # buildah keeps its storage mounted, so all of it runs in one mount namespace that ends with it.
        script = (
            f'set -e; export TMPDIR={scratch}; {buildah} pull --quiet docker-archive:"$1"; '
            f"tag=$2; result=$3; shift 3; "
            f'{buildah} bud --isolation chroot --network host --pull-never --tag "$tag" "$@"; '
            f'{buildah} push --quiet "$tag" "docker-archive:$result:$tag"'
        )
        log(f"building {tag}")
        _run(
            *("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "build"),
            *(str(base), tag, str(result)),
            *("--target", target, "--file", str(dockerfile or context / "Dockerfile"), *mounts, *arguments),
            str(context),
        )
        result.rename(output)
    return output


def torch_layer(venv: Path, log: Log = print) -> Path:
    """A folder in the cache with torch and all that it requires, as hard links into this virtual environment.

    Test pods mount it read-only at TORCH_MOUNT: an image with PyTorch's 5 GB in it would be copied three
    times before a pod starts.
    """
    site = next(iter(sorted(venv.glob("lib/python3.*/site-packages"))), None)
    if site is None or site.parent.name != PYTHON:
        raise RuntimeError(f"{venv} is no virtual environment of {PYTHON}, which the test images run")
    found = {_canonical(item.name): item for item in metadata.distributions(path=[str(site)])}
    if "torch" not in found:
        raise RuntimeError(f"torch is not installed in {venv}")
    closure: dict[str, metadata.Distribution] = {}
    queue = [("torch", "")]
    while queue:
        name, extras = queue.pop()
        # What is required on other platforms only is not installed here, so markers need no evaluation.
        if name in found and (name not in closure or extras):
            closure[name] = found[name]
            for requirement in found[name].requires or []:
                wanted = re.search(r"extra *== *['\"]([^'\"]+)", requirement)
                if wanted is None or wanted[1] in extras.split(","):
                    parts = re.match(r"([\w.-]+) *(?:\[(.*?)\])?", requirement)
                    if parts:
                        queue.append((_canonical(parts[1]), parts[2] or ""))
    versions = repr(sorted((name, item.version) for name, item in closure.items()))
    digest = hashlib.sha256(versions.encode()).hexdigest()[:8]
    layer = cache_dir() / f"torch-{closure['torch'].version}-{digest}"
    if layer.exists():
        return layer
    log(f"collecting torch {closure['torch'].version} and {len(closure) - 1} packages that it requires")
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as temporary:
        target = Path(temporary, "layer")
        for item in closure.values():
            for file in item.files or []:
                source = site / file
                if ".." not in file.parts and source.is_file():
                    _link(source, target / file)
        target.chmod(0o755)
        target.rename(layer)
    # 5 GB each; the one before may be that of another checkout, whose tests run.
    for old in sorted(cache_dir().glob("torch-*"), key=lambda folder: folder.stat().st_ctime)[:-2]:
        shutil.rmtree(old)
    return layer


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copy2(source, target)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _run(*command: str) -> None:
    environment = os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]} failed:\n{done.stdout[-6000:]}")
