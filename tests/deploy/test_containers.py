"""The resources, probes and times of a container, held against the services' own code and defaults."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.manifests import OVERLAYS, SERVICES, Manifests, composed, in_bytes, in_cores, overlay, problems
from unlatch.common.machine.cgroups import granted_cores, granted_memory
from unlatch.common.service import serve as life
from unlatch.common.service.health import LIVENESS
from unlatch.compute import settings
from unlatch.compute.ipc import memory_budget
from unlatch.compute.pool import process
from unlatch.compute.settings import ComputeSettings
from unlatch.gateway.settings import GatewaySettings

# The first test waits until all combinations are rendered.
pytestmark = pytest.mark.timeout(180)
MiB = 1024 * 1024
PORTS = ("listen", "metrics_listen", "health_listen")
# A stop takes this long after the drain: connections are closed, a replica kills its pool, and the last spans are
# sent (docs/operations/metrics.md, Traces).
STOP_SECONDS = life._STOP_GRACE_SECONDS + 1.0
POOL_STOP_SECONDS = process._ENDS_WITHIN_SECONDS + process._REAPED_WITHIN_SECONDS
# A loaded node does all of it more slowly.
SPARE_SECONDS = 5.0
# kubeadm's CoreDNS up to 1.31, kind and NodeLocal DNSCache keep an answer for so long.
DNS_CACHE_SECONDS = 30.0
# Copies of a message of the protocol's door inside gRPC (docs/limits.md), and the memory of an idle gateway.
COPIES_OF_A_MESSAGE = 6
GATEWAY_BYTES = 128 * MiB


@pytest.fixture(params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    """Each overlay: overlays have the numbers."""
    return overlay(request.param)


def test_settings_are_taken() -> None:
    """Every variable is a setting that exists, and the services start with all of them."""

    def look(manifests: Manifests) -> Iterator[str]:
        for service, kind in SERVICES.items():
            for variable in manifests.environment(service):
                if variable.removeprefix("UNLATCH_").lower() not in kind.model_fields:
                    yield f"{service}: there is no {variable}"
            if manifests.name != "base":
                manifests.settings(service, kind)

    assert problems(look) == {}


@pytest.mark.parametrize("service", SERVICES)
def test_nobody_is_let_in_unasked(service: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With certificates a service authenticates callers. Without, it starts only with --insecure."""
    kind = SERVICES[service]
    prod = overlay("prod").settings(service, kind)
    assert prod.tls_client_ca
    assert not prod.insecure
    dev = overlay("dev").settings(service, kind)
    assert dev.insecure
    assert not dev.tls_cert

    def look(manifests: Manifests) -> Iterator[str]:
        if "mtls" in manifests.name.split("+") and manifests.settings(service, kind).insecure:
            yield f"{service} asks nobody"

    assert problems(look) == {}
    with pytest.raises(SystemExit):
        composed("base").settings(service, kind)
    assert "give --tls-cert" in capsys.readouterr().err


def test_ports_are_those_of_the_settings() -> None:
    """Every container names three ports, with the defaults' numbers, and listens where other pods reach them."""

    def look(manifests: Manifests) -> Iterator[str]:
        for service, kind in SERVICES.items():
            given = manifests.environment(service)
            ports = {port["name"]: port["containerPort"] for port in manifests.container(service)["ports"]}
            for port, name in zip(("grpc", "metrics", "health"), PORTS, strict=True):
                number = kind.model_fields[name].default.rpartition(":")[2]
                if given[f"UNLATCH_{name.upper()}"] != f"[::]:{number}" or ports.pop(port) != int(number):
                    yield f"{service}: {port} is not {number}"
            if ports:
                yield f"{service} names {ports} too"

    assert problems(look) == {}


def test_the_gateway_looks_for_all_replicas(manifests: Manifests) -> None:
    """The gateway uses the headless service's name, in any namespace, and its port."""
    (port,) = manifests.one("Service", "unlatch-compute")["spec"]["ports"]
    assert manifests.settings("gateway", GatewaySettings).replicas == (f"dns:///unlatch-compute:{port['port']}",)


def test_probes() -> None:
    """All three probes ask the health port by gRPC: start and liveness for any answer, readiness for taking calls.

    A start may take longer than a worker may take to load its kernels. A pod may be without an answer for a minute.
    """

    def look(manifests: Manifests) -> Iterator[str]:
        for service in SERVICES:
            container = manifests.container(service)
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            for name in ("startup", "liveness", "readiness"):
                asked = {"port": ports["health"]} | ({} if name == "readiness" else {"service": LIVENESS})
                if container[f"{name}Probe"]["grpc"] != asked:
                    yield f"{service}: {name} asks {container[f'{name}Probe']}"
            starts = manifests.settings(service, SERVICES[service]) if manifests.name != "base" else None
            if isinstance(starts, ComputeSettings) and _longest(container["startupProbe"]) <= (
                starts.worker_start_seconds
            ):
                yield f"{service} is killed while it starts"
            if _longest(container["livenessProbe"]) < 60:
                yield f"{service} is killed while it is busy"

    assert problems(look) == {}


def _longest(probe: dict[str, Any]) -> float:
    return float(probe["periodSeconds"] * probe["failureThreshold"])


