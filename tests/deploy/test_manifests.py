"""Every overlay and every combination of components is right by Kubernetes' schemas and by our rules."""

import os
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from kubernetes_validate import SchemaNotFoundError, ValidationError, validate
from kubernetes_validate.utils import all_versions

from tests.deploy.manifests import (
    COMPONENTS,
    K8S,
    SERVICES,
    Manifests,
    Object,
    every_combination,
    in_bytes,
    in_cores,
    named,
    overlay,
    problems,
    render,
)
from tests.support.mesh import ROOT

# The first test waits until all combinations are rendered.
pytestmark = pytest.mark.timeout(180)
# From this version on preStop's sleep and the autoscaler's metric of one container need no feature gate.
OLDEST = (1, 30)
VERSIONS = [
    found.rpartition(".")[0]
    for found in dict.fromkeys(all_versions())
    if tuple(map(int, found.split(".")[:2])) >= OLDEST
]
# The fields that the restricted Pod Security Standard allows a pod.
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
CUSTOM_GROUPS = (
    "cert-manager.io",
    "gateway.envoyproxy.io",
    "gateway.networking.k8s.io",
    "keda.sh",
    "monitoring.coreos.com",
)
# These are made by the cluster's administrator, as the README says.
GIVEN_SECRETS = {"unlatch-ingress"}


@pytest.mark.parametrize("kubernetes", VERSIONS)
def test_schemas(kubernetes: str) -> None:
    """Every object has the fields that its schema requires, and no unknown ones, in each version of Kubernetes."""
    wrong, seen = [], set[str]()
    for manifests in every_combination():
        for found in manifests.objects:
            if (text := repr(found)) in seen:
                continue
            seen.add(text)
            try:
                validate(found, kubernetes, strict=True)
            except ValidationError as error:
                wrong.append(f"{manifests.name}: {named(found)}: {error.message}")
            except SchemaNotFoundError:
                if found["apiVersion"].partition("/")[0] not in CUSTOM_GROUPS:
                    wrong.append(f"{manifests.name}: {named(found)} is of no kind that there is")
    assert wrong == []


def test_the_readme_says_which_kubernetes_is_needed() -> None:
    """The README names the first version that knows everything. The schemas of an older one refuse it."""
    assert f"Kubernetes {'.'.join(map(str, OLDEST))} or newer" in (ROOT / "deploy/k8s/README.md").read_text()
    with pytest.raises(ValidationError, match="sleep"):
        validate(overlay("dev").one("Deployment", "unlatch-gateway"), "1.28", strict=True)


def test_images() -> None:
    """Images have the project's version, and no tag that moves."""

    def look(manifests: Manifests) -> Iterator[str]:
        for service in SERVICES:
            image = manifests.container(service)["image"]
            if image != f"unlatch-{service}:{version('unlatch')}":
                yield f"{service} runs {image}"

    assert problems(look) == {}


def test_resources() -> None:
    """Every container requests what it needs and has a limit. Memory, which no one gives back, has both the same."""

    def look(manifests: Manifests) -> Iterator[str]:
        for service in SERVICES:
            resources = manifests.container(service)["resources"]
            if not in_cores(resources["requests"]["cpu"]) <= in_cores(resources["limits"]["cpu"]):
                yield f"{service} asks for more cores than it may have"
            if in_bytes(resources["requests"]["memory"]) != in_bytes(resources["limits"]["memory"]):
                yield f"{service} may have another amount of memory than it asks for"

    assert problems(look) == {}


def test_pod_security() -> None:
    """Pods keep to the restricted standard, which their namespace enforces, and can write to /tmp alone."""

    def look(manifests: Manifests) -> Iterator[str]:
        (namespace,) = manifests.of("Namespace")
        if namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] != "restricted":
            yield "the namespace enforces nothing"
        for service in SERVICES:
            pod, container = manifests.pod(service), manifests.container(service)
            yield from (f"{service}: {wrong}" for wrong in (*_of_pod(pod), *_of_container(container)))

    assert problems(look) == {}


