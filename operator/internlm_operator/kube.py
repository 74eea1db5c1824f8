"""The few calls of the Kubernetes API that the operator makes; objects are dicts, as the API gives them.

The rights that they need are those of the chart (`templates/rbac.yaml`): a test compares the two both ways.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Self
from urllib.parse import quote

import aiohttp
from kubernetes.aio import client, config

from internlm_operator.api import API_VERSION, KIND, PLURAL
from internlm_operator.metrics import API_REQUESTS
from internlm_operator.objects import JOB_LABEL, Object
from internlm_operator.times import ServerClock

FIELD_MANAGER = "internlm-operator"
TIMEOUT_SECONDS = 30.0
# Pods of one answer: some megabytes, which take some hundredths of a second to parse.
PAGE = 500
_RESOURCES = {
    "Pod": ("/api/v1", "pods"),
    "Service": ("/api/v1", "services"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "Secret": ("/api/v1", "secrets"),
    "Event": ("/api/v1", "events"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "PodDisruptionBudget": ("/apis/policy/v1", "poddisruptionbudgets"),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
    KIND: (f"/apis/{API_VERSION}", PLURAL),
}


class ApiError(Exception):
    """The API server's refusal; `code` is the HTTP status, 0 where it could not be reached."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code}: {message}" if code else message)
        self.code = code
        self.message = message


