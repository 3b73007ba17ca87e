"""The rendered manifests, run: gateway and replica as processes with the variables and arguments that pods would have.

The tests do what a cluster does: mounted files are in a directory of the test, ports are free ones of this machine,
and a DNS server of the test answers for the headless service's name. Everything else is as in the pods.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.deploy.cert_manager import CertManager
from tests.deploy.manifests import SERVICES, Manifests, Object
from tests.support.authority import Mounted
from tests.support.dns import NameServer
from tests.support.mesh import Service


class Mounts:
    """The files that kubelets mount into the pods of a rendering, below `root`.

    Secrets and ConfigMaps are swapped as kubelets do it.
    """

    def __init__(self, manifests: Manifests, root: Path, issuer: CertManager) -> None:
        self.root = root
        self._manifests = manifests
        self._issuer = issuer
        self._of_secrets: list[tuple[Mounted, str]] = []
        for service in SERVICES:
            volumes = {volume["name"]: volume for volume in manifests.pod(service)["volumes"]}
            for mount in manifests.container(service)["volumeMounts"]:
                self._mount(volumes[mount["name"]], Path(f"{root}/{service}{mount['mountPath']}"))

    def _mount(self, volume: Object, directory: Path) -> None:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if "secret" in volume:
            name = volume["secret"]["secretName"]
            self._of_secrets.append((Mounted(directory, self._issuer.secret(name)), name))
        if "configMap" in volume:
            data = self._manifests.one("ConfigMap", volume["configMap"]["name"])["data"]
            Mounted(directory, {name: text.encode() for name, text in data.items()})

    def told(self, service: str, kind: str) -> str:
        """Return the log fields of a service about its files for callers (`tls`) or for replicas (`replica`)."""
        given = self._manifests.environment(service)
        names = [f"{kind}-cert", f"{kind}-key", f"{kind}-client-ca" if kind == "tls" else f"{kind}-ca"]
        paths = {name: given[f"UNLATCH_{name.replace('-', '_').upper()}"] for name in names}
        return ", ".join(f"--{name} {self.root}/{service}{path}" for name, path in paths.items())

    def renew(self) -> None:
        """Replace every certificate and its key."""
        for directory, name in self._of_secrets:
            directory.swap(self._issuer.secret(name))


@dataclass(frozen=True)
class Pods:
    """A gateway and a replica of some manifests."""

    manifests: Manifests
    gateway: Service
    compute: Service

    @property
    def address(self) -> str:
        """The address for callers."""
        return _listens(self.gateway, "listen")

    @property
    def replica(self) -> str:
        """The address for lanes."""
        return _listens(self.compute, "listen")

    def probed(self, service: str, probe: str) -> int:
        """Return the answer of a service's pod to a kubelet's probe."""
        asked = self.manifests.container(service)[f"{probe}Probe"]["grpc"]
        running = self.gateway if service == "gateway" else self.compute
        with grpc.insecure_channel(_listens(running, "health_listen")) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(service=asked.get("service", "")), timeout=10)
        status: int = answer.status
        return status


@contextmanager
def running(manifests: Manifests, root: Path) -> Iterator[Pods]:
    """Run the services as their pods would run them. Stop them cleanly at the end."""
    with NameServer("127.0.0.1") as names, _service(manifests, "compute", root) as compute:
        port = _listens(compute, "listen").rpartition(":")[2]
        # The name stays as it is, but is asked of this server, at the port that was free.
        name = manifests.environment("gateway")["UNLATCH_REPLICAS"].removeprefix("dns:///").partition(":")[0]
        found = {"UNLATCH_REPLICAS": f"dns://{names.target}/{name}:{port}"}
        with _service(manifests, "gateway", root, **found) as gateway:
            gateway.wait_for("replica is ready")
            yield Pods(manifests, gateway, compute)
            gateway.stop()
        compute.stop()


def _service(manifests: Manifests, service: str, root: Path, **instead: str) -> Service:
    container = manifests.container(service)
    mounted = tuple(f"{mount['mountPath']}/" for mount in container["volumeMounts"])
    environment = {
        name: f"{root}/{service}{value}" if value.startswith(mounted) else value
        for name, value in manifests.environment(service).items()
    }
    ports = dict.fromkeys((name for name in environment if name.endswith("LISTEN")), "127.0.0.1:0")
    return Service(service, *container.get("args", []), environment=environment | ports | instead)


def _listens(service: Service, where: str) -> str:
    address: str = service.wait_for("serving")[where]
    return address
