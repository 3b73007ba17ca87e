"""Fixtures of tests of security: a gateway that authenticates callers, and a caller that obeys the rules meanwhile."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from tests.support.doors import LaneEnd, Oip, Refusal, refusal_of, vector
from tests.support.issuer import Issuer, bearer
from tests.support.mesh import MESHES, Mesh
from tests.support.watching import wait_until

TENANTS = """
[tenants.research]
identities = ["research", "spiffe://example.org/ns/research/*"]
weight = 2

[tenants.modest]
kernels = ["identity", "sl*"]
priority = "normal"

[tenants.background]
priority = "background"

[tenants.frequent]
calls_per_second = 2
burst_calls = 3

[tenants.parallel]
calls_in_flight = 2

[tenants.narrow]
lanes = 1

[tenants.hungry]
cpu_seconds_per_minute = 0.3
"""
# Short enough for tests, long enough for a busy machine.
FLAGS = ["--handshake-seconds", "2", "--max-connections", "80", "--message-seconds", "2", "--tls-grace-seconds", "4"]


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """A mesh whose gateway asks for tokens, and the issuer of them."""

    mesh: Mesh
    issuer: Issuer
    tenants: Path
    channel: grpc.Channel

    def oip(self, token: str) -> Oip:
        return Oip(self.channel, bearer(token))

    def lane(self, token: str) -> LaneEnd:
        return LaneEnd(self.channel, bearer(token))

    def refused(self, door: str, metadata: tuple[tuple[str, str], ...]) -> Refusal:
        """Return how a caller with this metadata is refused at a door."""
        if door == "oip":
            return Oip(self.channel, metadata).refusal(vector("identity", 1.0))
        try:
            with LaneEnd(self.channel, metadata):
                return Refusal("OK", "")
        except grpc.RpcError as error:
            return refusal_of(error)

    @contextmanager
    def others_served(self) -> Iterator[None]:
        """Check that all calls of another caller are answered through both doors inside the `with` block."""
        ended, answered, failed = threading.Event(), 0, []

        def call() -> None:
            nonlocal answered
            token = self.issuer.token("research")
            with grpc.insecure_channel(self.mesh.gateway, options=[("grpc.use_local_subchannel_pool", 1)]) as own:
                oip = Oip(own, bearer(token))
                while not ended.is_set():
                    try:
                        assert oip.serves()
                        answered += 1
                    except (grpc.RpcError, AssertionError) as error:
                        failed.append(error)
                        return

        caller = threading.Thread(target=call)
        caller.start()
        try:
            wait_until(lambda: answered or failed, "somebody else's call is answered")
            before = answered
            yield
            wait_until(lambda: answered > before + 3 or failed, "somebody else's calls are answered")
        finally:
            ended.set()
            caller.join()
        assert not failed, failed


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of a module that names MESHES on a mesh of each kind."""
    if "guarded" in metafunc.fixturenames and (meshes := getattr(metafunc.module, "MESHES", None)):
        metafunc.parametrize("guarded", meshes, indirect=True, scope="session")


@pytest.fixture(scope="session")
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A mesh whose gateway authenticates callers. At the end its log must contain no secret."""
    run = MESHES[getattr(request, "param", "apart")]
    directory: Path = tmp_path_factory.mktemp("guarded")
    issuer = Issuer(directory)
    tenants = directory / "tenants.toml"
    tenants.write_text(TENANTS)
    flags = [*issuer.flags, "--tenants", str(tenants), "--log-level", "debug", *FLAGS]
    with run(directory, gateway=flags) as mesh, grpc.insecure_channel(mesh.gateway) as channel:
        yield Guarded(mesh=mesh, issuer=issuer, tenants=tenants, channel=channel)
        logged = "\n".join(mesh.gateway_service.lines + mesh.dispatcher_service.lines)
        assert len(issuer.secrets) > 1
        assert [secret for secret in issuer.secrets if secret in logged] == []
