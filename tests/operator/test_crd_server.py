"""The laptop and a real API server give the same verdict on a manifest, in the same words."""

from __future__ import annotations

import copy
import functools
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st
from kubernetes import client, config

from cluster.cluster import Cluster
from cluster.controlplane import wait_until
from internlm_operator import api, crd
from internlm_operator.manifest import JobError, parse_job

pytestmark = pytest.mark.cluster

Manifest = dict[str, Any]
DELETE = object()

GOOD: Manifest = {
    "apiVersion": api.API_VERSION,
    "kind": api.KIND,
    "metadata": {"name": "job"},
    "spec": {
        "nodes": 2,
        "processesPerNode": 2,
        "model": {"layers": 2, "hiddenSize": 64, "heads": 4, "vocabSize": 512, "seqLen": 128},
        "data": {"tokenizer": "s3://b/t.model", "train": [{"path": "s3://b/train"}]},
        "training": {"steps": 100, "globalBatchTokens": "4Ki", "microBatchSize": 2},
        "checkpoint": {"path": "s3://b/checkpoints"},
    },
}


def merge(manifest: Manifest, path: str, value: object) -> Manifest:
    """The manifest with one field set or, by DELETE, left out: `model__seqLen` is spec.model.seqLen."""
    manifest = copy.deepcopy(manifest)
    *parents, name = path.split("__")
    place = manifest if parents[:1] == ["metadata"] else manifest["spec"]
    for parent in parents:
        place = place.setdefault(parent, {})
    if value is DELETE:
        place.pop(name, None)
    else:
        place[name] = value
    return manifest


def edited(**changes: object) -> Manifest:
    """GOOD with these fields changed."""
    return functools.reduce(lambda manifest, change: merge(manifest, *change), changes.items(), GOOD)


@pytest.fixture(scope="module")
def server(control_plane: Cluster) -> Iterator[client.CustomObjectsApi]:
    """The API server with the definition as committed, and a namespace of these tests' own."""
    control_plane.kubectl("apply", "--filename=manifests/crd.yaml")
    control_plane.kubectl("wait", "--for=condition=Established", f"crd/{crd.CRD_NAME}", "--timeout=30s")
    control_plane.kubectl("create", "namespace", "crd-test")
    # The server serves a new definition a moment after it says that it does.
    wait_until(
        lambda: "internlmjobs" in control_plane.kubectl("api-resources", "--output=name"),
        "the new resource",
        30,
    )
    with config.new_client_from_config(str(control_plane.kubeconfig)) as connection:
        yield client.CustomObjectsApi(connection)
    control_plane.kubectl("delete", "namespace", "crd-test", "--wait=false")


def laptop(manifest: Manifest) -> list[str]:
    """The laptop's sentences about a manifest; none if it is good."""
    try:
        parse_job(copy.deepcopy(manifest))
    except JobError as error:
        return error.sentences
    return []


def create(server: client.CustomObjectsApi, manifest: Manifest) -> list[str]:
    """The API server's sentences about a new object; none if it is good. Nothing is stored."""
    try:
        server.create_namespaced_custom_object(
            api.GROUP, api.VERSION, "crd-test", api.PLURAL, manifest, dry_run="All", field_validation="Strict"
        )
    except client.ApiException as error:
        status = json.loads(error.body)
        causes = status.get("details", {}).get("causes", [])
        return [f"{c.get('field')}: {c['message']}" for c in causes] or [status["message"]]
    return []


def words(sentence: str) -> tuple[str, str]:
    """(path, text) of a sentence of the laptop, without what is between them: the value in question."""
    path, _, text = sentence.partition(": ")
    return path, re.sub(r"^Invalid value: .*: (?=(should|must) )", "", text)


def said(sentence: str, answers: list[str]) -> bool:
    """Whether the API server's answers have this sentence of the laptop, about the same field."""
    path, text = words(sentence)
    if text.startswith("unknown field"):
        return any(f'unknown field "{path}"' in answer for answer in answers)
    if path == "metadata.name":  # which the server's rules cannot point at
        return any(sentence in answer for answer in answers)
    return any(answer.startswith(f"{path}: ") and text in answer for answer in answers)


