"""The API calls of the plugin, made as kubectl would make them; objects are dicts, as the API gives them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Self

import urllib3
from kubernetes import client, config

from internlm_operator.api import GROUP, KIND, PLURAL, VERSION
from internlm_operator.failures import CONTAINER
from internlm_operator.objects import EVALUATION_LABEL, JOB_LABEL, Object

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
# The client has no way to say "for ever" beside a limit for connecting.
FOLLOW_SECONDS = 30 * 86400.0
OPERATOR_SELECTOR = "app.kubernetes.io/name=internlm-operator"


class AccessError(Exception):
    """What the API server refuses, or that it cannot be reached, in one sentence."""


class Access:
    """The API server of a kubeconfig's context, and a namespace in it.

    Every method raises AccessError where the server refuses or cannot be reached.
    """

    def __init__(self, api: client.ApiClient, namespace: str) -> None:
        self._core = client.CoreV1Api(api)
        self._custom = client.CustomObjectsApi(api)
        self.namespace = namespace

    @classmethod
    def connect(cls, kubeconfig: str | None, context: str | None, namespace: str | None) -> Self:
        """Connect as kubectl would; AccessError without a usable kubeconfig."""
        try:
            contexts, active = config.list_kube_config_contexts(kubeconfig)  # type: ignore[no-untyped-call]
            chosen = next((c for c in contexts if c["name"] == context), None) if context else active
            if chosen is None:
                raise AccessError(f"the kubeconfig has no context {context!r}")
            api = config.new_client_from_config(  # type: ignore[no-untyped-call]
                kubeconfig, context, persist_config=False
            )
        except config.ConfigException as error:
            raise AccessError(f"no usable kubeconfig: {error}") from error
        api.configuration.retries = 1
        return cls(api, namespace or chosen["context"].get("namespace") or "default")

    def jobs(self, all_namespaces: bool) -> list[Object]:
        if all_namespaces:
            answer = self._ask(self._custom.list_cluster_custom_object, GROUP, VERSION, PLURAL)
        else:
            answer = self._ask(
                self._custom.list_namespaced_custom_object, GROUP, VERSION, self.namespace, PLURAL
            )
        items: list[Object] = answer["items"]
        return items

    def job(self, name: str) -> Object:
        found: Object = self._ask(
            self._custom.get_namespaced_custom_object, GROUP, VERSION, self.namespace, PLURAL, name
        )
        return found

    def annotate(self, name: str, annotation: str, value: str) -> None:
        """Set an annotation of the job."""
        patch = {"metadata": {"annotations": {annotation: value}}}
        self._ask(
            self._custom.patch_namespaced_custom_object, GROUP, VERSION, self.namespace, PLURAL, name, patch
        )

    def pods(self, job_name: str) -> list[Object]:
        """The job's workers."""
        selector = f"{JOB_LABEL}={job_name},!{EVALUATION_LABEL}"
        return self._items(self._core.list_namespaced_pod, self.namespace, label_selector=selector)

    def operator_pods(self, namespace: str) -> list[Object]:
        return self._items(self._core.list_namespaced_pod, namespace, label_selector=OPERATOR_SELECTOR)

    def events(self, job_name: str, pods: list[Object] | None = None) -> list[Object]:
        """Events of the job, and of these pods."""
        names = {(KIND, job_name)} | {("Pod", pod["metadata"]["name"]) for pod in pods or []}
        if pods:
            found = self._items(self._core.list_namespaced_event, self.namespace)
        else:
            selector = f"involvedObject.name={job_name},involvedObject.kind={KIND}"
            found = self._items(self._core.list_namespaced_event, self.namespace, field_selector=selector)
        return [
            e for e in found if (e["involvedObject"].get("kind"), e["involvedObject"].get("name")) in names
        ]

    def log(
        self, pod: Object, follow: bool = False, tail: int | None = None, limit: int | None = None
    ) -> Iterator[str]:
        """Lines of the first container's log, the trainer's in a worker."""
        metadata = pod["metadata"]
        names = [container["name"] for container in pod["spec"]["containers"]]
        response = self._ask(
            self._core.read_namespaced_pod_log,
            metadata["name"],
            metadata["namespace"],
            container=CONTAINER if CONTAINER in names else names[0],
            _preload_content=False,
            **({"follow": True} if follow else {}),
            **({"tail_lines": tail} if tail is not None else {}),
            **({"limit_bytes": limit} if limit is not None else {}),
            _request_timeout=(CONNECT_SECONDS, FOLLOW_SECONDS if follow else READ_SECONDS),
        )
        rest = b""
        try:
            for chunk in response.stream(decode_content=False):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
            if rest:
                yield rest.decode(errors="replace")
        except urllib3.exceptions.HTTPError as error:
            raise AccessError(f"the log of {metadata['name']} broke off: {error}") from error
        finally:
            response.release_conn()

    def _items(self, call: Any, *arguments: Any, **options: Any) -> list[Object]:
        response = self._ask(call, *arguments, _preload_content=False, **options)
        items: list[Object] = json.loads(response.data).get("items") or []
        return items

    def _ask(self, call: Any, *arguments: Any, **options: Any) -> Any:
        options = {"_request_timeout": (CONNECT_SECONDS, READ_SECONDS)} | options
        try:
            return call(*arguments, **options)
        except client.ApiException as error:
            raise AccessError(_sentence(error)) from error
        except urllib3.exceptions.HTTPError as error:
            raise AccessError(f"the API server cannot be reached: {error}") from error


def _sentence(error: client.ApiException) -> str:
    try:
        return str(json.loads(error.body or "")["message"])
    except (ValueError, KeyError, TypeError):
        return f"the API server answers {error.status}: {error.reason}"
