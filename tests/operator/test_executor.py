"""What becomes of plans on a real API server, where others write, too, and not everything is done in one look."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest
from kubernetes import client as blocking
from kubernetes.aio import client, config
from operator_process import NAMESPACE, Here
from operator_world import SETTINGS

from internlm_operator import executor, objects
from internlm_operator.executor import PARALLEL_REQUESTS, Executor
from internlm_operator.kube import ApiError, Kube
from internlm_operator.plan import Create

pytestmark = pytest.mark.cluster


def with_kube(here: Here, script: Any) -> None:
    """Run `script(kube, job)` with the operator's rights and a job that the operator leaves alone."""
    here.create("alone", managedBy="kueue.x-k8s.io/multikueue")

    async def main() -> None:
        settings = client.Configuration()
        await config.load_kube_config(str(here.operator.kubeconfig), client_configuration=settings)  # type: ignore[no-untyped-call]
        async with Kube(client.ApiClient(settings)) as kube:
            await script(kube, here.job("alone"))

    try:
        asyncio.run(main())
    finally:
        here.delete("alone")


def test_an_object_is_applied_over_the_very_version_that_was_looked_at_or_not_at_all(here: Here) -> None:
    async def script(kube: Kube, job: dict[str, Any]) -> None:
        manifest = objects.config_map(job, SETTINGS)
        place = ("ConfigMap", NAMESPACE, "alone-config")
        assert await kube.look(*place) is None
        await kube.apply(manifest)
        known = await kube.look(*place)
        await kube.apply(manifest, known)
        assert await kube.look(*place) == known, "what is so already is not written"
        newer = copy.deepcopy(manifest)
        newer["data"]["job.yaml"] = "newer"
        await kube.apply(newer, known)
        with pytest.raises(ApiError, match="modified") as refused:
            await kube.apply(manifest, known)
        assert refused.value.code == 409
        found = await kube.look(*place)
        assert found is not None
        assert found["data"] == newer["data"]
        here.core.delete_namespaced_config_map("alone-config", NAMESPACE)
        with pytest.raises(ApiError) as refused:
            await kube.apply(manifest, found)
        assert refused.value.code == 409
        assert await kube.look(*place) is None

    with_kube(here, script)


def test_what_there_is_no_time_for_is_left_to_the_next_look(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "BEGIN_SECONDS", 0.0)

    def made() -> list[blocking.V1ConfigMap]:
        selector = f"{objects.JOB_LABEL}=alone"
        return list(here.core.list_namespaced_config_map(NAMESPACE, label_selector=selector).items)

    async def script(kube: Kube, job: dict[str, Any]) -> None:
        manifest = objects.config_map(job, SETTINGS)
        names = [f"alone-{number}" for number in range(PARALLEL_REQUESTS + 3)]
        plan = [Create(manifest | {"metadata": manifest["metadata"] | {"name": name}}) for name in names]
        carry_out = Executor(kube).carry_out
        assert not await carry_out(job, plan, lambda *_: None)
        assert len(made()) == PARALLEL_REQUESTS
        assert await carry_out(job, plan[PARALLEL_REQUESTS:], lambda *_: None)
        assert len(made()) == len(plan)

    with_kube(here, script)