# What is wrong, and the sentence that the user reads on the laptop and on the cluster.
QUANTITY = "must be a whole number of tokens of at least 1, or one with a unit"
BAD = {
    "a field that does not exist": (edited(model__seqlen=128), "spec.model.seqlen: unknown field"),
    "a field beside the spec": (GOOD | {"nodes": 2}, "nodes: unknown field"),
    "no spec": ({k: v for k, v in GOOD.items() if k != "spec"}, "spec: Required value"),
    "no data": (edited(data=DELETE), "spec.data: Required value"),
    "an empty list of data": (edited(data__train=[]), "spec.data.train: Invalid value: "),
    "a wrong type": (edited(nodes="two"), "spec.nodes: Invalid value: "),
    "text where a number must be": (edited(training__optimizer__lr="fast"), "spec.training.optimizer.lr: "),
    "a number out of bounds": (edited(nodes=0), "spec.nodes: Invalid value: 0: "),
    "a bound that itself is refused": (edited(training__optimizer__lr=0), "spec.training.optimizer.lr: "),
    "a word that is none of the options": (
        edited(training__precision="fp9"),
        'spec.training.precision: Unsupported value: "fp9": supported values: "bf16", "fp8", "fp16", "fp32"',
    ),
    "a unit that does not exist": (edited(training__globalBatchTokens="4Qi"), QUANTITY),
    "a unit of bytes": (edited(training__globalBatchTokens="4KiB"), QUANTITY),
    "part of a token": (edited(training={"tokens": "0.0001k"}), QUANTITY),
    "more tokens than an int64 holds": (edited(training={"tokens": "10000000T"}), QUANTITY),
    "a quantity without end": (edited(training={"tokens": "1" * 17}), "spec.training.tokens: Too long: "),
    "neither steps nor tokens": (edited(training__steps=DELETE), "spec.training: give exactly one of"),
    "both steps and tokens": (edited(training__tokens="1M"), "spec.training: give exactly one of"),
    "a preset and a shape": (
        edited(model__preset="internlm-7b"),
        "spec.model: give either preset, or layers",
    ),
    "half a shape": (edited(model__layers=DELETE), "spec.model: give either preset, or layers"),
    "heads of an odd width": (
        edited(model__hiddenSize=68),
        "spec.model.hiddenSize: must be an even multiple of",
    ),
    "key heads that do not divide the heads": (
        edited(model__kvHeads=3),
        "spec.model.kvHeads: must divide heads",
    ),
    "a batch that the processes do not divide": (
        edited(training__globalBatchTokens=4000),
        "spec.training.globalBatchTokens: must be a multiple of the tokens that all processes handle at once",
    ),
    "moments too coarse for what they are to hold": (
        edited(training__optimizer={"stateType": "bf16", "betas": [0.9, 0.999]}),
        "spec.training.optimizer.stateType: bf16 needs a betas[1] of at most 0.99",
    ),
    "a batch that starts as large as it gets": (
        edited(training__batchRampUp={"startTokens": "4Ki", "incrementTokens": "1Ki", "overTokens": "1M"}),
        "spec.training.batchRampUp.startTokens: must be less than training.globalBatchTokens",
    ),
    "a batch that grows past its size": (
        edited(training__batchRampUp={"startTokens": "1Ki", "incrementTokens": "2Ki", "overTokens": "1M"}),
        "spec.training.batchRampUp.incrementTokens: must be a multiple of the tokens",
    ),
    "a row shorter than a sequence": (
        edited(training={"steps": 1, "microBatchTokens": 64}),
        "spec.training.microBatchTokens: a row must hold at least one whole sequence",
    ),
    "two sizes of a micro-batch": (
        edited(training__microBatchTokens=256),
        "spec.training.microBatchSize: give microBatchSize (sequences) or microBatchTokens, not both",
    ),
    "a warm-up longer than the training": (
        edited(training__schedule__warmupSteps=101),
        "spec.training.schedule.warmupSteps: must not exceed training.steps",
    ),
    "a learning rate that rises": (
        edited(training__schedule__minLr=0.5),
        "spec.training.schedule.minLr: must not",
    ),
    "an evaluation of nothing": (
        edited(evaluation={"data": "s3://sets"}),
        "spec.evaluation: give tasks, text, or both",
    ),
    "tasks without their files": (
        edited(evaluation={"tasks": ["mmlu"]}),
        "spec.evaluation.data: must be given with tasks",
    ),
    "a zero degree that does not divide the ranks": (
        edited(parallel__zero__optimizer=3),
        "spec.parallel.zero.optimizer: must divide the number of data-parallel ranks (nodes x processes",
    ),
    "a zero degree of none": (
        edited(parallel__zero__optimizer=0),
        "spec.parallel.zero.optimizer: must divide the",
    ),
    "gradients sharded wider than optimizer states": (
        edited(parallel__zero__gradients=4, parallel__zero__optimizer=2),
        "spec.parallel.zero.gradients: must divide parallel.zero.optimizer",
    ),
    "parameters sharded wider than gradients": (
        edited(parallel__zero__parameters=-1),
        "spec.parallel.zero.parameters: must divide parallel.zero.gradients",
    ),
    "a share of the blocks that is none": (
        edited(parallel__recompute="100%"),
        "spec.parallel.recompute: must be none, selective, full, or a share of the blocks",
    ),
    "a word that YAML takes for a boolean": (edited(parallel__compile=True), "spec.parallel.compile: "),
    "text and two folders to prepare": (
        edited(data__prepare={"text": ["/a"]}, data__train=[{"path": "/b"}, {"path": "/c"}]),
        "spec.data.prepare: writes one training folder",
    ),
    "a manager without a domain": (edited(managedBy="kueue"), "spec.managedBy: must be a domain and a name"),
    "a size that is none": (edited(sharedMemory="64GB"), "spec.sharedMemory: must be a number of bytes"),
    "a size without end": (edited(sharedMemory="1" * 17), "spec.sharedMemory: Too long: "),
    "GPUs of no plugin": (edited(gpuResourceName="gpu"), "spec.gpuResourceName: must be the name of an ext"),
    "adapters of no plugin": (edited(network__rdma={}), "spec.network.rdma.resourceName: Required value"),
    "a priority that cannot be": (
        edited(scheduling__priorityClassName="High"),
        "spec.scheduling.priorityClassName: must be the name of an object",
    ),
    "a version that is no tag": (edited(runtimeVersion="1.0 beta"), "spec.runtimeVersion: must be a tag"),
    "two images": (edited(image="mine:1", runtimeVersion="1.0.0"), "spec.runtimeVersion: give image, or"),
    "a policy that does not exist": (
        edited(cleanPodPolicy="Some"),
        'spec.cleanPodPolicy: Unsupported value: "Some": supported values: "All", "None", "Running"',
    ),
    "a deadline in the past": (edited(activeDeadlineSeconds=0), "spec.activeDeadlineSeconds: Invalid value"),
    "a name too long for the pods": (
        edited(metadata__name="a" * 51),
        "metadata.name: must have at most 50 charac",
    ),
    "a name that a host cannot have": (
        edited(metadata__name="a.b"),
        "metadata.name: must be lower-case letters",
    ),
}
FINE = {
    "the least": edited(nodes=DELETE, processesPerNode=DELETE, training={"steps": 1}),
    "a preset": edited(model={"preset": "internlm-20b"}, training={"tokens": "200B"}),
    "moments in bf16": edited(training__optimizer={"stateType": "bf16", "betas": [0, 0.99]}),
    "a batch that grows": edited(
        training__batchRampUp={"startTokens": "1Ki", "incrementTokens": 1024, "overTokens": "1.5B"}
    ),
    "a fraction of a unit": edited(training={"tokens": "1.5M", "globalBatchTokens": "0.512k"}),
    "null for nothing": edited(
        model__preset=None, parallel=None, nodes=None, training__globalBatchTokens=None
    ),
    "GPUs": edited(
        gpusPerNode=8, nodes=16, training={"steps": 9}, parallel__zero={"parameters": 8, "gradients": 8}
    ),
    "a template": edited(
        template={"metadata": {"labels": {"team": "a"}}, "spec": {"tolerations": [{"key": "x"}]}}
    ),
    "another manager": edited(managedBy="kueue.x-k8s.io/multikueue"),
    "all that a pod is asked for": edited(
        runtimeVersion="1.2.0",
        sharedMemory="64Gi",
        gpuResourceName="nvidia.com/mig-3g.40gb",
        network={"rdma": {"resourceName": "rdma/hca", "perNode": 8}, "hostNetwork": True},
        scheduling={"priorityClassName": "train", "schedulerName": "gangs"},
    ),
    "all that a job's end is asked for": edited(
        activeDeadlineSeconds=1, startupDeadlineSeconds=600, cleanPodPolicy="None", ttlSecondsAfterFinished=0
    ),
    "the longest name": edited(metadata__name="a" * 50),
}


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("what", BAD)
def test_kubectl_apply_refuses_it_with_the_words_of_the_laptop(what: str, control_plane: Cluster) -> None:
    manifest, sentence = BAD[what]
    assert any(sentence in found for found in laptop(manifest))
    command = ("apply", "--dry-run=server", "--namespace=crd-test", "--filename=-")
    with pytest.raises(RuntimeError) as refused:
        control_plane.kubectl(*command, input=yaml.safe_dump(manifest))
    answers = [line.removeprefix("* ") for line in str(refused.value).splitlines()]
    # A single mistake stands on the same line as the object's name.
    answers += [answer.partition(" is invalid: ")[2] for answer in answers]
    for found in laptop(manifest):
        assert said(found, answers), f"{found!r} is not in {refused.value}"


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("what", FINE)
def test_both_accept_what_is_right(what: str, control_plane: Cluster) -> None:
    assert laptop(FINE[what]) == []
    command = ("apply", "--dry-run=server", "--namespace=crd-test", "--filename=-", "--output=json")
    stored = json.loads(control_plane.kubectl(*command, input=yaml.safe_dump(FINE[what])))
    # With the defaults that the server filled in, it is the same job as without.
    assert parse_job(stored).spec == parse_job(FINE[what]).spec


