"""The rendered manifests serve: real processes with their variables, and certificates with their names."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

from tests.deploy.cert_manager import CertManager
from tests.deploy.manifests import SERVICES, overlay
from tests.deploy.pods import Mounts, Pods, running
from tests.support.authority import Mounted
from tests.support.doors import LaneEnd
from unlatch import TLS, BlockingClient
from unlatch.common.errors import Unavailable

# As a caller in the README requests one.
NAME = "spiffe://example.org/ns/research/alice"
CALLER = {
    "uris": [NAME],
    "usages": ["digital signature", "client auth"],
    "privateKey": {"algorithm": "ECDSA", "size": 256},
    "issuerRef": {"name": "unlatch-callers"},
}
SERVING = health_pb2.HealthCheckResponse.SERVING
PROBES = ("startup", "liveness", "readiness")


@dataclass(frozen=True)
class Prod:
    """The overlay for production, running, and a caller's files."""

    pods: Pods
    mounts: Mounts
    issuer: CertManager
    caller: Mounted

    @property
    def tls(self) -> TLS:
        """A caller's TLS settings with these files."""
        ca, cert, key = (self.caller[name] for name in ("ca.crt", "tls.crt", "tls.key"))
        return TLS(ca=ca, cert=cert, key=key, name="unlatch-gateway")

    def opens_a_lane(self, secret: dict[str, bytes], *, name: str, address: str) -> bool:
        """Whether the service of that name accepts this certificate on a lane."""
        trusted = self.issuer.secret(name)["ca.crt"]
        credentials = grpc.ssl_channel_credentials(trusted, secret["tls.key"], secret["tls.crt"])
        options = [("grpc.ssl_target_name_override", name), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(address, credentials, options=options) as channel:
            try:
                with LaneEnd(channel):
                    return True
            except grpc.RpcError:
                return False


@pytest.fixture(scope="module")
def prod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prod]:
    """The overlay for production, with the certificates that it asks for."""
    root, manifests = tmp_path_factory.mktemp("prod"), overlay("prod")
    issuer = CertManager(manifests)
    mounts = Mounts(manifests, root, issuer)
    caller = Mounted(root / "caller", issuer.issued(CALLER))
    with running(manifests, root) as pods:
        yield Prod(pods, mounts, issuer, caller)


def serves(pods: Pods, *, tls: TLS | bool = False) -> bool:
    """Check that a call is answered correctly."""
    with BlockingClient(pods.address, tls=tls, timeout=20) as client:
        counts = client.call("histogram", np.array([1.0, 2.0, 2.0, 3.0]), bins=3)
        return list(counts[0]) == [1, 2, 1]


def test_prod_serves_callers_with_certificates(prod: Prod) -> None:
    """A caller with a certificate of the callers' issuer is answered, and is identified by its certificate."""
    assert serves(prod.pods, tls=prod.tls)
    entry = prod.pods.gateway.wait_for("call", kernel="histogram")
    assert entry["tenant"] == NAME


def test_prod_lets_nobody_else_in(prod: Prod) -> None:
    """Callers without a certificate, with one for lanes, or with one for serving are refused."""
    own = prod.tls
    for tls in (False, TLS(ca=own.ca, name=own.name)):
        with pytest.raises(Unavailable):
            serves(prod.pods, tls=tls)
    leaves = ("unlatch-gateway", "unlatch-gateway-lanes", "unlatch-compute")
    secrets = {name: prod.issuer.secret(name) for name in leaves}
    caller = prod.issuer.issued(CALLER)
    at_gateway = {"name": "unlatch-gateway", "address": prod.pods.address}
    assert prod.opens_a_lane(caller, **at_gateway)
    assert not any(prod.opens_a_lane(secret, **at_gateway) for secret in secrets.values())
    at_replica = {"name": "unlatch-compute", "address": prod.pods.replica}
    assert prod.opens_a_lane(secrets.pop("unlatch-gateway-lanes"), **at_replica)
    assert not any(prod.opens_a_lane(secret, **at_replica) for secret in (*secrets.values(), caller))


def test_prod_answers_probes(prod: Prod) -> None:
    """Each probe is answered in plaintext at the health port, for the service that the manifests name."""
    for service in SERVICES:
        assert [prod.pods.probed(service, probe) for probe in PROBES] == [SERVING] * 3, service


def test_prod_takes_renewed_certificates(prod: Prod) -> None:
    """When every secret is renewed, both services take all of them, and callers are answered as before."""
    assert serves(prod.pods, tls=prod.tls)
    prod.mounts.renew()
    pods = prod.pods
    for service, kind in ((pods.gateway, "tls"), (pods.gateway, "replica"), (pods.compute, "tls")):
        service.wait_for("certificates replaced: " + prod.mounts.told(service.name, kind))
    assert serves(pods, tls=prod.tls)


def test_dev_serves_everybody(tmp_path: Path) -> None:
    """The overlay for a laptop starts unchanged, and answers an unknown caller and each probe."""
    manifests = overlay("dev")
    with running(manifests, tmp_path) as pods:
        assert serves(pods)
        for service in SERVICES:
            assert [pods.probed(service, probe) for probe in PROBES] == [SERVING] * 3, service
