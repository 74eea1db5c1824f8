"""Why workers are not there yet, or do not run yet: the reason for programs, and a sentence for people."""

from __future__ import annotations

from dataclasses import dataclass

from internlm_operator.failures import Pod

# Why a container waits when nothing is wrong.
_HARMLESS_WAITS = ("", "PodInitializing", "ContainerCreating")
# What the API server's refusals have in their messages, and the condition's reason for each.
_REFUSALS = (
    ("exceeded quota", "QuotaExceeded"),
    ("is being terminated", "NamespaceTerminating"),
    ("PodSecurity", "PodSecurityViolated"),
    # Policies and webhooks choose their code, often that of a pod that is not valid, but not these words before their
    # own: apiserver/pkg/admission/plugin/policy/validating/dispatcher.go, plugin/webhook/errors/statuserror.go.
    ("denied request: ", "PolicyDenied"),
    ("denied the request", "PolicyDenied"),
)
INVALID_TEMPLATE = "InvalidTemplate"
REFUSED = ("PodsRefused", "NameTaken", INVALID_TEMPLATE, *(reason for _, reason in _REFUSALS))
"""Reasons for which there are no pods."""


@dataclass(frozen=True)
class Refusal:
    """The API server's answer when one of the job's objects could not be made."""

    code: int
    message: str
    kind: str = "Pod"

    @property
    def reason(self) -> str:
        """One of REFUSED."""
        if self.code == 409:
            return "NameTaken"
        invalid = self.kind == "Pod" and self.code in (400, 422)
        known = (reason for words, reason in _REFUSALS if words in self.message)
        return next(known, INVALID_TEMPLATE if invalid else "PodsRefused")

    @property
    def sentence(self) -> str:
        """The server's message, and what of the job it is about where that is known."""
        if self.reason == INVALID_TEMPLATE:
            return f"spec.template: makes a pod that is not valid: {self.message}"
        return self.message


def start_problem(pod: Pod) -> tuple[str, str] | None:
    """(reason, sentence) of what keeps a pod from starting, in the scheduler's or the kubelet's words."""
    status = pod.get("status") or {}
    name = pod["metadata"]["name"]
    for condition in status.get("conditions") or []:
        unscheduled = condition.get("type") == "PodScheduled" and condition.get("status") == "False"
        if unscheduled and condition.get("reason") in ("Unschedulable", "SchedulingGated"):
            return condition["reason"], f"{name}: {condition.get('message') or 'no node fits.'}"
    for container in (status.get("initContainerStatuses") or []) + (status.get("containerStatuses") or []):
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason", "") not in _HARMLESS_WAITS:
            return waiting["reason"], f"{name}: {waiting.get('message') or waiting['reason']}"
    return None