@pytest.mark.parametrize("service", SERVICES)
def test_a_pod_has_the_time_that_it_needs_to_end(service: str, manifests: Manifests) -> None:
    """The times of preStop, drain, the pool's stop and a busy node add up to less than the time before a kill."""
    pod, container = manifests.pod(service), manifests.container(service)
    before = container.get("lifecycle", {}).get("preStop", {"sleep": {"seconds": 0}})["sleep"]["seconds"]
    drain = manifests.settings(service, SERVICES[service]).drain_seconds
    pool = POOL_STOP_SECONDS if service == "compute" else 0.0
    needed = before + drain + STOP_SECONDS + pool
    assert needed + SPARE_SECONDS <= pod["terminationGracePeriodSeconds"] <= needed + 3 * SPARE_SECONDS


def test_a_gateway_that_ends_is_left_first(manifests: Manifests) -> None:
    """An ending gateway goes on serving until others know that it ends.

    A replica tells its gateways itself, on their lanes.
    """
    assert manifests.container("gateway")["lifecycle"]["preStop"]["sleep"]["seconds"] > 0
    assert "lifecycle" not in manifests.container("compute")


def test_a_rollout_waits_for_gateways(manifests: Manifests) -> None:
    """No old replica ends before gateways have looked the name up, with an answer that is 30 s old at most."""
    deployment = manifests.one("Deployment", "unlatch-compute")["spec"]
    looked_up = manifests.settings("gateway", GatewaySettings).discovery_seconds
    assert deployment["minReadySeconds"] > looked_up + DNS_CACHE_SECONDS
    for name in ("unlatch-gateway", "unlatch-compute"):
        assert manifests.one("Deployment", name)["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_a_gateway_has_lanes_for_all_replicas(manifests: Manifests) -> None:
    """The gateway can have as many lanes as there may be replicas, and those of a rollout beside them."""
    scalers = manifests.of("HorizontalPodAutoscaler", "ScaledObject")
    (spec,) = (one["spec"] for one in scalers if one["spec"]["scaleTargetRef"]["name"] == "unlatch-compute")
    surge = manifests.one("Deployment", "unlatch-compute")["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
    most = (spec.get("maxReplicas") or spec["maxReplicaCount"]) * (1 + int(surge.rstrip("%")) / 100)
    assert most <= manifests.settings("gateway", GatewaySettings).max_replicas


@pytest.mark.parametrize("cgroups", ["v1", "v2"])
def test_workers_and_threads_fill_the_cores(
    cgroups: str, manifests: Manifests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a large node a replica starts a worker for each whole core of its limit, with one BLAS thread."""
    limit = in_cores(manifests.container("compute")["resources"]["limits"]["cpu"])
    assert limit == int(limit)
    own = _granted(tmp_path, cgroups, cores=int(limit))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(settings, "granted_cores", partial(granted_cores, tmp_path, own))
    found = manifests.settings("compute", ComputeSettings)
    assert (found.worker_count, found.worker_blas_threads) == (limit, 1)


@pytest.mark.parametrize("cgroups", ["v1", "v2"])
def test_workers_cannot_take_the_container_over_its_limit(
    cgroups: str, manifests: Manifests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arena, replies, services and workers together are less than the limit, and a worker's share is usable."""
    limits = manifests.container("compute")["resources"]["limits"]
    own = _granted(tmp_path, cgroups, cores=int(limits["cpu"]), memory=in_bytes(limits["memory"]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(settings, "granted_cores", partial(granted_cores, tmp_path, own))
    granted = granted_memory(tmp_path, own)
    assert granted == in_bytes(limits["memory"])
    found = manifests.settings("compute", ComputeSettings)
    shared = memory_budget.memory_budget(found, granted)
    workers = shared.worker_bytes * found.worker_count
    replies = min(found.max_reply_bytes, shared.arena_bytes)
    assert shared.arena_bytes + replies + memory_budget._SERVICES_BYTES + workers <= granted
    assert shared.worker_bytes >= 64 * MiB


def _granted(root: Path, cgroups: str, *, cores: int, memory: int = 1 << 40) -> Path:
    """Write the files of a container of this size below `root`: its cgroup, and the file that names the cgroup."""
    files = {
        "v2": {"cpu.max": f"{cores * 100_000} 100000", "memory.max": f"{memory}"},
        "v1": {
            "cpu/cpu.cfs_quota_us": f"{cores * 100_000}",
            "cpu/cpu.cfs_period_us": "100000",
            "memory/memory.limit_in_bytes": f"{memory}",
        },
    }[cgroups]
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    own = root / "own"
    own.write_text("0::/\n" if cgroups == "v2" else "4:cpu,cpuacct:/\n5:memory:/\n")
    return own


def test_a_gateway_holds_what_fits(manifests: Manifests) -> None:
    """The calls that a gateway may hold, its largest message inside gRPC, and itself fit into its memory."""
    found = manifests.settings("gateway", GatewaySettings)
    held = found.max_live_bytes + COPIES_OF_A_MESSAGE * found.max_message_bytes + GATEWAY_BYTES
    assert held <= in_bytes(manifests.container("gateway")["resources"]["limits"]["memory"])
