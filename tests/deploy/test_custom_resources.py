"""Objects of kinds that are not Kubernetes' own, held against their definitions.

The rules are stated here as far as our objects need them, from the published definitions: cert-manager's Certificate
and Issuer (v1), KEDA's ScaledObject (v1alpha1), the Gateway API's Gateway, GRPCRoute and BackendTLSPolicy (v1), Envoy
Gateway's BackendTrafficPolicy (v1alpha1), the Prometheus operator's PodMonitor and PrometheusRule (v1). A field that
is not in them is refused: a server would drop it silently.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.deploy.manifests import Manifests, composed, in_words, named, problems
from tests.support.mesh import ROOT
from unlatch.protos.inference_pb2 import DESCRIPTOR as INFERENCE
from unlatch.protos.unlatch_pb2 import DESCRIPTOR as UNLATCH

# The first test waits until all combinations are rendered.
pytestmark = pytest.mark.timeout(180)
Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1, "maxLength": 253}
NUMBER: Schema = {"type": "integer", "minimum": 0}
# Go's time.Duration; Prometheus and the Gateway API take a part of it.
DURATION: Schema = {"type": "string", "pattern": r"^([0-9]+(h|m|s|ms))+$"}


def record(required: dict[str, Schema], **optional: Schema) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


def some(of: Schema, most: int = 100) -> Schema:
    """A list that is not empty."""
    return {"type": "array", "items": of, "minItems": 1, "maxItems": most}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


REFERENCE = record({"name": TEXT}, group={"type": "string"}, kind=TEXT, namespace=TEXT)
TARGET = record({"group": {"type": "string"}, "kind": TEXT, "name": TEXT}, sectionName=TEXT)
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
SELECTOR = record({}, matchLabels=LABELS, matchExpressions={"type": "array"})
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}

CERTIFICATE = record(
    {"secretName": TEXT, "issuerRef": record({"name": TEXT}, group=TEXT, kind=one_of("Issuer", "ClusterIssuer"))},
    commonName={"type": "string", "maxLength": 64},
    isCA={"type": "boolean"},
    dnsNames=some(TEXT),
    uris=some(TEXT),
    usages=some(one_of("cert sign", "crl sign", "digital signature", "server auth", "client auth")),
    duration=DURATION,
    renewBefore=DURATION,
    privateKey=record(
        {},
        algorithm=one_of("RSA", "ECDSA", "Ed25519"),
        size={"enum": [256, 384, 521, 2048, 4096, 8192]},
        rotationPolicy=one_of("Never", "Always"),
    ),
)
ISSUER = record({}, selfSigned=record({}), ca=record({"secretName": TEXT}))
SCALED_OBJECT = record(
    {
        "scaleTargetRef": record({"name": TEXT}, apiVersion=TEXT, kind=TEXT),
        "triggers": some(
            record(
                {
                    "type": one_of("prometheus"),
                    # All values are text.
                    "metadata": record({"serverAddress": TEXT, "query": {"type": "string"}, "threshold": TEXT}),
                },
                name=TEXT,
                metricType=one_of("AverageValue", "Value"),
            )
        ),
    },
    minReplicaCount=NUMBER,
    maxReplicaCount=NUMBER,
    pollingInterval=NUMBER,
    fallback=record(
        {"failureThreshold": NUMBER, "replicas": NUMBER},
        behavior=one_of("static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"),
    ),
    # Its contents are those of an HorizontalPodAutoscaler, and are checked as that below.
    advanced=record({}, horizontalPodAutoscalerConfig=record({}, behavior={"type": "object"})),
)
GATEWAY = record(
    {
        "gatewayClassName": TEXT,
        "listeners": some(
            record(
                {"name": TEXT, "port": PORT, "protocol": one_of("HTTP", "HTTPS", "TLS", "TCP", "UDP")},
                hostname=TEXT,
                tls=record({}, mode=one_of("Terminate", "Passthrough"), certificateRefs=some(REFERENCE, 64)),
                allowedRoutes=record({}, namespaces=record({}, **{"from": one_of("All", "Selector", "Same")})),
            ),
            64,
        ),
    },
    tls=record({}, backend=record({}, clientCertificateRef=REFERENCE)),
)
GRPC_ROUTE = record(
    {},
    parentRefs=some(record({"name": TEXT}, group=TEXT, kind=TEXT, namespace=TEXT, sectionName=TEXT, port=PORT), 32),
    hostnames=some(TEXT, 16),
    rules=some(
        record(
            {},
            matches=some(record({}, method=record({}, type=one_of("Exact"), service=TEXT, method=TEXT)), 64),
            backendRefs=some(record({"name": TEXT}, group=TEXT, kind=TEXT, port=PORT, weight=NUMBER), 16),
        ),
        16,
    ),
)
BACKEND_TLS_POLICY = record(
    {
        "targetRefs": some(TARGET, 16),
        "validation": record({"hostname": TEXT, "caCertificateRefs": some(TARGET, 8)}),
    }
)
BACKEND_TRAFFIC_POLICY = record(
    {"targetRefs": some(TARGET)},
    timeout=record({}, http=record({}, requestTimeout=DURATION, streamIdleTimeout=DURATION)),
    loadBalancer=record({"type": one_of("ConsistentHash", "LeastRequest", "Random", "RoundRobin")}),
    circuitBreaker=record({}, maxParallelRequests=NUMBER, maxPendingRequests=NUMBER),
)
POD_MONITOR = record(
    {
        "selector": SELECTOR,
        "podMetricsEndpoints": some(
            record(
                {"port": TEXT},
                path=TEXT,
                scheme=one_of("http", "https"),
                interval=DURATION,
                scrapeTimeout=DURATION,
                honorLabels={"type": "boolean"},
                relabelings=some({"type": "object"}),
                metricRelabelings=some({"type": "object"}),
            )
        ),
    },
    jobLabel=TEXT,
    podTargetLabels=some(TEXT),
    namespaceSelector=record({}, any={"type": "boolean"}, matchNames=some(TEXT)),
)
RULE: Schema = {
    "type": "object",
    "properties": {
        "alert": TEXT,
        "record": TEXT,
        "expr": {"type": ["string", "integer"]},
        "for": DURATION,
        "keep_firing_for": DURATION,
        "labels": LABELS,
        "annotations": LABELS,
    },
    "required": ["expr"],
    "oneOf": [{"required": ["alert"]}, {"required": ["record"]}],
    "additionalProperties": False,
}
PROMETHEUS_RULE = record(
    {}, groups=some(record({"name": TEXT, "rules": some(RULE, 1000)}, interval=DURATION, labels=LABELS), 1000)
)

KINDS = {
    ("cert-manager.io/v1", "Certificate"): CERTIFICATE,
    ("cert-manager.io/v1", "Issuer"): ISSUER,
    ("keda.sh/v1alpha1", "ScaledObject"): SCALED_OBJECT,
    ("gateway.networking.k8s.io/v1", "Gateway"): GATEWAY,
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): GRPC_ROUTE,
    ("gateway.networking.k8s.io/v1", "BackendTLSPolicy"): BACKEND_TLS_POLICY,
    ("gateway.envoyproxy.io/v1alpha1", "BackendTrafficPolicy"): BACKEND_TRAFFIC_POLICY,
    ("monitoring.coreos.com/v1", "PodMonitor"): POD_MONITOR,
    ("monitoring.coreos.com/v1", "PrometheusRule"): PROMETHEUS_RULE,
}


def test_fields_are_those_that_there_are() -> None:
    """For every kind that is not Kubernetes' own, required fields are there, and all fields are known."""

    def look(manifests: Manifests) -> Iterator[str]:
        for found in manifests.objects:
            if "." not in found["apiVersion"].partition("/")[0] or _is_kubernetes(found["apiVersion"]):
                continue
            if (rules := KINDS.get((found["apiVersion"], found["kind"]))) is None:
                yield f"{named(found)}: {found['apiVersion']} has no rules here"
                continue
            for error in Draft202012Validator(rules).iter_errors(found["spec"]):
                yield f"{named(found)}: {error.json_path}: {error.message}"

    assert problems(look) == {}