# Values that are right, nearly right and wrong for the field at each path.
SIZES = st.sampled_from(
    [None, -1, 0, 1, 2, 3, 4, 6, 8, 64, 96, 128, 256, 4096, 2**31, 2**62, 2**63, 1.5, "8", True]
)
QUANTITIES = st.one_of(
    SIZES,
    st.from_regex(r"[0-9]{1,5}([.][0-9]{0,4})?(k|M|B|G|T|Ki|Mi|Gi|Ti|m|K|e3)?", fullmatch=True),
    st.sampled_from(["", "4Ki", "-1", "+1", "1 k", "4Ki\n", "00k", "0.000k", "٣", ".5k", "9e3"]),
)
NUMBERS = st.sampled_from([None, -1, 0, 1e-9, 0.05, 0.1, 0.5, 1, 1.5, 1e6, 1e7, "0.1", False])
DEGREES = st.sampled_from([-2, -1, 0, 1, 2, 3, 4, 8])
THINGS = st.sampled_from(
    [None, [], {}, "", "text", 7, [None], ["a"], [7], [{}], {"path": "/a"}, [{"path": "/a"}]]
)
FIELDS = {
    "nodes gpusPerNode processesPerNode ttlSecondsAfterFinished": SIZES,
    "model__layers model__hiddenSize model__heads model__kvHeads model__vocabSize model__seqLen": SIZES,
    "training__steps training__microBatchSize training__seed training__schedule__warmupSteps": SIZES,
    "training__tokens training__globalBatchTokens training__microBatchTokens": QUANTITIES,
    "training__optimizer__lr training__optimizer__clipGradNorm training__schedule__minLr": NUMBERS,
    "training__optimizer__betas": st.lists(NUMBERS, max_size=3),
    "parallel__zero__parameters parallel__zero__gradients parallel__zero__optimizer": DEGREES,
    "data__train data__validation data__prepare data__tokenizer training__completions model recovery": THINGS,
    "image suspend checkpoint__path template__spec typo data__typo": THINGS,
    "network__rdma scheduling__schedulerName managedBy gpuResourceName": THINGS,
    "sharedMemory": QUANTITIES,
    "model__preset": st.sampled_from([None, "internlm-7b", "internlm-9b", 7]),
    "training__steps training__globalBatchTokens model data": st.just(DELETE),
}
EDITS = st.one_of([st.tuples(st.sampled_from(paths.split()), values) for paths, values in FIELDS.items()])


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(edits=st.lists(EDITS, min_size=1, max_size=3))
@example(edits=[("training__globalBatchTokens", "4096\n")])
def test_any_manifest_is_right_for_both_or_wrong_for_both(
    edits: list[tuple[str, object]], server: client.CustomObjectsApi
) -> None:
    manifest = copy.deepcopy(GOOD)
    for path, value in edits:
        try:
            manifest = merge(manifest, path, value)
        except (AttributeError, TypeError):
            continue  # an edit before took the place away
    here, there = laptop(manifest), create(server, manifest)
    note(f"laptop: {here}\nserver: {there}")
    assert bool(here) == bool(there)


