"""The job channel as pods and replicas meet it, on a real API server."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client
from operator_process import NAMESPACE, Here
from operator_world import make_report

from cluster import binaries
from internlm_operator import api, channel, kubeflow, objects

pytestmark = pytest.mark.cluster

SDK = ("kubeflow==0.5.0", "kubeflow-trainer-api==2.3.0", "kubeflow-katib-api==0.19.0")
# The pod's part of DNS and of the Service: its name and port lead to the operator on this machine.
RESOLVER = """
import os, socket
real = socket.getaddrinfo
def resolve(host, port, *rest, **options):
    if str(host).endswith(".svc"):
        host, port = "127.0.0.1", int(os.environ["CHANNEL_PORT"])
    return real(host, port, *rest, **options)
socket.getaddrinfo = resolve
"""
WITH_SDK = """
from kubeflow.trainer import update_trainjob_status
assert update_trainjob_status(
    progress_percent=25, estimated_remaining_seconds=90, metrics={"loss": 2.5, "accuracy": 0.4, "stage": "warm"}
)
"""
WITH_TRANSFORMERS = """
from transformers import TrainerControl, TrainerState
from transformers.integrations import KubeflowCallback, get_available_reporting_integrations
assert "kubeflow" in get_available_reporting_integrations()
callback, control = KubeflowCallback(), TrainerControl()
callback._MIN_UPDATE_INTERVAL = 0.0
state = TrainerState(max_steps=64, global_step=0, is_world_process_zero=True, is_local_process_zero=True)
callback.on_train_begin(None, state, control)
for state.global_step in (1, 2, 48):
    callback.on_log(None, state, control, logs={"loss": 3.0 / state.global_step, "eval_loss": 1.5})
    callback.on_step_end(None, state, control)
