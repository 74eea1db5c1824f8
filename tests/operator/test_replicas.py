"""Two replicas of the operator against a real API server: one leads, whatever happens to it."""

from __future__ import annotations

import base64
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from kubernetes import client
from operator_process import NAMESPACE, TIMEOUT, Here, Process

from cluster.controlplane import wait_until
from internlm_operator import tls

pytestmark = pytest.mark.cluster


@pytest.fixture
def replicas(here: Here, tmp_path: Path) -> Iterator[tuple[Process, Process]]:
    """The leader and a second replica; afterwards the first leads again."""
    second = Process(tmp_path, here.operator.kubeconfig)
    wait_until(lambda: here.operator.leads, "the first operator to lead", TIMEOUT)
    second.start()
    assert not second.leads
    yield here.operator, second
    assert second.stop() == 0
    log = second.log.read_text()
    assert "Traceback" not in log, log


def writes(process: Process) -> dict[str, float]:
    """How often the process changed what jobs consist of."""
    prefix = "internlm_operator_api_requests_total"
    return {
        name: value
        for name, value in process.metrics().items()
        if name.startswith(prefix)
        and not any(f'resource="{own}"' in name for own in ("leases", "tokenreviews", "secrets"))
        and not any(f'verb="{verb}"' in name for verb in ("get", "list"))
    }


def test_a_report_to_any_replica_reaches_the_status(here: Here, replicas: tuple[Process, Process]) -> None:
    leader, second = replicas
    pods = here.start("any")
    assert here.report("any", pods[0], to=second, step=5) == (200, {})
    here.wait(lambda: here.status("any").get("progressText") == "5/400", "progress", "any")
    assert here.report("any", pods[0], to=second, attempt=7, step=6)[0] == 409, (
        "the leader's answer comes back"
    )
    assert here.send("any", b"{}", None, to=second)[0] == 401
    assert here.send("any", b"{}", "rubbish", to=second)[0] == 403
    assert not writes(second)
    taken = 'internlm_operator_channel_requests_total{code="200",route="report"}'
    assert leader.metrics()[taken] >= second.metrics()[taken] == 1
    here.delete("any")


def test_a_paused_leader_is_followed_and_writes_nothing_afterwards(
    here: Here, replicas: tuple[Process, Process]
) -> None:
    leader, second = replicas
    pods = here.start("paused")
    here.wait(lambda: here.status("paused")["attempts"][-1]["formed"], "the gang to be noted", "paused")
    # It has work in its queue when it is paused, and finds it there when it goes on.
    assert leader.process is not None
    before = writes(leader)
    leader.process.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        here.end(pods[1], 137)
        here.wait_reaped("paused", 1)
        print(f"the second replica acted {time.monotonic() - stopped:.1f} s after the first was paused")
        here.run(*here.wait_gang("paused", 2))
        assert second.leads
    finally:
        leader.process.send_signal(signal.SIGCONT)
    wait_until(lambda: "lost the lease" in leader.log.read_text(), "it to notice", TIMEOUT)
    assert here.wait_phase("paused", "Running")["restarts"] == 1
    assert here.report("paused", pods[0], to=leader, attempt=2, step=9) == (200, {})
    here.wait(lambda: here.status("paused").get("progressText") == "9/400", "progress", "paused")
    assert second.leads
    assert not leader.leads
    assert writes(leader) == before
    here.delete("paused")


def test_a_leader_that_is_stopped_hands_on_before_it_goes(
    here: Here, replicas: tuple[Process, Process]
) -> None:
    leader, second = replicas
    pods = here.start("handed")
    assert leader.stop() == 0
    leases = client.CoordinationV1Api(here.core.api_client)
    wait_until(lambda: second.leads, "the second replica to lead", TIMEOUT)
    spec = leases.read_namespaced_lease("internlm-operator", NAMESPACE).spec
    here.end(pods[0], 1)
    here.wait_reaped("handed", 1)
    here.wait_gang("handed", 2)
    leader.start()
    assert not leader.leads
    assert spec.lease_transitions >= 1
    here.delete("handed")


def test_certificates_are_renewed_and_the_authority_replaced_while_all_runs(here: Here) -> None:
    pods = here.start("tls")
    where = ("internlm-operator-channel", NAMESPACE)

    def put(authorities: tls.Authorities) -> None:
        data = tls.make_secret(NAMESPACE, "x", authorities)["data"]
        here.core.patch_namespaced_secret(
            *where, {"data": {"successor.crt": None, "successor.key": None} | data}
        )

    def trusted() -> str:
        return str(here.core.read_namespaced_config_map("tls-config", NAMESPACE).data["ca.crt"])

    now = datetime.now(UTC)
    kept = tls.read_secret({"data": here.core.read_namespaced_secret(*where).data}, "it", now)
    # As if most of its ten years were over: a successor is made, and told to the workers.
    old = tls.new_authority(now - timedelta(days=tls.AUTHORITY_DAYS - 30))
    put(tls.Authorities(old, None, (old.certificate, *kept.trusted)))
    here.wait(lambda: trusted().count("BEGIN") == 3, "the workers to be told", "tls")
    data = here.core.read_namespaced_secret(*where).data
    successor = base64.b64decode(data["successor.crt"]).decode()
    assert trusted().startswith(successor)
    assert here.report("tls", pods[0], step=1) == (200, {})
    # As if two days had gone by: now it signs, and who trusts it alone is answered.
    aged = tls.new_authority(now - timedelta(days=3))
    put(tls.Authorities(old, aged, (aged.certificate, old.certificate)))

    def signs() -> bool:
        secret = here.core.read_namespaced_secret(*where).data
        return base64.b64decode(secret["tls.crt"]) == aged.certificate_pem and "successor.crt" not in secret

    here.wait(signs, "the successor to sign", "tls")
    here.wait(lambda: trusted().startswith(aged.certificate_pem.decode()), "the workers to be told", "tls")
    assert here.report("tls", pods[0], step=2) == (200, {})
    here.delete("tls")