class Kube:
    """A connection to the API server, from the pod's service account or else the user's kubeconfig.

    Every method raises ApiError where the server refuses or cannot be reached.
    """

    def __init__(
        self,
        api: client.ApiClient,
        seconds_left: Callable[[], float] | None = None,
        clock: ServerClock | None = None,
    ) -> None:
        self._api = api
        self._seconds_left = seconds_left
        self._clock = clock or ServerClock()

    def fenced(self, seconds_left: Callable[[], float]) -> Kube:
        """The same connection, writing only while `seconds_left()` is above 0, and no write takes longer."""
        return Kube(self._api, seconds_left, self._clock)

    def now(self) -> datetime:
        """The time by the API server's clock."""
        return self._clock.now()

    @classmethod
    async def connect(cls) -> Self:
        """Connect as kubectl would.

        Raises ApiError if there is neither a service account nor a kubeconfig.
        """
        configuration = client.Configuration()
        try:
            config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
        except config.ConfigException:
            try:
                await config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
            except config.ConfigException as error:
                raise ApiError(0, f"found no service account and no kubeconfig: {error}") from error
        return cls(client.ApiClient(configuration))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._api.close()  # type: ignore[no-untyped-call]

    # Reading

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """The object; None if there is none."""
        try:
            return await self._call("GET", _path(kind, namespace, name))
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    async def look(self, kind: str, namespace: str, name: str) -> Object | None:
        """The object, by a patch that changes nothing: who may patch this one need not be allowed to read all."""
        try:
            return await self._call(
                "PATCH", _path(kind, namespace, name), {}, content_type="application/merge-patch+json"
            )
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    async def pods_of(self, namespace: str, job_name: str) -> AsyncIterator[Object]:
        """The pods with the job's label, as they are now."""
        query = [("labelSelector", f"{JOB_LABEL}={job_name}"), ("limit", str(PAGE))]
        following: list[tuple[str, str]] = []
        while True:
            answer = await self._call("GET", _path("Pod", namespace), query=query + following)
            for pod in answer.get("items") or []:
                yield pod
            token = (answer.get("metadata") or {}).get("continue")
            if not token:
                return
            following = [("continue", token)]

    async def can_list_jobs(self, namespace: str | None) -> bool:
        """Whether the API server knows the custom resource."""
        folder, plural = _RESOURCES[KIND]
        path = f"{folder}/namespaces/{quote(namespace)}/{plural}" if namespace else f"{folder}/{plural}"
        try:
            await self._call("GET", path, query=[("limit", "1")])
        except ApiError as error:
            if error.code == 404:
                return False
            raise
        return True

    # Writing

    async def apply(self, manifest: Object, known: Object | None = None) -> None:
        """Make the object so, whoever set it otherwise (server-side apply); it is made if it is not there.

        `known`: the object as it was looked at.  Raises ApiError with code 409 if it is not that any more, by its
        uid and resourceVersion.
        """
        metadata = manifest["metadata"]
        if known is not None:
            metadata = metadata | {name: known["metadata"][name] for name in ("uid", "resourceVersion")}
        await self._call(
            "PATCH",
            _path(manifest["kind"], metadata["namespace"], metadata["name"]),
            manifest | {"metadata": metadata},
            query=[("fieldManager", FIELD_MANAGER), ("force", "true")],
            content_type="application/apply-patch+yaml",
        )

    async def create(self, manifest: Object) -> Object | None:
        """Make the object; None if one of this name exists. Unknown fields are refused."""
        path = _path(manifest["kind"], manifest["metadata"]["namespace"])
        query = [("fieldManager", FIELD_MANAGER), ("fieldValidation", "Strict")]
        try:
            return await self._call("POST", path, manifest, query)
        except ApiError as error:
            if error.code == 409:
                return None
            raise

    async def replace(self, manifest: Object) -> Object:
        """Make the object so if it is still the one read (by its resourceVersion); else ApiError with code 409."""
        metadata = manifest["metadata"]
        path = _path(manifest["kind"], metadata["namespace"], metadata["name"])
        return await self._call("PUT", path, manifest, query=[("fieldManager", FIELD_MANAGER)])

    async def delete(
        self, kind: str, namespace: str, name: str, uid: str, grace_seconds: int | None = None
    ) -> Object | None:
        """Delete this very object, and give it as it is then.

        None for one that is gone, or is another one of this name by now, which is left alone.
        """
        options: Object = {"preconditions": {"uid": uid}, "propagationPolicy": "Background"}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        try:
            return await self._call("DELETE", _path(kind, namespace, name), options)
        except ApiError as error:
            if error.code in (404, 409):
                return None
            raise

    async def patch_status(self, job: Object, patch: Object) -> Object:
        """Merge `patch` into the job's status, if the job is still the one given (by its resourceVersion).

        Returns the job as it is then.  Raises ApiError with code 409 if it is not.
        """
        metadata = job["metadata"]
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"], "uid": metadata["uid"]}}
        return await self._call(
            "PATCH",
            _path(KIND, metadata["namespace"], metadata["name"]) + "/status",
            body | {"status": patch},
            query=[("fieldManager", FIELD_MANAGER)],
            content_type="application/merge-patch+json",
        )

    async def review_token(self, token: str, audience: str) -> Object:
        """The `status` of a TokenReview for this audience."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        answer = await self._call("POST", "/apis/authentication.k8s.io/v1/tokenreviews", body)
        return answer.get("status") or {}

    async def _call(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        query: list[tuple[str, str]] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        code: int | None = None
        sent = datetime.now(UTC)
        try:
            request = await self._api.param_serialize(
                method,
                path,
                query_params=query or [],
                header_params={"Accept": "application/json", "Content-Type": content_type},
                body=body,
                auth_settings=["BearerToken"],
            )
            seconds = TIMEOUT_SECONDS if method == "GET" else self._seconds_to_write()
            response = await self._api.call_api(*request, _request_timeout=seconds)
            received = datetime.now(UTC)
            content = await response.read()  # type: ignore[no-untyped-call]
            self._clock.heard(response.headers.get("Date", ""), sent, received)
            code = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            code = 0
            reason = str(error) or type(error).__name__
            raise ApiError(0, f"the API server cannot be reached: {reason}") from error
        finally:
            if code is not None:
                API_REQUESTS.labels(*_verb_and_resource(method, path), code).inc()
        answer: Object
        try:
            answer = json.loads(content) if content else {}
        except ValueError:
            answer = {"message": content.decode(errors="replace")[:1024]}
        if not 200 <= code <= 299:
            raise ApiError(code, str(answer.get("message") or "refused without a reason"))
        return answer

    def _seconds_to_write(self) -> float:
        left = TIMEOUT_SECONDS if self._seconds_left is None else self._seconds_left()
        if left <= 0:
            raise ApiError(0, "this replica does not lead (any more), and writes nothing")
        return min(TIMEOUT_SECONDS, left)


def _path(kind: str, namespace: str, name: str | None = None) -> str:
    folder, plural = _RESOURCES[kind]
    path = f"{folder}/namespaces/{quote(namespace)}/{plural}"
    return f"{path}/{quote(name)}" if name is not None else path


_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


def _verb_and_resource(method: str, path: str) -> tuple[str, str]:
    """As in access rules: a subresource follows its resource after a slash."""
    _, namespaced, rest = path.partition("/namespaces/")
    if not namespaced:
        return ("list" if method == "GET" else _VERBS[method]), path.rpartition("/")[2]
    resource, name, *subresource = [*rest.split("/")[1:], ""]
    verb = "list" if method == "GET" and not name else _VERBS[method]
    return verb, "/".join([resource, *filter(None, subresource)])