@pytest.mark.usefixtures("server")
def test_kubectl_explain_is_documentation(control_plane: Cluster) -> None:
    def explain(path: str) -> str:
        return " ".join(control_plane.kubectl("explain", f"ilj.{path}").split())

    zero = explain("spec.parallel.zero")
    assert "ZeRO-1 inside nodes of 8 GPUs is (1, 1, 8); FSDP is (-1, -1, -1)." in zero
    assert "gradients <integer> Ranks that share one copy of the accumulated gradients." in zero
    assert "the reason DeadlineExceeded" in explain("spec.activeDeadlineSeconds")
    assert "ENUM: All None Running" in explain("spec.cleanPodPolicy")


@pytest.mark.usefixtures("server")
def test_a_running_job_keeps_its_model_until_it_is_suspended(control_plane: Cluster) -> None:
    def apply(**changes: object) -> str:
        return control_plane.kubectl(
            "apply", "--namespace=crd-test", "--filename=-", input=json.dumps(edited(**changes))
        )

    apply()
    with pytest.raises(
        RuntimeError, match=r"cannot change while the job runs: set spec\.suspend to true first"
    ):
        apply(model__layers=3)
    with pytest.raises(RuntimeError, match=r"spec\.nodes cannot change"):
        apply(model__layers=3, nodes=4, suspend=True)
    change: dict[str, object]
    for name, change in {
        "template": {"template": {"spec": {"nodeSelector": {"gpu": "h100"}}}},
        "image": {"image": "other:1"},
        "runtimeVersion": {"runtimeVersion": "1.0.0"},
        "network": {"network__hostNetwork": True},
        "telemetry.metricsPort": {"telemetry__metricsPort": 8000},
    }.items():
        with pytest.raises(RuntimeError, match=rf"spec\.{name} cannot change while the job runs"):
            apply(**change)
    with pytest.raises(RuntimeError, match=r"spec\.nodes cannot change"):
        control_plane.kubectl("scale", "ilj", "job", "--namespace=crd-test", "--replicas=4")
    assert "configured" in apply(suspend=True)
    control_plane.kubectl("scale", "ilj", "job", "--namespace=crd-test", "--replicas=4")
    with pytest.raises(RuntimeError, match=r"spec\.managedBy cannot change: two controllers"):
        apply(suspend=True, managedBy="kueue.x-k8s.io/multikueue")
    assert "configured" in apply(suspend=True, template__spec__nodeSelector__gpu="h100")
    assert "configured" in apply(suspend=True, model__layers=3)
    assert "configured" in apply(model__layers=3)
    assert "configured" in apply(model__layers=3, recovery__maxRestarts=1, telemetry__memoryHistory=True)


