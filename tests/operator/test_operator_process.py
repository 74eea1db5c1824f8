"""The operator's process against a real API server, with no more rights than `kube` says that it needs.

There are no nodes: these tests are the kubelet, and write the pods' status.  The scheduler leaves the pods
alone; the garbage collector, admission, tokens and access rules are the real ones.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import pytest
import yaml
from kubernetes import client
from operator_process import NAMESPACE, TIMEOUT, Here
from operator_world import make_report, message

from cluster.controlplane import wait_until
from internlm_operator import objects
from internlm_operator.report import MAX_REPORT_BYTES

pytestmark = pytest.mark.cluster


def test_a_job_lives_from_pending_to_succeeded(here: Here) -> None:
    here.create("life")
    pods = here.wait_gang("life", 1)
    assert pods == ["life-worker-0", "life-worker-1"]
    assert here.status("life")["phase"] == "Pending"
    here.run(*pods)
    here.wait_phase("life", "Running")

    checkpoint = {
        "step": 100,
        "uri": "s3://b/step-100",
        "time": "2026-01-01T00:00:00Z",
        "bytes": 5,
        "digest": "d",
        "verified": False,
    }
    assert here.report("life", pods[0], step=120, checkpoint=checkpoint) == (200, {})
    here.wait(lambda: here.status("life").get("progressText") == "120/400", "progress", "life")
    assert here.status("life")["checkpoint"] == checkpoint

    for pod in pods:
        here.end(pod, 0, message("Completed", "done", 400))
    status = here.wait_phase("life", "Succeeded")
    assert status["progressText"] == "400/400"
    assert status["restarts"] == 0
    assert [attempt["reason"] for attempt in status["attempts"]] == ["Completed"]
    assert set(here.pods("life")) == set(pods), "finished pods stay for their logs"
    here.wait(
        lambda: {"AttemptStarted", "Running", "Succeeded"} <= here.events("life").keys(), "events", "life"
    )

    here.delete("life")


def test_a_checkpoint_is_evaluated_by_a_pod_of_its_own(here: Here) -> None:
    pods = here.start("evaluated", evaluation={"text": ["s3://b/text"], "resources": {"limits": {"cpu": 1}}})
    checkpoint = {"step": 100, "uri": "s3://b/step-100", "time": "2026-01-01T00:00:00Z"}
    assert here.report("evaluated", pods[0], step=120, checkpoint=checkpoint) == (200, {})
    pod = "evaluated-evaluation-100-1"
    here.wait(lambda: pod in here.pods("evaluated"), "the evaluation", "evaluated")
    found = {"reason": "Completed", "results": [["perplexity", "byte_perplexity", 2.5]]}
    here.end(pod, 0, json.dumps(found))
    here.wait(lambda: here.status("evaluated")["evaluation"].get("results"), "its result", "evaluated")
    status = here.status("evaluated")
    (result,) = status["evaluation"]["results"]
    assert (result["step"], result["metric"], result["value"]) == (100, "byte_perplexity", 2.5)
    assert (status["phase"], status["workers"]["ready"], status["restarts"]) == ("Running", 2, 0)
    here.delete("evaluated")


def test_a_dead_worker_restarts_the_gang(here: Here) -> None:
    pods = here.start("restart")
    here.end(pods[1], 137)
    here.wait_reaped("restart", 1)
    pods = here.wait_gang("restart", 2)
    here.run(*pods)
    status = here.wait_phase("restart", "Running")
    assert status["restarts"] == 1
    assert status["lastFailure"]["pod"] == "restart-worker-1"
    assert status["lastFailure"]["signal"] == 9
    for pod in pods:
        here.end(pod, 0)
    here.wait_phase("restart", "Succeeded")
    here.delete("restart")


def test_an_operator_that_is_killed_at_any_moment_of_a_restart_makes_no_difference(here: Here) -> None:
    here.create("killed", nodes=3, recovery={"maxRestarts": 100, "maxAttemptsWithoutProgress": 100})
    for attempt in range(1, 5):
        # Killed a little later each time: while it writes the status, deletes, waits, makes pods.
        here.wait_gang("killed", attempt, nodes=3)
        here.run(*here.pods("killed"))
        here.wait_phase("killed", "Running")
        assert here.status("killed")["attempts"][-1]["number"] == attempt
        here.report(
            "killed", "killed-worker-0", attempt=attempt, step=attempt * 10, startStep=attempt * 10 - 10
        )
        here.end("killed-worker-2", 1)
        time.sleep(0.03 * attempt)
        here.operator.kill()
        here.reap("killed")
        here.operator.start()
        here.wait_reaped("killed", attempt)
    here.wait_gang("killed", 5, nodes=3)
    assert here.status("killed")["restarts"] == 4
    here.delete("killed")


def test_a_restarted_operator_changes_nothing(here: Here) -> None:
    here.start("quiet")
    here.wait(lambda: here.status("quiet")["attempts"][-1]["formed"], "the gang to be noted", "quiet")

    def versions() -> dict[str, str]:
        pods = {name: pod.metadata.resource_version for name, pod in here.pods("quiet").items()}
        service = here.core.read_namespaced_service("quiet", NAMESPACE).metadata.resource_version
        config_map = here.core.read_namespaced_config_map("quiet-config", NAMESPACE).metadata.resource_version
        job = here.job("quiet")["metadata"]["resourceVersion"]
        secret = here.core.read_namespaced_secret("internlm-operator-channel", NAMESPACE).metadata
        return pods | {
            "service": service,
            "config": config_map,
            "job": job,
            "secret": secret.resource_version,
        }

    before = versions()
    here.operator.kill()
    here.operator.start()
    # A report is answered and written only after the job was looked at.
    assert here.report("quiet", "quiet-worker-0", step=7)[0] in (200, 503)
    wait_until(lambda: here.report("quiet", "quiet-worker-0", step=8)[0] == 200, "the channel", TIMEOUT)
    here.wait(lambda: here.status("quiet").get("progressText") == "8/400", "progress", "quiet")
    after = versions()
    assert after | {"job": ""} == before | {"job": ""}
    assert here.status("quiet")["phase"] == "Running"
    here.delete("quiet")


def test_a_users_mistake_is_in_the_condition_and_in_an_event(here: Here) -> None:
    sentence = "data.tokenizer: s3://b/t.model has 500 words, the model 512; make them equal"
    pods = here.start("mistake")
    here.end(pods[0], 1, message("UserError", sentence))
    here.wait_phase("mistake", "Failed")
    failed = next(c for c in here.status("mistake")["conditions"] if c["type"] == "Failed")
    assert (failed["reason"], failed["message"]) == ("UserError", sentence)
    here.wait(lambda: here.events("mistake").get("UserError") == sentence, "the event", "mistake")
    here.delete("mistake")


def test_a_suspended_job_gives_up_its_pods_and_goes_on_with_other_settings(here: Here) -> None:
    here.start("pause")
    here.edit("pause", suspend=True)
    here.wait_phase("pause", "Suspending")
    here.wait_reaped("pause", 1)
    here.wait_phase("pause", "Suspended")
    assert not here.pods("pause")
    here.edit("pause", nodes=1)
    here.edit("pause", suspend=False)
    here.run(*here.wait_gang("pause", 2, nodes=1))
    assert here.wait_phase("pause", "Running")["restarts"] == 0
    manifest = yaml.safe_load(
        here.core.read_namespaced_config_map("pause-config", NAMESPACE).data["job.yaml"]
    )
    assert manifest["spec"]["nodes"] == 1
    here.delete("pause")


def test_a_template_with_a_mistake_fails_the_job_in_the_api_servers_words(here: Here) -> None:
    here.create("template", template={"spec": {"volumes": [{"name": "data", "hostpath": {"path": "/x"}}]}})
    here.wait_phase("template", "Failed")
    failed = next(c for c in here.status("template")["conditions"] if c["type"] == "Failed")
    assert failed["reason"] == "InvalidTemplate"
    assert "hostpath" in failed["message"]
    here.delete("template")


def test_a_quota_that_is_used_up_is_shown_and_the_job_starts_when_there_is_room(here: Here) -> None:
    quota = client.V1ResourceQuota(
        metadata=client.V1ObjectMeta(name="none"), spec=client.V1ResourceQuotaSpec(hard={"count/pods": "0"})
    )
    here.core.create_namespaced_resource_quota(NAMESPACE, quota)

    def enforced() -> bool:
        return bool(here.core.read_namespaced_resource_quota("none", NAMESPACE).status.hard)

    wait_until(enforced, "the quota", TIMEOUT)
    here.create("quota")

    here.wait(
        lambda: here.condition("quota", "Queued").get("reason") == "QuotaExceeded", "the refusal", "quota"
    )
    assert "exceeded quota" in here.condition("quota", "Queued")["message"]
    here.core.delete_namespaced_resource_quota("none", NAMESPACE)
    here.wait_gang("quota", 1)
    here.delete("quota")


def test_a_gang_is_made_away_from_failed_hardware_and_so_is_another_jobs(here: Here) -> None:
    first = here.start("away", recovery={"podDisruptionBudget": True})[0]
    assert here.kept_off("away") == []
    here.end(first, 1, message("Error", "rank 0: Xid 79: GPU has fallen off the bus"))
    here.wait_reaped("away", 1)
    here.wait_gang("away", 2)
    assert here.kept_off("away") == ["fake"]
    failure = here.status("away")["lastFailure"]
    assert (failure["class"], failure["action"]) == ("Hardware", "GangRestartAvoidingNode")
    assert (failure["rank"], failure["node"]) == (0, "fake")
    assert "fake gets no worker until" in here.events("away")["NodeExcluded"]

    here.create("beside", nodes=1)
    here.wait_gang("beside", 1, 1)
    assert here.kept_off("beside") == ["fake"]
    budgets = client.PolicyV1Api(here.core.api_client).list_namespaced_pod_disruption_budget(NAMESPACE).items
    assert [(b.metadata.name, b.spec.min_available) for b in budgets] == [("away", 2)]
    here.delete("away")
    here.delete("beside")


def test_a_node_whose_condition_tells_of_failed_hardware_gets_no_worker(here: Here) -> None:
    here.core.create_node({"metadata": {"name": "sick"}})
    condition = {"type": "GPUMissing", "status": "True", "reason": "Test", "message": "7 of 8"}
    here.core.patch_node_status("sick", {"status": {"conditions": [condition]}})
    names = (f"sick-{number}" for number in itertools.count())

    def avoided() -> bool:  # by the next job, once the operator has heard of the node
        name = next(names)
        here.create(name, nodes=1)
        here.wait_gang(name, 1, 1)
        found = here.kept_off(name)
        here.delete(name)
        return "sick" in found

    wait_until(avoided, "jobs to keep off the node", TIMEOUT)
    here.core.delete_node("sick")


def test_objects_of_other_owners_are_left_alone_and_the_job_starts_when_they_are_gone(here: Here) -> None:
    metadata = client.V1ObjectMeta(name="taken", labels={objects.JOB_LABEL: "taken"})
    spec = client.V1ServiceSpec(ports=[client.V1ServicePort(port=80)])
    service = here.core.create_namespaced_service(NAMESPACE, client.V1Service(metadata=metadata, spec=spec))
    config_map = client.V1ConfigMap(metadata=client.V1ObjectMeta(name="taken-config"), data={"mine": "1"})
    here.core.create_namespaced_config_map(NAMESPACE, config_map)
    pod = here.start("other-job", nodes=1)[0]

    def said() -> str:
        queued = here.condition("taken", "Queued")
        return f"{queued.get('reason')}: {queued.get('message')}"

    here.create("taken", nodes=1)
    here.wait(
        lambda: said().startswith("NameTaken: Service taken exists and is not this job's"), "it", "taken"
    )
    assert here.condition("taken", "Queued")["status"] == "True"
    found = here.core.read_namespaced_service("taken", NAMESPACE).metadata
    assert (found.resource_version, found.owner_references) == (service.metadata.resource_version, None)
    here.core.delete_namespaced_service("taken", NAMESPACE)
    here.wait(lambda: said().startswith("NameTaken: ConfigMap taken-config exists"), "the next", "taken")
    assert here.core.read_namespaced_config_map("taken-config", NAMESPACE).data == {"mine": "1"}
    here.core.delete_namespaced_config_map("taken-config", NAMESPACE)
    here.run(*here.wait_gang("taken", 1, nodes=1))
    here.wait_phase("taken", "Running")
    assert here.pods("other-job").keys() == {pod}
    here.delete("taken")
    here.delete("other-job")


def test_what_the_workers_share_is_made_again_for_the_next_gang(here: Here) -> None:
    pod = here.start("shared", nodes=1)[0]
    here.core.delete_namespaced_config_map("shared-config", NAMESPACE)
    selector = {"spec": {"selector": {"app": "mine"}}}
    here.core.patch_namespaced_service("shared", NAMESPACE, selector)
    here.end(pod, 1)
    here.wait_reaped("shared", 1)
    here.wait_gang("shared", 2, nodes=1)
    assert "job.yaml" in here.core.read_namespaced_config_map("shared-config", NAMESPACE).data
    found = here.core.read_namespaced_service("shared", NAMESPACE)
    assert found.spec.selector == {objects.JOB_LABEL: "shared"}
    here.delete("shared")


def test_a_worker_whose_labels_somebody_took_is_replaced(here: Here) -> None:
    pod = here.start("unlabelled", nodes=1)[0]
    here.core.patch_namespaced_pod(pod, NAMESPACE, {"metadata": {"labels": {objects.JOB_LABEL: None}}})

    def doomed() -> bool:
        return here.core.read_namespaced_pod(pod, NAMESPACE).metadata.deletion_timestamp is not None

    here.wait(doomed, "its deletion", "unlabelled")
    here.core.delete_namespaced_pod(pod, NAMESPACE, grace_period_seconds=0)
    here.wait_gang("unlabelled", 2, nodes=1)
    here.delete("unlabelled")


def test_a_job_of_another_controller_gets_nothing(here: Here) -> None:
    here.create("foreign", managedBy="kueue.x-k8s.io/multikueue")
    here.start("own", nodes=1)  # later, and it runs
    assert here.status("foreign") == {}
    assert not here.pods("foreign")
    here.delete("foreign")
    here.delete("own")


def test_the_channel_believes_only_a_pod_of_this_job_with_a_token_for_this_job(here: Here) -> None:
    mine, other = here.start("mine")[0], here.start("other")[0]
    audience = objects.audience(NAMESPACE, "mine")
    body = make_report(step=1).model_dump_json(by_alias=True).encode()
    default = here.core.create_namespaced_service_account_token(
        "default",
        "default",
        client.AuthenticationV1TokenRequest(spec=client.V1TokenRequestSpec(audiences=[audience])),
    )
    assert here.send("mine", body, None)[0] == 401
    for token in (
        "rubbish",
        here.token(mine, "https://kubernetes.default.svc.cluster.local"),
        here.token(other, objects.audience(NAMESPACE, "other")),
        here.token(other, audience),
        here.token(mine, audience, bound=False),
        default.status.token,
    ):
        code, answer = here.send("mine", body, token)
        assert code == 403, answer
    assert here.send("mine", body, here.token(mine, audience)) == (200, {})
    here.delete("mine")
    here.delete("other")


def test_the_channel_refuses_what_is_no_report_of_the_current_attempt(here: Here) -> None:
    pod = here.start("refuse")[0]
    token = here.token(pod, objects.audience(NAMESPACE, "refuse"))
    good = {"attempt": 1, "step": 5, "totalSteps": 400}
    cases: list[tuple[bytes, int]] = [
        (b"", 400),
        (b"[]", 400),
        (b'{"attempt": 1', 400),
        (json.dumps(good | {"loss": float("nan")}).encode(), 400),
        (json.dumps(good | {"step": -1}).encode(), 400),
        (json.dumps(good | {"step": 2**70}).encode(), 400),
        (json.dumps(good | {"checkpoint": {"step": 1, "uri": "x" * 5000, "time": "now"}}).encode(), 400),
        (json.dumps(good | {"note": "x" * (MAX_REPORT_BYTES + 1)}).encode(), 413),
        (json.dumps(good | {"attempt": 2}).encode(), 409),
    ]
    for body, code in cases:
        answer = here.send("refuse", body, token)
        assert answer[0] == code, (body[:100], answer)
        assert answer[1]["message"]
    assert "progress" not in here.status("refuse")
    assert here.send("refuse", json.dumps(good | {"new": 1}).encode(), token)[0] == 200
    here.delete("refuse")


def test_deleted_jobs_leave_nothing(here: Here) -> None:
    """The jobs of all tests. Last, since the garbage collector learns of new resources every 30 seconds."""
    here.start("deleted")
    here.delete("deleted")

    def left() -> list[str]:
        for name in {pod.metadata.labels[objects.JOB_LABEL] for pod in workers()}:
            here.reap(name)
        found = [
            *workers(),
            *here.core.list_namespaced_service(NAMESPACE, label_selector=objects.JOB_LABEL).items,
        ]
        found += here.core.list_namespaced_config_map(NAMESPACE, label_selector=objects.JOB_LABEL).items
        return [item.metadata.name for item in found]

    def workers() -> list[Any]:
        return list(here.core.list_namespaced_pod(NAMESPACE, label_selector=objects.JOB_LABEL).items)

    wait_until(lambda: not left(), "everything to be gone", TIMEOUT)