def _is_kubernetes(api: str) -> bool:
    return api.partition("/")[0] in {"networking.k8s.io", "rbac.authorization.k8s.io"}


def test_certificates_are_renewed_in_time() -> None:
    """Leaves are renewed with a new key while a third of their time is left. Authorities keep their key."""

    def look(manifests: Manifests) -> Iterator[str]:
        for found in manifests.of("Certificate"):
            spec = found["spec"]
            lasts, left = (float(spec[name].removesuffix("h")) for name in ("duration", "renewBefore"))
            policy = spec["privateKey"]["rotationPolicy"]
            if spec.get("isCA"):
                # A certificate must not outlive its issuer.
                longest = max(float(leaf["spec"]["duration"].removesuffix("h")) for leaf in _leaves(manifests))
                if left <= longest or policy != "Never":
                    yield f"{named(found)} ends before what it issued, or changes its key"
            elif left < lasts / 3 or policy != "Always":
                yield f"{named(found)} is renewed late, or with an old key"

    assert problems(look) == {}


def _leaves(manifests: Manifests) -> list[dict[str, Any]]:
    return [found for found in manifests.of("Certificate") if not found["spec"].get("isCA")]


def test_certificates_hold_for_one_end_each() -> None:
    """Certificates serve one end: clients cannot use servers' ones, nor servers clients', and callers' open no lane."""
    manifests = composed("base", "mtls", "ingress", "ingress-mtls")
    ends = {
        found["metadata"]["name"]: (found["spec"]["issuerRef"]["name"], found["spec"]["usages"][-1])
        for found in _leaves(manifests)
    }
    assert ends == {
        "unlatch-gateway": ("unlatch-callers", "server auth"),
        "unlatch-ingress-caller": ("unlatch-callers", "client auth"),
        "unlatch-gateway-lanes": ("unlatch-lanes", "client auth"),
        "unlatch-compute": ("unlatch-lanes", "server auth"),
    }