@pytest.mark.usefixtures("server")
def test_kubectl_prints_how_far_how_fast_and_how_safe_a_job_is(control_plane: Cluster) -> None:
    control_plane.kubectl(
        "apply", "--namespace=crd-test", "--filename=-", input=json.dumps(edited(metadata__name="printed"))
    )
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 240))
    status = {
        "phase": "Running",
        "progressText": "120/400",
        "progress": {"step": 120, "loss": 3.21, "tokensPerSecond": 8100.5, "eta": "3d20h"},
        "checkpoint": {"step": 100, "uri": "s3://b/checkpoints/step-100", "time": now},
        "restarts": 1,
        "layout": "zero 1/1/4",
        "workers": {"desired": 2, "ready": 2},
        "lastFailure": {"attempt": 1, "class": "Preemption", "reason": "Evicted", "message": "full"},
    }
    patch_status(control_plane, "printed", status)

    def columns(*wide: str) -> dict[str, str]:
        head, row = control_plane.kubectl("get", "ilj", "printed", "--namespace=crd-test", *wide).splitlines()
        starts = [found.start() for found in re.finditer(r"\S+( \S+)*", head)]
        cells = zip(starts, [*starts[1:], None], strict=True)
        return {head[a:b].strip(): row[a:b].strip() for a, b in cells}

    printed = columns()
    assert printed.pop("CHECKPOINT").startswith("4m")
    assert printed.pop("AGE")
    assert printed == {
        "NAME": "printed",
        "PHASE": "Running",
        "STEP": "120/400",
        "LOSS": "3.21",
        "TOK/S": "8100",
        "RESTARTS": "1",
        "ETA": "3d20h",
    }
    wide = {"NODES": "2", "READY": "2", "LAYOUT": "zero 1/1/4", "LAST FAILURE": "Preemption"}
    assert columns("--output=wide").items() >= wide.items()


