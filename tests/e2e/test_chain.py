"""From a manifest to trained weights, on a real cluster of two nodes: the whole chain, whole and hurt.

Few jobs with many checks each, since every gang's start costs seconds on a small machine.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest

from cluster.cluster import Cluster
from cluster.controlplane import wait_until
from e2e.chain import START_SECONDS, STEPS, Jobs, Manifest, Row, helm, rows
from internlm_operator.objects import evaluates

# The first test also waits for the images to be built.
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

# One process, on the data that the first job prepared.
ALONE: dict[str, object] = {"nodes": 1, "processesPerNode": 1, "parallel": {}, "data__prepare": None}


def added(archive: Path, scratch: Path) -> list[Path]:
    """Files that an image has on top of its base, which is one layer here."""
    found: list[Path] = []
    with tarfile.open(archive) as image:
        [manifest] = json.load(image.extractfile("manifest.json"))  # type: ignore[arg-type]
        for layer in manifest["Layers"][1:]:
            image.extract(layer, scratch, filter="data")
            with tarfile.open(scratch / layer) as content:
                found += [Path(entry.name) for entry in content if entry.isfile()]
        config = json.load(image.extractfile(manifest["Config"]))  # type: ignore[arg-type]
    assert config["config"]["User"] == "1000:1000"
    return found


def test_the_images_hold_what_each_needs_and_not_torch(built: dict[str, Path], tmp_path: Path) -> None:
    files = {target: added(archive, tmp_path) for target, archive in built.items()}
    packages = {
        target: {path.parent.name.split("-")[0].lower() for path in paths if path.name == "METADATA"}
        for target, paths in files.items()
    }
    assert {"kopf", "kubernetes", "internlm_k8s"} <= packages["operator"]
    assert not packages["operator"] & {"torch", "triton", "numpy", "s3fs", "sentencepiece"}
    # The base has torch (mounted while it was built): pip may not have brought a second one.
    assert {"s3fs", "sentencepiece", "internlm_k8s"} <= packages["trainer"]
    assert not packages["trainer"] & {"torch", "triton", "kopf"}
    assert not [name for name in packages["trainer"] if name.startswith("nvidia")]
    for paths in files.values():
        waste = [
            p for p in paths if p.suffix in (".pyc", ".whl") or {"cache", "source", "tmp"} & set(p.parts[:2])
        ]
        assert waste == []


def test_helm_finds_the_installation_well(cluster: Cluster, operator: str) -> None:
    """From a pod, by the Service's name, with the certificate that the operator made."""
    helm(cluster, "test", "internlm-operator", "--timeout=60s")
    left = cluster.kubectl("get", "pods", f"--namespace={operator}", "--output=name")
    assert "internlm-operator-test" not in left


@dataclass(frozen=True)
class Run:
    """What was seen of a job that nothing happened to."""

    status: Manifest
    pods: list[Manifest]
    events: list[tuple[str, str]]
    printed: list[Row]


