"""The helm chart: what it accepts, how it starts the operator, and which rights it gives."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from charts.chart import CHART, NAMESPACE, ROOT, pod_template, render
from cluster.cluster import Cluster
from cluster.controlplane import wait_until
from internlm_operator import api, cli, objects

ACCOUNT = f"system:serviceaccount:{NAMESPACE}:internlm-operator"


def test_helm_lint_finds_nothing(helm: str) -> None:
    done = subprocess.run([helm, "lint", "--strict", str(CHART)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout


@pytest.fixture(scope="module")
def generator() -> Any:
    """manifests/install.py, which writes what is made from the chart."""
    specification = importlib.util.spec_from_file_location("install", ROOT / "manifests" / "install.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_what_is_made_from_the_chart_is_committed(helm: str, generator: Any) -> None:
    made = generator.outputs(helm)
    assert {path.name for path in made} == {"install.yaml", "README.md", "full.yaml", "namespaced.yaml"}
    for path, text in made.items():
        assert path.read_text() == text, f"{path}: run `make install-manifest` and commit what it writes"


def test_the_install_manifest_makes_its_namespace_and_leaves_out_what_is_helms(
    helm: str, generator: Any
) -> None:
    objects = list(yaml.safe_load_all(generator.install_manifest(helm)))
    kinds = [o["kind"] for o in objects]
    assert kinds[0] == "Namespace"
    assert "CustomResourceDefinition" in kinds
    assert not [o for o in objects if "helm" in json.dumps(o["metadata"])]


def test_every_value_is_explained(generator: Any) -> None:
    text = (CHART / "values.yaml").read_text()
    explained = {path for path, _, _ in generator.commented_values(text)}

    def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in values.items():
            path = prefix + name
            if isinstance(value, dict) and value and path not in explained:
                yield from leaves(value, f"{path}.")
            else:
                yield path

    assert set(leaves(yaml.safe_load(text))) == explained


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("imagePullPolicy=Never", "additional properties 'imagePullPolicy' not allowed"),
        ("image.pullpolicy=Never", "additional properties 'pullpolicy' not allowed"),
        ("image.pullPolicy=Sometimes", "value must be one of 'Always', 'IfNotPresent', 'Never'"),
        ("image.digest=latest", "does not match pattern"),
        ("service.port=0", "minimum: got 0, want 1"),
        ("watchNamespaces={Team_A}", "does not match pattern"),
        ("crds.enabled=maybe", "got string, want boolean"),
        ("networkPolicy.jobs.egres={}", "additional properties 'egres' not allowed"),
        ("podDisruptionBudget.maxUnavailable=half", "does not match pattern"),
        ("monitoring.podMonitor.interval=often", "does not match pattern"),
    ],
)
def test_a_value_that_is_wrong_is_refused(helm: str, setting: str, sentence: str) -> None:
    with pytest.raises(RuntimeError) as refused:
        render(helm, f"--set={setting}")
    assert sentence in str(refused.value)


def test_images_are_named_by_tag_or_by_digest(helm: str) -> None:
    digest = "sha256:" + "0" * 64
    for settings, image in (
        ([], "internlm-operator:0.1.0"),
        (["--set-string=image.tag=1"], "internlm-operator:1"),
        (["--set-string=image.tag=1", f"--set=image.digest={digest}"], f"internlm-operator@{digest}"),
    ):
        [container] = pod_template(render(helm, *settings))["spec"]["containers"]
        assert container["image"] == image


def test_the_definition_can_be_left_out_or_kept(helm: str) -> None:
    def definitions(*arguments: str) -> list[dict[str, Any]]:
        return [o for o in render(helm, *arguments) if o["kind"] == "CustomResourceDefinition"]

    [kept] = definitions()
    assert kept["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    [removed] = definitions("--set=crds.keep=false")
    assert "annotations" not in removed["metadata"]
    assert (
        removed["spec"] == kept["spec"] == yaml.safe_load((ROOT / "manifests/crd.yaml").read_text())["spec"]
    )
    assert definitions("--set=crds.enabled=false") == []


def test_the_service_is_where_the_workers_are_told_to_report(helm: str) -> None:
    rendered = render(helm, "--set=service.port=9443")
    [service] = [o for o in rendered if o["kind"] == "Service"]
    template = pod_template(rendered)
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    [port] = [port for port in service["spec"]["ports"] if port["name"] == "https"]
    assert port["port"] == 9443
    [container] = template["spec"]["containers"]
    assert port["targetPort"] in {p["name"] for p in container["ports"]}
    options = parse(container["args"])
    assert options["service_name"] == service["metadata"]["name"]
    assert options["service_namespace"] == service["metadata"]["namespace"] == NAMESPACE
    assert options["service_port"] == 9443
    assert options["channel_port"] in {p["containerPort"] for p in container["ports"]}


def parse(arguments: list[str]) -> dict[str, Any]:
    """The command line as the operator reads it; click's UsageError for one that it does not know."""
    command = typer.main.get_command(cli.app).commands[arguments[0]]  # type: ignore[attr-defined]
    options: dict[str, Any] = command.make_context(arguments[0], arguments[1:]).params
    return options


