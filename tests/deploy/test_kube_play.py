"""The rendered Deployments of the dev overlay, run by podman as a kubelet would start them: real pods, real limits.

There is no cluster around them: the gateway's pod gets the headless Service's name as a line of its /etc/hosts, and no
port of a container is published on this machine.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.deploy.containers import BUILD_SECONDS, built_or_skipped, podman
from tests.deploy.manifests import K8S, Manifests, in_bytes, in_cores, overlay, render
from tests.support.mesh import ROOT
from tests.support.watching import Scrape, wait_until
from unlatch import BlockingClient

pytestmark = pytest.mark.timeout(BUILD_SECONDS + 200)  # The first test may have to build the images.


@pytest.fixture(scope="module", autouse=True)
def bridged() -> None:
    """The images are built, and podman can make pods that reach each other."""
    base = built_or_skipped()
    if shutil.which("catatonit") is None:
        pytest.skip("catatonit is missing, which podman makes its pods' pause container of")
    try:
        podman("run", "--rm", "--network=podman", base, "true")
    except AssertionError as error:
        pytest.skip(f"podman has no network of its own here: {error}")


@contextmanager
def played(manifests: Manifests, service: str, **hosts: str) -> Iterator[str]:
    """Run one pod of a service's Deployment and end it as podman ends pods; yield its address."""
    objects = (*manifests.of("ConfigMap"), manifests.one("Deployment", f"unlatch-{service}"))
    *settings, deployment = json.loads(json.dumps(objects))
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # Names take the place of DNS. Ports are removed: podman would open them to everyone who reaches this machine.
    pod["hostAliases"] = [{"ip": ip, "hostnames": [name.replace("_", "-")]} for name, ip in hosts.items()]
    del container["ports"]
    # An emptyDir belongs to one pod; podman's is any volume of that name.
    for volume in (*pod["volumes"], *container["volumeMounts"]):
        volume["name"] = f"unlatch-test-{service}-{volume['name']}"
    text = yaml.safe_dump_all([*settings, deployment])
    with ExitStack() as stack:
        # Podman makes a volume of a mounted ConfigMap, and does not remove it.
        for volume in pod["volumes"]:
            if "configMap" in volume:
                stack.callback(podman, "volume", "rm", "--force", volume["configMap"]["name"])
        stack.callback(podman, "kube", "down", "-", given=text)
        podman("kube", "play", "-", given=text)
        yield address(service)


def address(service: str) -> str:
    """Return the address of a service's pod on podman's network."""
    (pod,) = json.loads(f"[{podman('pod', 'inspect', f'unlatch-{service}-pod-0')}]")
    networks = inspected(pod["InfraContainerID"])["NetworkSettings"]["Networks"]
    (network,) = networks.values()
    found: str = network["IPAddress"]
    return found


def inspected(container: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(podman("container", "inspect", container))[0]
    return found


def is_ready(address: str) -> bool:
    """Return the answer to a kubelet's readiness probe."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer: health_pb2.HealthCheckResponse = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING


@contextmanager
def mesh(manifests: Manifests) -> Iterator[tuple[str, str]]:
    """Run a pod of each service until calls are taken; yield their addresses, the gateway's first."""
    with (
        played(manifests, "compute") as compute,
        played(manifests, "gateway", unlatch_compute=compute) as gateway,
    ):
        wait_until(lambda: is_ready(f"{gateway}:8003"), "the gateway has found the replica", within=60)
        yield gateway, compute


def test_the_dev_overlay_serves() -> None:
    """A gateway's pod finds a replica's by name and answers a call. Limits, user and root are the manifests'."""
    manifests = overlay("dev")
    with mesh(manifests) as (gateway, compute), BlockingClient(f"{gateway}:8001", timeout=60.0) as client:
        counts, _ = client.histogram(np.array([1.0, 2.0, 2.0, 3.0]), bins=3)
        assert counts.tolist() == [1, 2, 1]
        workers = Scrape(f"{compute}:8012").sum("unlatch_worker_up")
        assert workers == in_cores(manifests.container("compute")["resources"]["limits"]["cpu"])
        for service in ("gateway", "compute"):
            limits = manifests.container(service)["resources"]["limits"]
            found = inspected(f"unlatch-{service}-pod-0-{service}")
            assert found["Config"]["User"] == "65532:65532"
            assert found["HostConfig"]["ReadonlyRootfs"]
            assert not found["EffectiveCaps"]
            assert found["HostConfig"]["Memory"] == in_bytes(limits["memory"])


def test_kernels_of_a_config_map_are_served(tmp_path: Path) -> None:
    """The README's own mesh, made of its two files, answers a call of its kernel."""
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    own = tmp_path / "my-mesh"
    own.mkdir()
    written = re.findall(
        r"^```\w+\n# my-mesh/(\S+)\n(.*?)^```$", (K8S / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    for name, text in written:
        (own / name).write_text(text)
    manifests = Manifests("my-mesh", render(own))
    with mesh(manifests) as (gateway, _), BlockingClient(f"{gateway}:8001", timeout=60.0) as client:
        np.testing.assert_allclose(client.normalise(np.array([[3.0, 4.0]])), [[0.6, 0.8]])