@pytest.fixture(scope="module")
def whole(jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run. Its data and checkpoints stay: the hurt run is compared to it."""
    file = tmp_path_factory.mktemp("whole") / "watch"
    with jobs.watched(file):
        jobs.apply(jobs.manifest("whole"))
        jobs.wait("whole", lambda status: status.get("workers", {}).get("ready") == 2, "both workers")
        pods = jobs.objects("pods", "whole")
        status = jobs.wait_phase("whole", "Succeeded", timeout=600)
    return Run(status, pods, jobs.events("whole"), rows(file.read_text(), "whole"))


def test_a_job_trains_on_two_nodes_until_it_has_succeeded(whole: Run, jobs: Jobs) -> None:
    assert {pod["spec"]["nodeName"] for pod in whole.pods} == set(jobs.cluster.nodes)
    for pod in whole.pods:
        assert pod["spec"]["automountServiceAccountToken"] is False
    progress, checkpoint = whole.status["progress"], whole.status["checkpoint"]
    assert progress["step"] == progress["totalSteps"] == checkpoint["step"] == STEPS
    assert checkpoint["uri"].startswith(jobs.url("checkpoints/whole"))
    assert checkpoint["bytes"] > 0
    assert whole.status["restarts"] == 0
    conditions = {condition["type"]: condition["status"] for condition in whole.status["conditions"]}
    assert (conditions["Succeeded"], conditions["Failed"], conditions["Running"]) == (
        "True",
        "False",
        "False",
    )
    reasons = [reason for reason, _ in whole.events]
    assert {"AttemptStarted", "Running", "Succeeded"} <= set(reasons)


def test_kubectl_get_walks_through_the_phases_with_step_and_loss_moving(whole: Run) -> None:
    phases = [phase for phase, _ in groupby(row.phase for row in whole.printed if row.phase)]
    assert phases == ["Pending", "Starting", "Running", "Succeeded"]
    steps = [row.step for row in whole.printed]
    assert steps == sorted(steps)
    assert steps[-1] == STEPS
    assert len(set(steps)) >= 5
    losses = [row.loss for row in whole.printed if row.loss is not None]
    assert losses[-1] < losses[0] - 1


@pytest.mark.usefixtures("whole")
def test_a_hurt_job_ends_with_the_same_weights_to_the_bit(jobs: Jobs, operator: str) -> None:
    """The operator killed and a training process with it, the job suspended and resumed, all in mid-run."""
    cluster, name = jobs.cluster, "hurt"
    jobs.apply(jobs.manifest(name))
    jobs.wait(name, lambda status: status.get("checkpoint", {}).get("step", 0) >= 50, "a checkpoint")

    # Nothing depends on one operator's life: the next one, who leads when the Lease is over, hears of the failure
    # from those who still wait, and has the processes start again in the same pods.
    gang = sorted(pod["metadata"]["uid"] for pod in jobs.objects("pods", name))
    cluster.kubectl("delete", "pods", "--all", f"--namespace={operator}", "--force", "--grace-period=0")
    jobs.kill_a_training_process(name, index=1)
    jobs.wait(name, lambda status: status["restarts"] == 1, "the restart")
    status = jobs.wait(
        name,
        lambda status: status["phase"] == "Running" and status["attempts"][-1].get("endStep", 0) > 0,
        "the second attempt to train",
    )
    failure = status["lastFailure"]
    assert (failure["pod"], failure["attempt"]) == (f"{name}-worker-1", 1)
    assert (failure["signal"], failure["action"]) == (9, "InPlaceRestart")
    assert [attempt["number"] for attempt in status["attempts"]] == [1, 2]
    resumed_from = status["attempts"][1]["startStep"]
    assert resumed_from >= 50
    assert resumed_from % 50 == 0
    assert sorted(pod["metadata"]["uid"] for pod in jobs.objects("pods", name)) == gang
    assert jobs.status(name)["restarts"] == 1

    jobs.kubectl("patch", "ilj", name, "--type=merge", "--patch", '{"spec": {"suspend": true}}')
    suspended = jobs.wait_phase(name, "Suspended")
    assert jobs.objects("pods", name) == []
    assert suspended["restarts"] == 1
    # What was trained before the suspension is not trained again.
    saved = jobs.status(name)["attempts"][-1]["endStep"]
    jobs.kubectl("patch", "ilj", name, "--type=merge", "--patch", '{"spec": {"suspend": false}}')
    status = jobs.wait_phase(name, "Succeeded", timeout=600)
    assert status["attempts"][-1]["startStep"] == saved
    assert status["restarts"] == 1

    assert jobs.weights(name, STEPS) == jobs.weights("whole", STEPS)


@pytest.mark.usefixtures("whole")
def test_checkpoints_are_evaluated_beside_a_job_that_trains_on(jobs: Jobs) -> None:
    """By pods without any token, of which nothing is left when the job is deleted."""
    name, seen = "judged", dict[str, Manifest]()
    question = {"query": "def main():\n    return", "choices": ["0", "None"], "gold": 0}
    jobs.store.pipe(jobs.url("sets/choices/mine.jsonl"), json.dumps(question).encode())
    jobs.store.pipe(jobs.url("held-out/text.txt"), b"def main():\n    return 0\n" * 20)
    asked = {"tasks": ["choices"], "data": jobs.url("sets"), "text": [jobs.url("held-out/*.txt")]}
    # It trains until it is deleted, and keeps each checkpoint for longer than a pod takes to start.
    lasting = {"training__steps": 1_000_000, "checkpoint__everySteps": 100, "checkpoint__keep": 1000}
    jobs.apply(jobs.manifest(name, **ALONE, **lasting, evaluation=asked))

    def evaluated(status: Manifest) -> object:
        seen.update({one["metadata"]["name"]: one for one in jobs.objects("pods", name) if evaluates(one)})
        return status.get("evaluation", {}).get("results")

    results = jobs.wait(name, evaluated, "an evaluation")["evaluation"]["results"]
    step = results[0]["step"]
    assert [(one["task"], one["metric"]) for one in results if one["step"] == step] == [
        ("perplexity", "token_perplexity"),
        ("perplexity", "byte_perplexity"),
        ("perplexity", "bits_per_byte"),
        ("choices", "acc"),
        ("choices", "acc_norm"),
    ]
    entries = map(json.loads, jobs.store.cat(jobs.url(f"checkpoints/{name}/evaluations.jsonl")).splitlines())
    found = {(one["step"], one["task"]): one["metrics"] for one in entries}
    for one in results:
        assert one["value"] == pytest.approx(found[one["step"], one["task"]][one["metric"]], abs=1e-6)
    assert f"{name}-evaluation-{step}-1" in seen
    for pod in seen.values():
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert [volume for volume in pod["spec"]["volumes"] if "projected" in volume] == []
    status = jobs.wait(name, lambda status: status["checkpoint"]["step"] > step, "a checkpoint after it")
    assert (status["phase"], status["restarts"]) == ("Running", 0), jobs.story(name)
    assert "Evaluated" in [reason for reason, _ in jobs.events(name)]

    jobs.kubectl("delete", "ilj", name, "--timeout=60s")
    wait_until(lambda: not jobs.objects("pods", name), "the workers and evaluations to be gone", 90)


@pytest.mark.usefixtures("whole")
def test_deleting_a_job_leaves_nothing_of_it_in_the_cluster(jobs: Jobs) -> None:
    kinds = "pods,services,endpointslices,configmaps,secrets"
    assert {item["kind"] for item in jobs.objects(kinds, "whole")} >= {"Pod", "Service", "ConfigMap"}
    jobs.kubectl("delete", "ilj", "--all", "--timeout=60s")
    for name in ("whole", "hurt"):
        wait_until(lambda: not jobs.objects(kinds, name), f"all objects of {name} to be gone", 60)  # noqa: B023
    assert jobs.weights("whole", STEPS)  # but its checkpoints are the user's


def test_a_mistake_in_the_manifest_is_refused_with_a_sentence_that_teaches(jobs: Jobs) -> None:
    with pytest.raises(RuntimeError) as refused:
        jobs.apply(jobs.manifest("mistake", parallel__zero__optimizer=3))
    assert "spec.parallel.zero.optimizer" in str(refused.value)
    assert "must divide the number of data-parallel ranks" in str(refused.value)
    assert "use one of its divisors, or -1 for all of them" in str(refused.value)
    with pytest.raises(RuntimeError, match="unknown field"):
        jobs.apply(jobs.manifest("mistake", training__stepz=7))


@pytest.mark.usefixtures("whole")
def test_bad_input_fails_the_job_at_once_with_the_trainers_sentence(jobs: Jobs) -> None:
    """On data and checkpoints that the first job made, each time with one thing wrong."""
    cases: dict[str, tuple[dict[str, object], str]] = {
        "no-bucket": ({"checkpoint__path": "s3://no-such-bucket/x"}, "the bucket of s3://no-such-bucket"),
        "no-access": (
            {"template": {"spec": jobs.pod("wrong-credentials")}},
            "the store refuses the credentials",
        ),
        "no-data": ({"data__train": [{"path": jobs.url("nothing")}]}, "nothing does not exist"),
        "other-tokenizer": ({"model__vocabSize": 1024}, "spec.model.vocabSize"),
        "other-job": ({"checkpoint__path": jobs.url("checkpoints/whole")}, "holds checkpoints of the job"),
        "whole": ({"model__layers": 3}, "layers is 2 there and 3 here"),
    }
    jobs.kubectl("delete", "ilj", "--all", "--timeout=60s")
    for name, (changes, _) in cases.items():
        jobs.apply(jobs.manifest(name, **ALONE, **changes))
    for name, (_, sentence) in cases.items():
        wait_until(lambda: jobs.status(name).get("phase") == "Failed", f"{name} to fail", START_SECONDS)  # noqa: B023
        failed = jobs.condition(name, "Failed")
        assert (failed["status"], failed["reason"]) == ("True", "UserError"), jobs.story(name)
        assert sentence in failed["message"], jobs.story(name)
        assert ("UserError", failed["message"]) in jobs.events(name)
        assert jobs.status(name)["restarts"] == 0
        jobs.kubectl("delete", "ilj", name)