def _of_pod(pod: Object) -> Iterator[str]:
    wanted = {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "fsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if pod["securityContext"] != wanted:
        yield f"its pod's security context is {pod['securityContext']}"
    yield from (f"it has {name}" for name in ("hostNetwork", "hostPID", "hostIPC", "initContainers") if pod.get(name))
    if pod["automountServiceAccountToken"] is not False:
        yield "it gets a token"
    if pod["enableServiceLinks"] is not False:
        yield "services become variables"
    for volume in pod["volumes"]:
        if not volume.keys() - {"name"} <= VOLUMES:
            yield f"volume {volume['name']} is of a kind that is not restricted"
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"volume {volume['name']} has no end"


def _of_container(container: Object) -> Iterator[str]:
    wanted = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    if container["securityContext"] != wanted:
        yield f"its security context is {container['securityContext']}"
    if any("hostPort" in port for port in container["ports"]):
        yield "it takes a node's port"
    if "/tmp" not in {mount["mountPath"] for mount in container["volumeMounts"]}:
        yield "there is no /tmp"
    for mount in container["volumeMounts"]:
        if mount["mountPath"] != "/tmp" and not mount.get("readOnly"):
            yield f"{mount['mountPath']} can be written"
        if "subPath" in mount:
            yield f"{mount['mountPath']} would never be replaced"


def test_accounts_have_no_token() -> None:
    """Each service has an account of its own, without a token for the API server."""

    def look(manifests: Manifests) -> Iterator[str]:
        for service in SERVICES:
            account = manifests.one("ServiceAccount", manifests.pod(service)["serviceAccountName"])
            if account["metadata"]["name"] != f"unlatch-{service}" or account["automountServiceAccountToken"]:
                yield f"{service} runs as {account}"

    assert problems(look) == {}


def test_everything_is_in_one_namespace() -> None:
    """Every object is in the one namespace, and names its application."""

    def look(manifests: Manifests) -> Iterator[str]:
        for found in manifests.objects:
            if found["kind"] != "Namespace" and found["metadata"].get("namespace") != "unlatch":
                yield f"{named(found)} is in {found['metadata'].get('namespace')}"
        assert manifests.one("Namespace", "unlatch")

    assert problems(look) == {}


def test_another_namespace_takes_everything(tmp_path: Path) -> None:
    """An overlay's own `namespace:` changes every object and account.

    The README lists the other places of the old name.
    """
    place = tmp_path.resolve()
    kustomization = {
        "namespace": "another",
        "resources": [os.path.relpath(K8S / "overlays" / "dev", place)],
        "components": [os.path.relpath(K8S / "components" / name, place) for name in COMPONENTS],
    }
    (place / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    objects = render(place)
    assert {found["metadata"].get("namespace", found["metadata"]["name"]) for found in objects} == {"another"}
    accounts = [subject for found in objects for subject in found.get("subjects", [])]
    assert {subject["namespace"] for subject in accounts} == {"another"}
    still = {
        named(found) for found in objects if re.search(r"""unlatch\.svc|namespace['"]?[=:] ?['"]unlatch""", repr(found))
    }
    assert still == {"Certificate/unlatch-gateway", "ScaledObject/unlatch-compute"}
    readme = (K8S / "README.md").read_text()
    assert all(f"`components/{file}`" in readme for file in ("mtls/certificates.yaml", "keda/scaled-object.yaml"))


def test_what_is_named_is_there() -> None:
    """Every name that an object refers to exists: settings, secrets, accounts, targets."""

    def look(manifests: Manifests) -> Iterator[str]:
        there = {(found["kind"], found["metadata"]["name"]) for found in manifests.objects}
        there |= {("Secret", found["spec"]["secretName"]) for found in manifests.of("Certificate")}
        there |= {("Secret", name) for name in GIVEN_SECRETS}
        for by, kind, name in _names(manifests):
            if (kind, name) not in there:
                yield f"{by} names {kind}/{name}"

    assert problems(look) == {}


def _names(manifests: Manifests) -> Iterator[tuple[str, str, str]]:
    for service in SERVICES:
        pod = manifests.pod(service)
        yield service, "ServiceAccount", pod["serviceAccountName"]
        yield from ((service, "Secret", v["secret"]["secretName"]) for v in pod["volumes"] if "secret" in v)
        yield from ((service, "ConfigMap", v["configMap"]["name"]) for v in pod["volumes"] if "configMap" in v)
    for found in manifests.of("HorizontalPodAutoscaler", "ScaledObject"):
        target = found["spec"]["scaleTargetRef"]
        assert target["apiVersion"] == "apps/v1"
        yield named(found), target["kind"], target["name"]
    for found in manifests.of("Certificate"):
        yield named(found), found["spec"]["issuerRef"]["kind"], found["spec"]["issuerRef"]["name"]
    for found in manifests.of("Issuer"):
        if "ca" in found["spec"]:
            yield named(found), "Secret", found["spec"]["ca"]["secretName"]
    for found in manifests.of("Gateway"):
        for listener in found["spec"]["listeners"]:
            yield from ((named(found), "Secret", ref["name"]) for ref in listener["tls"]["certificateRefs"])
        if backend := found["spec"].get("tls", {}).get("backend"):
            yield named(found), "Secret", backend["clientCertificateRef"]["name"]
    for found in manifests.of("GRPCRoute"):
        yield from ((named(found), "Gateway", parent["name"]) for parent in found["spec"]["parentRefs"])
        for rule in found["spec"]["rules"]:
            yield from ((named(found), "Service", ref["name"]) for ref in rule["backendRefs"])
    for found in manifests.of("BackendTLSPolicy", "BackendTrafficPolicy"):
        yield from ((named(found), target["kind"], target["name"]) for target in found["spec"]["targetRefs"])
    for found in manifests.of("BackendTLSPolicy"):
        refs = found["spec"]["validation"]["caCertificateRefs"]
        yield from ((named(found), ref["kind"], ref["name"]) for ref in refs)


def test_selectors_match_pods() -> None:
    """A Service, a budget and a spread each select the pods of one Deployment."""

    def look(manifests: Manifests) -> Iterator[str]:
        pods = {
            found["metadata"]["name"]: found["spec"]["template"]["metadata"]["labels"]
            for found in manifests.of("Deployment")
        }
        for name in (f"unlatch-{service}" for service in SERVICES):
            spec = manifests.one("Deployment", name)["spec"]
            selectors = [
                spec["selector"]["matchLabels"],
                manifests.one("Service", name)["spec"]["selector"],
                manifests.one("PodDisruptionBudget", name)["spec"]["selector"]["matchLabels"],
                *(s["labelSelector"]["matchLabels"] for s in spec["template"]["spec"]["topologySpreadConstraints"]),
            ]
            for selector in selectors:
                if [other for other, labels in pods.items() if selector.items() <= labels.items()] != [name]:
                    yield f"{name}: {selector} selects others"

    assert problems(look) == {}


def test_services_lead_to_ports() -> None:
    """A Service's ports are its pods', by name. The compute service's name stands for each of its pods."""

    def look(manifests: Manifests) -> Iterator[str]:
        for service in SERVICES:
            found = manifests.one("Service", f"unlatch-{service}")
            (port,) = found["spec"]["ports"]
            ports = {one["name"]: one["containerPort"] for one in manifests.container(service)["ports"]}
            if (port["name"], port["targetPort"], port["port"]) != ("grpc", "grpc", ports["grpc"]):
                yield f"{service}: {port} is not {ports}"
            if (found["spec"].get("clusterIP") == "None") != (service == "compute"):
                yield f"{service} is headless, or should be"

    assert problems(look) == {}


def test_one_autoscaler_each() -> None:
    """Each Deployment has one autoscaler, which alone sets the number of pods.

    Its metrics are of a container that exists.
    """

    def look(manifests: Manifests) -> Iterator[str]:
        scalers = manifests.of("HorizontalPodAutoscaler", "ScaledObject")
        targets = sorted(found["spec"]["scaleTargetRef"]["name"] for found in scalers)
        if targets != ["unlatch-compute", "unlatch-gateway"]:
            yield f"autoscalers are of {targets}"
        for name in targets:
            if "replicas" in manifests.one("Deployment", name)["spec"]:
                yield f"{name} says how many itself"
        for found in scalers:
            spec = found["spec"]
            least, most = (spec.get(f"{end}Replicas") or spec.get(f"{end}ReplicaCount") for end in ("min", "max"))
            if not 1 <= least < most:
                yield f"{named(found)} has from {least} to {most}"
            for metric in spec.get("metrics", []):
                service = spec["scaleTargetRef"]["name"].removeprefix("unlatch-")
                if metric["containerResource"]["container"] != manifests.container(service)["name"]:
                    yield f"{named(found)} looks at {metric}"

    assert problems(look) == {}


def test_a_drain_of_nodes_goes_on() -> None:
    """A budget lets one pod go at a time, however few there are, and counts pods that serve alone."""

    def look(manifests: Manifests) -> Iterator[str]:
        for found in manifests.of("PodDisruptionBudget"):
            spec = {name: value for name, value in found["spec"].items() if name != "selector"}
            if spec != {"maxUnavailable": 1, "unhealthyPodEvictionPolicy": "AlwaysAllow"}:
                yield f"{named(found)}: {spec}"

    assert problems(look) == {}


def test_pods_are_spread() -> None:
    """Pods spread over nodes and zones, each version by itself."""

    def look(manifests: Manifests) -> Iterator[str]:
        for service in SERVICES:
            spread = manifests.pod(service)["topologySpreadConstraints"]
            if {one["topologyKey"] for one in spread} != {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}:
                yield f"{service}: {spread}"
            if any(one["matchLabelKeys"] != ["pod-template-hash"] for one in spread):
                yield f"{service} is spread together with what it replaces"

    assert problems(look) == {}