callback.on_train_end(None, state, control)
"""


@pytest.fixture(scope="session")
def kubeflow_sdk() -> Path:
    """The Kubeflow SDK as PyPI has it. Not in our environment: it asks for an older `kubernetes`, which its
    reports do not use."""
    folder = binaries.cache_dir() / "kubeflow-0.5.0"
    if not folder.exists():
        draft = folder.with_suffix(f".{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={draft}", *SDK]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"the Kubeflow SDK cannot be installed: {done.stderr[-500:]}")
        draft.replace(folder)
    return folder


def run_in_pod(here: Here, name: str, pod: str, folder: Path, code: str, *paths: Path) -> None:
    """Run Python with the pod's own environment and files, as far as they concern reports."""
    [container] = here.core.read_namespaced_pod(pod, NAMESPACE).spec.containers
    pods = {e.name: e.value for e in container.env if e.name.startswith("KUBEFLOW_")}
    assert len(pods) == 3
    contents = {
        "KUBEFLOW_TRAINER_SERVER_CA_CERT": here.core.read_namespaced_config_map(
            f"{name}-config", NAMESPACE
        ).data["ca.crt"],
        "KUBEFLOW_TRAINER_SERVER_TOKEN": here.token(pod, objects.audience(NAMESPACE, name)),
    }
    for variable, content in contents.items():
        assert any(pods[variable].startswith(f"{m.mount_path}/") for m in container.volume_mounts)
        file = folder / variable
        file.write_text(content)
        pods[variable] = str(file)
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= pods | {"CHANNEL_PORT": str(here.operator.port), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [*paths, *sys.path]))
    done = subprocess.run(
        [sys.executable, "-c", RESOLVER + code], env=environment, capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr


def test_the_kubeflow_sdk_reports_from_a_pod_as_it_is(here: Here, tmp_path: Path, kubeflow_sdk: Path) -> None:
    pods = here.start("sdk")
    run_in_pod(here, "sdk", pods[1], tmp_path, WITH_SDK, kubeflow_sdk)
    here.wait(lambda: here.status("sdk").get("progressText") == "25/100", "progress", "sdk")
    progress = here.status("sdk")["progress"]
    assert (progress["loss"], progress["etaSeconds"]) == (2.5, 90)
    here.delete("sdk")


def test_transformers_reports_from_a_pod_as_it_is(here: Here, tmp_path: Path) -> None:
    pods = here.start("hf")
    run_in_pod(here, "hf", pods[0], tmp_path, WITH_TRANSFORMERS)
    here.wait(lambda: here.status("hf").get("progressText") == "64/64", "the end", "hf")
    progress = here.status("hf")["progress"]
    assert (progress["loss"], progress["validationLoss"]) == (0.0625, 1.5)
    here.delete("hf")


def test_rubbish_from_a_pod_with_a_good_token_is_refused_and_too_much_of_it_too(here: Here) -> None:
    pod = here.start("fuzz")[0]
    token = here.token(pod, objects.audience(NAMESPACE, "fuzz"))
    random.seed(7)
    good = make_report(step=1).model_dump_json(by_alias=True).encode()
    metrics = [{"name": "loss", "value": "2.5"}, {"name": "current_step", "value": "1"}]
    kubeflows = json.dumps({"trainerStatus": {"progressPercentage": 1, "metrics": metrics}}).encode()
    bodies = {
        objects.report_path(NAMESPACE, "fuzz"): good,
        kubeflow.status_path(NAMESPACE, "fuzz"): kubeflows,
    }
    codes: dict[int, int] = {}
    for path in [*bodies] * (int(channel.POD_BURST + 100) // 2):
        body = bytearray(bodies[path])
        for _ in range(random.randrange(1, 20)):
            body[random.randrange(len(body))] = random.randrange(256)
        code, answer = here.send("fuzz", bytes(body), token, path=path)
        assert code == 200 or answer["message"]
        codes[code] = codes.get(code, 0) + 1
    assert codes.keys() <= {200, 400, 409, 429}, codes
    assert codes[400] > 50, codes
    time.sleep(1.5)
    assert here.send("fuzz", good, token)[0] == 200
    assert len(json.dumps(here.status("fuzz"))) < 4096
    here.delete("fuzz")


def test_agents_hear_of_a_new_attempt_for_their_pods_and_of_the_end(here: Here) -> None:
    pods = here.start("stay")
    path = objects.agent_path(NAMESPACE, "stay")
    tokens = [here.token(pod, objects.audience(NAMESPACE, "stay")) for pod in pods]

    def tell(
        worker: int, attempt: int, sender: int | None = None, **ended: Any
    ) -> tuple[int, dict[str, Any]]:
        content = {"worker": worker, "gang": 1, "attempt": attempt, "ended": ended or None}
        token = tokens[worker if sender is None else sender]
        return here.send("stay", json.dumps(content).encode(), token, path=path)

    for worker in range(2):
        assert tell(worker, 1) == (200, {"attempt": 1, "finished": False})
    assert tell(0, 1, sender=1)[0] == 403
    hung = json.dumps(
        {"reason": "Hung", "message": "rank 1 hangs", "rank": 1, "evidence": "rank 1: in x (y:1)"}
    )
    assert tell(0, 1, exitCode=70, message=hung)[0] == 200
    here.wait(lambda: tell(1, 1) == (200, {"attempt": 2, "finished": False}), "a new attempt", "stay")
    failure = here.status("stay")["lastFailure"]
    assert (failure["reason"], failure["rank"], failure["action"]) == ("Hung", 1, "InPlaceRestart")
    assert "rank 1: in x (y:1)" in failure["evidence"]
    assert here.status("stay")["phase"] == "Restarting"
    for worker in range(2):
        tell(worker, 2)
    here.wait_phase("stay", "Running")
    assert here.report("stay", pods[0], attempt=2, step=3) == (200, {})
    assert [pod.metadata.labels[objects.ATTEMPT_LABEL] for pod in here.pods("stay").values()] == ["1", "1"]
    tell(1, 2, exitCode=65, message=json.dumps({"reason": "UserError", "message": "no"}))
    here.wait(lambda: tell(0, 2)[1].get("finished"), "the end", "stay")
    here.delete("stay")


def test_a_checkpoint_is_asked_for_until_it_is_there(here: Here) -> None:
    pod = here.start("save")[0]
    annotation = {objects.CHECKPOINT_ANNOTATION: "before-the-upgrade"}
    here.custom.patch_namespaced_custom_object(
        api.GROUP, api.VERSION, NAMESPACE, api.PLURAL, "save", {"metadata": {"annotations": annotation}}
    )
    asked = (200, {"checkpoint": "before-the-upgrade"})
    here.wait(lambda: here.report("save", pod, step=3) == asked, "the request", "save")
    done = "before-the-upgrade"
    here.wait(lambda: here.report("save", pod, step=5, checkpointRequest=done) == (200, {}), "peace", "save")
    assert here.status("save")["checkpointRequest"] == done
    here.delete("save")


def test_who_only_looks_like_a_worker_is_refused(here: Here) -> None:
    """A pod that someone made in the job's namespace, with the job's label and a token for its audience."""
    here.start("true")
    labels = {objects.JOB_LABEL: "true", objects.ATTEMPT_LABEL: "1"}
    restricted: dict[str, Any] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    pod = {
        "metadata": {"name": "false", "labels": labels},
        "spec": {
            "schedulerName": "nobody",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [{"name": "trainer", "image": "x", "securityContext": restricted}],
        },
    }
    here.core.create_namespaced_pod(NAMESPACE, pod)
    body = make_report(step=1).model_dump_json(by_alias=True).encode()
    code, answer = here.send("true", body, here.token("false", objects.audience(NAMESPACE, "true")))
    assert (code, answer["message"]) == (403, "pod false is none of this job's workers")
    here.core.delete_namespaced_pod("false", NAMESPACE, body=client.V1DeleteOptions(grace_period_seconds=0))
    here.delete("true")


def test_who_connects_and_says_nothing_holds_nobody_up(here: Here) -> None:
    pod = here.start("slow")[0]
    silent = [socket.create_connection(("127.0.0.1", here.operator.port)) for _ in range(200)]
    try:
        assert here.report("slow", pod, step=3) == (200, {})
    finally:
        for connection in silent:
            connection.close()
    here.delete("slow")
