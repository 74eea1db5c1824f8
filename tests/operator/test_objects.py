"""The objects of a job: what the trainer relies on, and what a template may change."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from operator_world import SETTINGS, apply_merge_patch, make_job

from internlm_operator import objects
from internlm_operator.api import MANAGER
from internlm_operator.manifest import parse_job
from internlm_operator.merge import merge_patch, strategic_merge


def worker(index: int = 1, attempt: int = 3, **spec: Any) -> dict[str, Any]:
    job = make_job(**spec)
    return objects.worker_pod(job, parse_job(job).spec, attempt, index, SETTINGS)


def trainer(pod: dict[str, Any]) -> dict[str, Any]:
    return next(c for c in pod["spec"]["containers"] if c["name"] == "trainer")


def test_a_worker_is_an_agent_whose_processes_meet_the_others_at_worker_0() -> None:
    command = trainer(worker(nodes=4))["command"]
    assert command[1:3] == ["-m", "internlm_trainer.agent"]
    arguments = dict(zip(command[3::2], command[4::2], strict=True))
    assert arguments == {
        "--nnodes": "4",
        "--node-rank": "1",
        "--nproc-per-node": "2",
        "--master-addr": "job-worker-0.job",
        "--master-port": "29500",
    }


@pytest.mark.parametrize(
    ("index", "telemetry", "port"),
    [(0, {}, 9464), (0, {"metricsPort": 8000}, 8000), (0, {"metricsPort": 0}, None), (1, {}, None)],
)
def test_the_worker_of_rank_0_has_a_port_for_metrics(
    index: int, telemetry: dict[str, Any], port: int | None
) -> None:
    container = trainer(worker(index, nodes=4, telemetry=telemetry))
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert ports == {"rendezvous": 29500} | ({"metrics": port} if port else {})
    assert environment.get("INTERNLM_METRICS_PORT") == (str(port) if port else None)


def test_a_worker_has_its_name_in_dns() -> None:
    spec = worker()["spec"]
    assert (spec["hostname"], spec["subdomain"]) == ("job-worker-1", "job")
    service = objects.service(make_job())
    assert service["metadata"]["name"] == "job"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"].items() <= worker()["metadata"]["labels"].items()


def test_every_object_is_owned_and_labelled() -> None:
    job = make_job()
    for manifest in (objects.service(job), objects.config_map(job, SETTINGS), worker()):
        owner = manifest["metadata"]["ownerReferences"][0]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == ("job-uid", True, True)
        assert manifest["metadata"]["labels"][objects.JOB_LABEL] == "job"
    labels = worker()["metadata"]["labels"]
    assert (labels[objects.INDEX_LABEL], labels[objects.ATTEMPT_LABEL]) == ("1", "3")


def test_the_config_map_holds_the_manifest_that_a_laptop_could_run() -> None:
    job = make_job(nodes=3)
    data = objects.config_map(job, SETTINGS)["data"]
    manifest = yaml.safe_load(data["job.yaml"])
    assert parse_job(manifest).spec == parse_job(job).spec
    assert "uid" not in manifest["metadata"]
    assert data["ca.crt"] == "CA"


def test_a_worker_has_no_right_in_the_cluster_but_a_token_for_its_job() -> None:
    spec = worker()["spec"]
    assert spec["automountServiceAccountToken"] is False
    projected = next(v for v in spec["volumes"] if v["name"] == "internlm-token")["projected"]["sources"]
    assert [source["serviceAccountToken"]["audience"] for source in projected] == ["internlmjob/default/job"]
    environment = {e["name"]: e["value"] for e in trainer(worker())["env"]}
    assert environment["INTERNLM_ATTEMPT"] == "3"
    assert environment["INTERNLM_JOB_UID"]
    assert environment["INTERNLM_REPORT_URL"] == (
        "https://internlm-operator.system.svc:8443/v1/namespaces/default/internlmjobs/job/report"
    )


def test_gpus_are_asked_for_as_limits() -> None:
    assert trainer(worker(gpusPerNode=8))["resources"] == {"limits": {"nvidia.com/gpu": "8"}}
    assert "resources" not in trainer(worker())


def test_the_jobs_own_image_wins() -> None:
    assert trainer(worker())["image"] == "trainer:1"
    assert trainer(worker(image="mine:2"))["image"] == "mine:2"


@pytest.mark.parametrize(
    ("installed", "version", "image"),
    [
        ("internlm-trainer:1.0.0", "1.1.0", "internlm-trainer:1.1.0"),
        ("internlm-trainer", "1.1.0", "internlm-trainer:1.1.0"),
        ("registry:5000/team/trainer:1.0.0@sha256:0123", "1.1.0", "registry:5000/team/trainer:1.1.0"),
        ("registry:5000/trainer@sha256:0123", "1.1.0", "registry:5000/trainer:1.1.0"),
    ],
)
def test_a_version_is_another_tag_of_the_operators_trainer(installed: str, version: str, image: str) -> None:
    spec = parse_job(make_job(runtimeVersion=version)).spec
    assert objects.trainer_image(spec, installed) == image


def test_a_job_chooses_its_scheduler_its_priority_and_the_size_of_its_shared_memory() -> None:
    scheduling = {"schedulerName": "gangs", "priorityClassName": "train"}
    spec = worker(scheduling=scheduling, sharedMemory="64Gi")["spec"]
    assert (spec["schedulerName"], spec["priorityClassName"]) == ("gangs", "train")
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert {"schedulerName", "priorityClassName", "hostNetwork"}.isdisjoint(worker()["spec"])


def test_gpus_and_rdma_adapters_are_asked_for_by_the_names_of_their_plugins() -> None:
    network = {"rdma": {"resourceName": "rdma/hca", "perNode": 4}}
    pod = worker(gpusPerNode=8, gpuResourceName="amd.com/gpu", network=network)
    assert trainer(pod)["resources"] == {"limits": {"amd.com/gpu": "8", "rdma/hca": "4"}}
    assert trainer(pod)["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert trainer(worker(gpusPerNode=8))["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert "hostNetwork" not in pod["spec"], "only where it is asked for"


def test_on_the_hosts_network_workers_still_find_each_other_by_name() -> None:
    spec = worker(network={"hostNetwork": True})["spec"]
    assert (spec["hostNetwork"], spec["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")


def test_torchrun_waits_for_a_save_as_long_as_the_pod_may_live() -> None:
    def patience(**template: Any) -> dict[str, Any]:
        pod = worker(template={"spec": template})
        environment = {e["name"]: e["value"] for e in trainer(pod)["env"]}
        return {
            "grace": pod["spec"]["terminationGracePeriodSeconds"],
            "torchrun": int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]),
        }

    assert patience() == {"grace": 60, "torchrun": 55}
    assert patience(terminationGracePeriodSeconds=600) == {"grace": 600, "torchrun": 595}


def test_a_template_is_merged_as_kubectl_would() -> None:
    toleration = {"key": "gpu", "operator": "Exists"}
    template = {
        "metadata": {"labels": {"team": "a", objects.ATTEMPT_LABEL: "9"}, "annotations": {"note": "x"}},
        "spec": {
            "restartPolicy": "Always",
            "hostname": "other",
            "tolerations": [toleration],
            "nodeSelector": {"gpu": "h100"},
            "volumes": [{"name": "data", "emptyDir": {}}, {"name": "shm", "emptyDir": {"sizeLimit": "1Gi"}}],
            "containers": [
                {
                    "name": "trainer",
                    "imagePullPolicy": "Never",
                    "env": [{"name": "HOME", "value": "/data"}, {"name": "X", "value": "1"}],
                    "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                    "resources": {"limits": {"memory": "1Gi"}},
                },
                {"name": "sidecar", "image": "s"},
            ],
        },
    }
    pod = worker(template=template, gpusPerNode=1)
    spec, container = pod["spec"], trainer(pod)
    assert pod["metadata"]["annotations"] == {"note": "x"}
    assert pod["metadata"]["labels"]["team"] == "a"
    assert pod["metadata"]["labels"][objects.ATTEMPT_LABEL] == "3", "the operator finds its pods by it"
    assert (spec["restartPolicy"], spec["hostname"]) == ("Never", "job-worker-1")
    assert spec["tolerations"][0] == toleration
    assert len(spec["tolerations"]) == 3
    shm = next(v for v in spec["volumes"] if v["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    environment = {e["name"]: e["value"] for e in container["env"]}
    assert (environment["HOME"], environment["X"]) == ("/data", "1")
    assert environment["INTERNLM_ATTEMPT"] == "3"
    assert environment["INTERNLM_JOB_UID"]
    assert {m["mountPath"] for m in container["volumeMounts"]} >= {"/data", "/tmp", "/etc/internlm"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "1", "memory": "1Gi"}
    assert [c["name"] for c in spec["containers"]] == ["trainer", "sidecar"]


def test_the_digest_of_a_spec_changes_with_the_gang_and_not_with_the_rest() -> None:
    def digest(**spec: Any) -> str:
        return objects.spec_digest(parse_job(make_job(**spec)).spec)

    assert digest() == digest(suspend=True, recovery={"maxRestarts": 3}, gpusPerNode=0)
    assert digest() == digest(activeDeadlineSeconds=9, cleanPodPolicy="All", managedBy=MANAGER)
    assert digest() == digest(telemetry={"memoryHistory": True})
    changed = [
        digest(),
        digest(nodes=4),
        digest(gpusPerNode=2),
        digest(image="x"),
        digest(sharedMemory="1Gi"),
        digest(telemetry={"metricsPort": 8000}),
    ]
    assert len(set(changed)) == len(changed)


@pytest.mark.parametrize(
    ("base", "patch", "merged"),
    [
        ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
        ({"a": {"b": 1}}, {"a": {"c": 2}}, {"a": {"b": 1, "c": 2}}),
        ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
        ({"args": ["a"]}, {"args": ["b"]}, {"args": ["b"]}),
        ({"env": [{"name": "A", "value": "1"}]}, {"env": [{"name": "A", "$patch": "delete"}]}, {"env": []}),
        ({"volumes": [{"name": "a"}]}, {"volumes": [{"name": "a", "x": 1}]},
         {"volumes": [{"name": "a", "x": 1}]}),
        ({"tolerations": [1]}, {"tolerations": [2, 1]}, {"tolerations": [1, 2]}),
        ({}, {"containers": [{"name": "a", "env": [{"name": "B"}]}]},
         {"containers": [{"name": "a", "env": [{"name": "B"}]}]}),
    ],
)  # fmt: skip
def test_strategic_merge(base: dict[str, Any], patch: dict[str, Any], merged: dict[str, Any]) -> None:
    before = repr(base)
    assert strategic_merge(base, patch) == merged
    assert repr(base) == before


VALUES = st.recursive(
    st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=4)


@given(OBJECTS, OBJECTS)
def test_a_merge_patch_makes_the_new_of_the_old(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert apply_merge_patch(old, merge_patch(old, new)) == new
    assert merge_patch(new, new) == {}
