"""kopf's part: watching jobs, their pods, and nodes.

Only `on.event` handlers: kopf then writes nothing to the objects, neither finalizers nor annotations.  There
is no index over pods either; it costs time quadratic in their number, and the controller's caches are by job.
"""

from __future__ import annotations

from typing import Any, cast

import kopf

from internlm_operator.api import GROUP, PLURAL, VERSION
from internlm_operator.controller import Controller
from internlm_operator.objects import JOB_LABEL, Object


def registry(controller: Controller, watch_nodes: bool) -> kopf.OperatorRegistry:
    """Handlers that tell `controller` what the watches see."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    def login(**arguments: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def job_event(event: kopf.RawEvent, **_: Any) -> None:
        controller.on_job(event["type"], cast(Object, event["object"]))

    @kopf.on.event("v1", "pods", labels={JOB_LABEL: kopf.PRESENT}, registry=registry)
    async def pod_event(event: kopf.RawEvent, **_: Any) -> None:
        controller.on_pod(event["type"], cast(Object, event["object"]))

    if watch_nodes:

        @kopf.on.event("v1", "nodes", registry=registry)
        async def node_event(event: kopf.RawEvent, **_: Any) -> None:
            controller.on_node(event["type"], cast(Object, event["object"]))

    return registry


class NoDiffs(kopf.DiffBaseStorage):
    """kopf compares each object with its last version for handlers of changes, which we have none of.

    The copies that it makes for that were five sixths of what an event of a pod cost.
    """

    def build(self, **_: Any) -> kopf.BodyEssence:
        return cast(kopf.BodyEssence, {})

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        return None

    def store(self, **_: Any) -> None:
        """Not reached: only handlers of changes store."""


def settings() -> kopf.OperatorSettings:
    """kopf's settings for fixed resources and no more rights than they need."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.persistence.diffbase_storage = NoDiffs()
    # kopf keeps a task for each object that changed lately; a thousand pods are made or end at once.
    settings.queueing.idle_timeout = 0.5
    # Looking for new resources and namespaces would need the right to list them all.
    settings.scanning.disabled = True
    # The server sends the workers' pods only, not the whole cluster's.
    settings.watching.label_selectors["v1", "pods"] = JOB_LABEL
    return settings