def test_the_values_reach_the_operator(helm: str) -> None:
    settings = ("watchNamespaces={a,b}", "logFormat=text", "trainer.image.repository=registry/trainer")
    [container] = pod_template(render(helm, *(f"--set={setting}" for setting in settings)))["spec"][
        "containers"
    ]
    options = parse(container["args"])
    assert options["namespace"] == ["a", "b"]
    assert options["log_format"].value == "text"
    assert json.loads(options["network_policy"]).keys() == {"ingress", "egress"}
    assert options["trainer_image"] == "registry/trainer:0.1.0"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        port = container[probe]["httpGet"]["port"]
        assert {"name": port, "containerPort": options["liveness"]} in container["ports"]


def test_who_the_network_policies_let_in(helm: str) -> None:
    """By the labels that workers, operator and the test's pod really have."""
    rendered = render(helm)
    [policy] = [o for o in rendered if o["kind"] == "NetworkPolicy"]
    labels = pod_template(rendered)["metadata"]["labels"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    [replica, worker, test] = policy["spec"]["ingress"][0]["from"]
    assert replica["podSelector"]["matchLabels"].items() <= labels.items()
    assert worker["podSelector"]["matchExpressions"] == [{"key": objects.JOB_LABEL, "operator": "Exists"}]
    [pod] = [o for o in rendered if o["kind"] == "Pod"]
    assert test["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    rules = json.loads(parse(pod_template(rendered)["spec"]["containers"][0]["args"])["network_policy"])
    [operator] = rules["egress"][0]["to"]
    assert operator["podSelector"]["matchLabels"].items() <= labels.items()
    assert operator["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": NAMESPACE}


def test_the_test_asks_the_service_for_the_channel(helm: str) -> None:
    rendered = render(helm, "--set=service.port=9443")
    [service] = [o for o in rendered if o["kind"] == "Service"]
    [pod] = [o for o in rendered if o["kind"] == "Pod"]
    assert not service["spec"]["selector"].items() <= pod["metadata"]["labels"].items(), "it would ask itself"
    options = parse(pod["spec"]["containers"][0]["args"])
    assert options["url"] == f"https://internlm-operator.{NAMESPACE}.svc:9443"
    [volume] = pod["spec"]["volumes"]
    secret = parse(pod_template(rendered)["spec"]["containers"][0]["args"])["secret_name"]
    assert volume["secret"] == {"secretName": secret, "items": [{"key": "ca.crt", "path": "ca.crt"}]}


@pytest.fixture(scope="module")
def installed(control_plane: Cluster) -> Iterator[Cluster]:
    """The chart's rights on a real API server, with two namespaces of jobs; nothing else of it."""
    for namespace in (NAMESPACE, "chart-test-a", "chart-test-b"):
        control_plane.kubectl("create", "namespace", namespace)
    control_plane.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
    control_plane.kubectl("apply", "--filename=manifests/crd.yaml")
    yield control_plane
    control_plane.kubectl("delete", "namespace", NAMESPACE, "chart-test-a", "chart-test-b", "--wait=false")


@pytest.fixture
def rights(installed: Cluster, helm: str) -> Iterator[Any]:
    """Installs the chart's rights with some values; they go away with the test."""
    applied = []

    def install(*arguments: str) -> Cluster:
        kinds = ("ServiceAccount", "Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding")
        wanted = [o for o in render(helm, *arguments) if o["kind"] in kinds]
        applied.append(json.dumps({"apiVersion": "v1", "kind": "List", "items": wanted}))
        installed.kubectl("apply", "--filename=-", input=applied[-1])
        return installed

    yield install
    for manifest in applied:
        installed.kubectl("delete", "--filename=-", "--ignore-not-found", input=manifest)


def may(cluster: Cluster, what: str, namespace: str, who: str = ACCOUNT) -> bool:
    """Whether somebody may do it: `verb resource [name]`."""
    verb, resource, *name = what.split()
    subresource = resource.partition("/")[2]
    target = resource.partition("/")[0] + (f"/{name[0]}" if name else "")
    arguments = ["auth", "can-i", verb, target, f"--as={who}", f"--namespace={namespace}"]
    if subresource:
        arguments.append(f"--subresource={subresource}")
    return cluster.kubectl(*arguments, check=False).strip() == "yes"


ALLOWED = (
    "get internlmjobs", "list internlmjobs", "watch internlmjobs", "delete internlmjobs",
    "patch internlmjobs/status", "update internlmjobs/finalizers",
    "get pods", "list pods", "watch pods", "create pods", "delete pods",
    "create services", "patch services", "create configmaps", "patch configmaps", "create events",
    "create networkpolicies.networking.k8s.io", "patch networkpolicies.networking.k8s.io",
    "create poddisruptionbudgets.policy", "patch poddisruptionbudgets.policy",
)  # fmt: skip
REFUSED = (
    "create internlmjobs", "update internlmjobs", "patch internlmjobs", "patch pods", "create pods/exec",
    "get pods/log", "get secrets", "list secrets", "get configmaps", "delete services", "get nodes",
    "patch nodes", "delete poddisruptionbudgets.policy",
    "list namespaces", "get serviceaccounts", "create deployments", "create roles", "impersonate users",
    "* *",
)  # fmt: skip


@pytest.mark.cluster
def test_the_operator_may_do_what_it_does_and_nothing_else(rights: Any) -> None:
    cluster = rights()
    for what in ALLOWED:
        assert may(cluster, what, "chart-test-a"), what
    for what in REFUSED:
        assert not may(cluster, what, "chart-test-a"), what
    assert may(cluster, "create tokenreviews.authentication.k8s.io", "")
    assert may(cluster, "list nodes", "")
    assert may(cluster, "watch nodes", "")
    assert may(cluster, "create secrets", NAMESPACE)
    for verb in ("get", "update"):
        assert may(cluster, f"{verb} secrets internlm-operator-channel", NAMESPACE)
        assert not may(cluster, f"{verb} secrets another", NAMESPACE)
        assert may(cluster, f"{verb} leases internlm-operator", NAMESPACE)
        assert not may(cluster, f"{verb} leases another", NAMESPACE)
    assert not may(cluster, "create secrets", "chart-test-a")


@pytest.mark.cluster
def test_its_rights_end_at_the_namespaces_that_it_watches(rights: Any) -> None:
    cluster = rights("--set=watchNamespaces={chart-test-a}")
    for what in ALLOWED:
        assert may(cluster, what, "chart-test-a"), what
        assert not may(cluster, what, "chart-test-b"), what
        assert not may(cluster, what, NAMESPACE), what
    assert may(cluster, "create tokenreviews.authentication.k8s.io", "")


@pytest.mark.cluster
def test_who_may_edit_or_view_a_namespace_may_do_so_with_its_jobs(rights: Any) -> None:
    cluster = rights()
    for role in ("edit", "view"):
        cluster.kubectl(
            "create",
            "rolebinding",
            role,
            f"--clusterrole={role}",
            f"--user={role}",
            "--namespace=chart-test-a",
        )
    wait_until(
        lambda: may(cluster, "get internlmjobs", "chart-test-a", "view"), "the aggregation of the roles", 30
    )
    for what in ("get internlmjobs", "watch internlmjobs", "get internlmjobs/scale"):
        assert may(cluster, what, "chart-test-a", "view"), what
        assert may(cluster, what, "chart-test-a", "edit"), what
        assert not may(cluster, what, "chart-test-b", "view"), what
    for what in ("create internlmjobs", "patch internlmjobs", "patch internlmjobs/scale"):
        assert may(cluster, what, "chart-test-a", "edit"), what
        assert not may(cluster, what, "chart-test-a", "view"), what
    assert not may(cluster, "patch internlmjobs/status", "chart-test-a", "edit")


@pytest.mark.cluster
def test_without_node_health_it_may_not_look_at_nodes(rights: Any) -> None:
    cluster = rights("--set=nodeHealth.enabled=false")
    assert not may(cluster, "list nodes", "")
    assert not may(cluster, "watch nodes", "")


@pytest.mark.cluster
def test_the_pod_security_standard_restricted_admits_the_operator(rights: Any, helm: str) -> None:
    cluster = rights()
    template = pod_template(render(helm))
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    pod["metadata"] = pod["metadata"] | {"name": "operator", "namespace": NAMESPACE}
    cluster.kubectl("create", "--dry-run=server", "--filename=-", input=json.dumps(pod))
    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    with pytest.raises(RuntimeError, match="violates PodSecurity"):
        cluster.kubectl("create", "--dry-run=server", "--filename=-", input=json.dumps(pod))


@pytest.mark.cluster
@pytest.mark.parametrize("name", ["full", "namespaced"])
def test_a_real_api_server_takes_every_object(installed: Cluster, name: str) -> None:
    """All but those of the Prometheus operator, whose definitions are not installed."""
    made = [o for o in yaml.safe_load_all((ROOT / f"tests/charts/golden/{name}.yaml").read_text()) if o]
    rules = parse(pod_template(made)["spec"]["containers"][0]["args"])["network_policy"]
    for manifest in made:
        manifest["metadata"]["namespace"] = NAMESPACE
    if rules:
        job = {"metadata": {"name": "job", "namespace": NAMESPACE, "uid": "1"}}
        made.append(objects.network_policy(job, json.loads(rules)))
    wanted = [o for o in made if "monitoring.coreos.com" not in o["apiVersion"]]
    assert len(wanted) > 8
    for manifest in wanted:
        installed.kubectl(
            "create", "--dry-run=server", "--validate=strict", "--filename=-", input=json.dumps(manifest)
        )


@pytest.mark.cluster
def test_helm_upgrades_the_definition_and_leaves_it_with_the_jobs(
    installed: Cluster, helm: str, tmp_path: Path
) -> None:
    """From a chart whose definition is older by a field, over an uninstallation, to an installation anew."""
    older = shutil.copytree(CHART, tmp_path / "older")
    file = older / "templates" / "crd.yaml"
    text = file.read_text()
    file.write_text(
        re.sub(r"^( +)ttlSecondsAfterFinished:\n(\1 .*\n)+", "", text, count=1, flags=re.MULTILINE)
    )
    assert file.read_text() != text
    job = {
        "apiVersion": api.API_VERSION,
        "kind": api.KIND,
        "metadata": {"name": "kept", "namespace": NAMESPACE},
    }

    def run(*arguments: str) -> None:
        place = (f"--kubeconfig={installed.kubeconfig}", f"--namespace={NAMESPACE}")
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        done = subprocess.run([helm, *arguments, *place], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def known() -> bool:
        return "ttlSecondsAfterFinished" in installed.kubectl("explain", "internlmjob.spec")

    run("install", "upgraded", str(older), "--take-ownership", "--force-conflicts")
    wait_until(lambda: not known(), "the older definition", 30)
    spec = yaml.safe_load((ROOT / "manifests/examples/internlm-7b.yaml").read_text())["spec"]
    installed.apply(
        job | {"spec": {name: value for name, value in spec.items() if name != "ttlSecondsAfterFinished"}}
    )
    run("upgrade", "upgraded", str(CHART))
    wait_until(known, "the newer definition", 30)
    run("uninstall", "upgraded")
    assert "kept" in installed.kubectl("get", "ilj", f"--namespace={NAMESPACE}", "--output=name")
    run("install", "upgraded", str(CHART))
    run("uninstall", "upgraded")
    installed.kubectl("delete", "ilj", "kept", f"--namespace={NAMESPACE}")


@pytest.mark.cluster
def test_kubectl_installs_and_removes_all_of_it_with_one_file(control_plane: Cluster) -> None:
    control_plane.kubectl("apply", "--filename=manifests/install.yaml")
    try:
        image = "--output=jsonpath={.items[*].spec.containers[*].image}"
        pods = ("get", "pods", "--namespace=internlm-system", image)
        # The namespace enforces 'restricted': that there is a pod says that it was admitted.
        wait_until(
            lambda: set(control_plane.kubectl(*pods).split()) == {"internlm-operator:0.1.0"},
            "the operator's pods",
            30,
        )
        assert "KIND" in control_plane.kubectl("explain", "internlmjob.spec.training.optimizer.lr")
    finally:
        control_plane.kubectl("delete", "--filename=manifests/install.yaml", "--timeout=60s")
    kinds = "customresourcedefinitions,clusterroles,clusterrolebindings"
    assert "internlm" not in control_plane.kubectl("get", kinds, "--output=name")