def patch_status(control_plane: Cluster, name: str, status: dict[str, Any]) -> None:
    control_plane.kubectl(
        *("patch", "ilj", name, "--namespace=crd-test", "--subresource=status", "--type=merge"),
        "--patch=" + json.dumps({"status": status}),
    )


@pytest.mark.usefixtures("server")
def test_kubectl_waits_for_the_end_of_a_job(control_plane: Cluster) -> None:
    waited = edited(metadata__name="waited")
    control_plane.kubectl("apply", "--namespace=crd-test", "--filename=-", input=json.dumps(waited))
    wait = ("wait", "--for=condition=Succeeded", "ilj/waited", "--namespace=crd-test")
    with pytest.raises(RuntimeError, match="timed out waiting"):
        control_plane.kubectl(*wait, "--timeout=1s")
    succeeded = {"type": "Succeeded", "status": "True", "reason": "Completed"}
    time_of_it = {"lastTransitionTime": "2026-01-01T00:00:00Z"}
    patch_status(control_plane, "waited", {"conditions": [succeeded | time_of_it]})
    assert "condition met" in control_plane.kubectl(*wait, "--timeout=30s")


@pytest.mark.usefixtures("server")
def test_scale_tells_the_nodes_and_the_workers_that_run(control_plane: Cluster) -> None:
    scaled = edited(metadata__name="scaled", suspend=True)
    control_plane.kubectl("apply", "--namespace=crd-test", "--filename=-", input=json.dumps(scaled))
    patch_status(control_plane, "scaled", {"workers": {"ready": 2}, "selector": "a=b"})
    raw = f"/apis/{api.API_VERSION}/namespaces/crd-test/internlmjobs/scaled/scale"
    scale = json.loads(control_plane.kubectl("get", f"--raw={raw}"))
    assert scale["spec"] == {"replicas": 2}
    assert scale["status"] == {"replicas": 2, "selector": "a=b"}