def test_certificates_have_the_names_that_are_looked_for() -> None:
    """The gateway's certificate has its Service's names in this namespace.

    Replicas' have the names that gateways expect.
    """
    manifests = composed("base", "mtls", "ingress", "ingress-mtls")
    service = manifests.one("Service", "unlatch-gateway")["metadata"]
    names = manifests.one("Certificate", "unlatch-gateway")["spec"]["dnsNames"]
    whole = f"{service['name']}.{service['namespace']}.svc.cluster.local".split(".")
    assert names == [".".join(whole[:parts]) for parts in (1, 2, 3, 5)]
    expected = manifests.environment("gateway")["UNLATCH_REPLICA_NAME"]
    assert manifests.one("Certificate", "unlatch-compute")["spec"]["dnsNames"] == [expected]
    proxied = manifests.one("BackendTLSPolicy", "unlatch-gateway")["spec"]["validation"]["hostname"]
    assert proxied in names


def test_files_are_where_settings_look_for_them() -> None:
    """Each file that a setting names is in a mounted secret, under the name that cert-manager gives it."""

    def look(manifests: Manifests) -> Iterator[str]:
        for service in ("gateway", "compute"):
            mounts = {mount["mountPath"] for mount in manifests.container(service)["volumeMounts"]}
            for variable, value in manifests.environment(service).items():
                directory, _, name = value.rpartition("/")
                if value.startswith("/tls") and not (directory in mounts and name in {"tls.crt", "tls.key", "ca.crt"}):
                    yield f"{service}: {variable} is {value}"

    assert problems(look) == {}


def test_routes_lead_to_what_a_gateway_serves() -> None:
    """The services of a route are those of our own protocols, all of them."""
    (rule,) = composed("base", "ingress").one("GRPCRoute", "unlatch")["spec"]["rules"]
    let_through = {match["method"]["service"] for match in rule["matches"]}
    assert let_through == {service.full_name for file in (INFERENCE, UNLATCH) for service in _services(file)}


def test_the_ingress_does_what_the_shipped_envoy_does() -> None:
    """Round robin, no time limit, no retries, and as many calls at once as in deploy/envoy/envoy.yaml."""
    envoy = yaml.safe_load((ROOT / "deploy/envoy/envoy.yaml").read_text())
    (cluster,) = envoy["static_resources"]["clusters"]
    (most,) = cluster["circuit_breakers"]["thresholds"]
    (request,) = {route["timeout"] for route in in_words(envoy, "route")}
    (silence,) = in_words(envoy, "stream_idle_timeout")
    assert cluster["lb_policy"] == "ROUND_ROBIN"
    policy = composed("base", "ingress").one("BackendTrafficPolicy", "unlatch")["spec"]
    assert {name: value for name, value in policy.items() if name != "targetRefs"} == {
        "timeout": {"http": {"requestTimeout": request, "streamIdleTimeout": silence}},
        "loadBalancer": {"type": "RoundRobin"},
        "circuitBreaker": {
            "maxParallelRequests": most["max_requests"],
            "maxPendingRequests": most["max_pending_requests"],
        },
    }


def _services(file: Any) -> list[Any]:
    return list(file.services_by_name.values())
