"""Network policies: of all flows that could be tried, those that a mesh uses are allowed, and no other.

NetworkPolicies are evaluated as Kubernetes defines them: a pod that a policy selects, for a direction, may do what the
policies that select it allow together, and a flow must be allowed at both its ends. Policies do not apply to what a
node does to its own pods (the kubelet's probes, port-forward).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from itertools import product
from typing import Any

import pytest

from tests.deploy.manifests import Manifests, Object, composed, overlay, problems

# The label that Kubernetes itself gives every namespace.
NAME = "kubernetes.io/metadata.name"
# The first test waits until all combinations are rendered.
pytestmark = pytest.mark.timeout(180)
PORTS = {(8001, "TCP"), (8002, "TCP"), (8003, "TCP"), (8011, "TCP"), (8012, "TCP"), (8013, "TCP")}
PORTS |= {(53, "UDP"), (53, "TCP"), (443, "TCP"), (6443, "TCP")}


@dataclass(frozen=True)
class End:
    """A pod, or with no namespace an address outside of the cluster."""

    called: str
    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    of_namespace: dict[str, str] = field(default_factory=dict)
    address: str = "10.0.0.1"
    ports: dict[str, int] = field(default_factory=dict)


def ends(manifests: Manifests) -> dict[str, End]:
    """Return all ends: our own, those that a mesh serves, and strangers, some with nearly the right labels."""
    ours = {
        service: End(
            service,
            "unlatch",
            manifests.one("Deployment", f"unlatch-{service}")["spec"]["template"]["metadata"]["labels"],
            {NAME: "unlatch"},
            ports={port["name"]: port["containerPort"] for port in manifests.container(service)["ports"]},
        )
        for service in ("gateway", "compute")
    }
    part = {"app.kubernetes.io/part-of": "unlatch"}
    prometheus = {"app.kubernetes.io/name": "prometheus"}
    others = [
        End("caller", "research", {}, {NAME: "research", "unlatch-callers": "allowed"}),
        End("prometheus", "monitoring", prometheus, {NAME: "monitoring"}),
        End("own prometheus", "unlatch", {"app.kubernetes.io/name": "unlatch-prometheus"} | part, {NAME: "unlatch"}),
        End("dns", "kube-system", {"k8s-app": "kube-dns"}, {NAME: "kube-system"}),
        End("node's dns", address="169.254.20.10"),
        End("neighbour", "unlatch", {}, {NAME: "unlatch"}),
        End("stranger", "default", {}, {NAME: "default"}),
        End("stranger who says it is a gateway", "default", ours["gateway"].labels, {NAME: "default"}),
        End("stranger who says it is Prometheus", "default", prometheus, {NAME: "default"}),
        End("another pod of monitoring", "monitoring", {"app.kubernetes.io/name": "grafana"}, {NAME: "monitoring"}),
        End("another pod of kube-system", "kube-system", {}, {NAME: "kube-system"}),
        End("the internet", address="203.0.113.7"),
    ]
    return ours | {end.called: end for end in others}


ALLOWED = {
    ("caller", "gateway", 8001, "TCP"),
    ("gateway", "compute", 8011, "TCP"),
    ("prometheus", "gateway", 8002, "TCP"),
    ("prometheus", "compute", 8012, "TCP"),
    # The component plain-prometheus's own, beside ours.
    ("own prometheus", "gateway", 8002, "TCP"),
    ("own prometheus", "compute", 8012, "TCP"),
    *(("gateway", server, 53, protocol) for server in ("dns", "node's dns") for protocol in ("UDP", "TCP")),
}


def test_policies_allow_what_the_mesh_does_and_nothing_else() -> None:
    """Of every pair of ends at every port exactly these flows are allowed, whatever other components are there."""

    def look(manifests: Manifests) -> Iterator[str]:
        if not any(_is(found, "unlatch-nothing-else") for found in manifests.objects):
            return
        everybody = ends(manifests)
        seen = {
            (one.called, other.called, number, protocol)
            for one, other in product(everybody.values(), repeat=2)
            if "unlatch" in (one.namespace, other.namespace) and one != other
            for number, protocol in PORTS
            if _allowed(manifests, one, other, number, protocol)
        }
        outside = {end.called for end in everybody.values() if end.namespace != "unlatch"}
        # Prometheus asks the API server, which has no label, for the pods to scrape.
        allowed = ALLOWED | {("own prometheus", server, port, "TCP") for server in outside for port in (443, 6443)}
        yield from (f"denied: {flow}" for flow in allowed - seen)
        yield from (f"allowed: {flow}" for flow in seen - allowed)

    assert problems(look) == {}
    assert overlay("prod").of("NetworkPolicy")


def test_without_policies_everything_is_allowed() -> None:
    """The test above needs policies to pass: without them every flow is allowed."""
    manifests = composed("base")
    everybody = ends(manifests)
    assert _allowed(manifests, everybody["the internet"], everybody["compute"], 8011, "TCP")


@pytest.mark.parametrize(
    "left_out", ["unlatch-nothing-else", "unlatch-gateway", "unlatch-compute", "unlatch-metrics", "unlatch-prometheus"]
)
def test_each_policy_is_needed(left_out: str) -> None:
    """Without any one of the policies other flows are allowed."""
    whole = overlay("prod")
    everybody = ends(whole)
    rest = Manifests("less", tuple(one for one in whole.objects if not _is(one, left_out)))
    flows = [
        (one, other, *port)
        for one, other in product(everybody.values(), repeat=2)
        if "unlatch" in (one.namespace, other.namespace)
        for port in PORTS
    ]
    assert [_allowed(whole, *flow) for flow in flows] != [_allowed(rest, *flow) for flow in flows]


def _is(found: Object, name: str) -> bool:
    return bool(found["kind"] == "NetworkPolicy" and found["metadata"]["name"] == name)


def _allowed(manifests: Manifests, one: End, other: End, number: int, protocol: str) -> bool:
    policies = manifests.of("NetworkPolicy")
    return _lets(policies, "Egress", one, other, (other, number, protocol)) and _lets(
        policies, "Ingress", other, one, (other, number, protocol)
    )


def _lets(policies: list[Object], direction: str, own: End, peer: End, at: tuple[End, int, str]) -> bool:
    """Whether the policies of one end allow this flow with the other."""
    of_own = [
        policy["spec"]
        for policy in policies
        if policy["metadata"]["namespace"] == own.namespace
        and _matches(policy["spec"]["podSelector"], own.labels)
        and direction in policy["spec"]["policyTypes"]
    ]
    rules = [rule for spec in of_own for rule in spec.get(direction.lower(), [])]
    return not of_own or any(_of_peer(rule, direction, own, peer) and _at_port(rule, *at) for rule in rules)


def _of_peer(rule: dict[str, Any], direction: str, own: End, peer: End) -> bool:
    peers = rule.get("from" if direction == "Ingress" else "to")
    return not peers or any(_is_peer(wanted, own, peer) for wanted in peers)


def _is_peer(wanted: dict[str, Any], own: End, peer: End) -> bool:
    if "ipBlock" in wanted:
        assert wanted.keys() == {"ipBlock"}
        assert wanted["ipBlock"].keys() == {"cidr"}
        return not peer.namespace and ip_address(peer.address) in ip_network(wanted["ipBlock"]["cidr"])
    if not peer.namespace:
        return False
    if "namespaceSelector" in wanted:
        there = _matches(wanted["namespaceSelector"], peer.of_namespace)
    else:
        there = peer.namespace == own.namespace
    return there and _matches(wanted.get("podSelector", {}), peer.labels)


def _at_port(rule: dict[str, Any], server: End, number: int, protocol: str) -> bool:
    if "ports" not in rule:
        return True
    return any(
        port.get("protocol", "TCP") == protocol and server.ports.get(port["port"], port["port"]) == number
        for port in rule["ports"]
    )


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, "no other way to select is understood here"
    return bool(selector.get("matchLabels", {}).items() <= labels.items())
