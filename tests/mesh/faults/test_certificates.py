"""Certificates at both doors and on lanes: refusals, files swapped under load without a failed call, and logs.

Services and certificates are real. Files are swapped as Kubernetes swaps a secret's, and as others replace theirs.
"""

import asyncio
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from cryptography.x509 import load_pem_x509_certificate

from tests.mesh.faults.conftest import ANY_PORTS
from tests.support.authority import Authority, Mounted, Named, Renamed
from tests.support.doors import arrays_of, vector
from tests.support.mesh import KERNELS, ROOT, Service
from tests.support.watching import Scrape, until
from unlatch import TLS, BlockingClient, Client
from unlatch.cli import run
from unlatch.common.errors import CertificateError, Unavailable, UnlatchError
from unlatch.protos.inference_pb2 import ModelInferResponse

X = np.arange(3.0)
INFER = "/inference.GRPCInferenceService/ModelInfer"
HERE = "127.0.0.1"
NOBODY = {"tls.crt": b"", "tls.key": b""}


@dataclass(frozen=True, kw_only=True)
class Secured:
    """A mesh with TLS on every hop, both ends verified: its files, its processes, its gateway's address."""

    authority: Authority
    dispatcher_files: Renamed
    gateway_files: Renamed
    dispatcher: Service
    gateway: Service

    @property
    def address(self) -> str:
        listen: str = self.gateway.wait_for("serving")["listen"]
        return listen

    @property
    def services(self) -> tuple[Service, Service]:
        return self.dispatcher, self.gateway


def serving(files: Renamed) -> tuple[str, ...]:
    """Return the flags of a service that serves with these files and asks its callers for certificates."""
    shown = "--tls-cert", files["tls.crt"], "--tls-key", files["tls.key"]
    return "--listen", f"{HERE}:0", *ANY_PORTS, *shown, "--tls-client-ca", files["ca.crt"]


def calling(files: Renamed) -> tuple[str, ...]:
    """Return the flags of a gateway that calls its replicas with these files."""
    return "--replica-ca", files["ca.crt"], "--replica-cert", files["tls.crt"], "--replica-key", files["tls.key"]


@contextmanager
def secured(directory: Path, kind: type[Renamed], *flags: str) -> Iterator[Secured]:
    """Run a mesh of one replica with files of that kind. Its services end cleanly, and log no key."""
    authority = Authority()
    dispatcher_files, gateway_files = (
        kind(directory / name, {**authority.issue(HERE), "ca.crt": authority.pem}) for name in ("dispatcher", "gateway")
    )
    compute = ("--workers", "1", "--kernels", str(KERNELS))
    with Service("compute", *serving(dispatcher_files), *compute, *flags) as dispatcher:
        replica = dispatcher.wait_for("serving")["listen"]
        to_replicas = ("--replicas", replica, *calling(gateway_files))
        with Service("gateway", *serving(gateway_files), *to_replicas, *flags) as gateway:
            gateway.wait_for("replica is ready")
            yield Secured(
                authority=authority,
                dispatcher_files=dispatcher_files,
                gateway_files=gateway_files,
                dispatcher=dispatcher,
                gateway=gateway,
            )
            for service, files in ((gateway, gateway_files), (dispatcher, dispatcher_files)):
                service.stop()
                logged = "\n".join(service.lines)
                # gRPC would log a line for each.
                assert "Handshake failed with error" not in logged
                assert "PRIVATE" not in logged
                assert not any(line in logged for line in Path(files["tls.key"]).read_text().splitlines()[1:-1])


@pytest.fixture(scope="module")
def mesh_of_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A shared mesh for tests that leave it unchanged."""
    with secured(tmp_path_factory.mktemp("secured"), Renamed) as running:
        yield running


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., Renamed]:
    """Make a caller's files: `files(own certificate, bundle)`."""
    return lambda own, bundle, name="caller": Renamed(tmp_path / name, {**own, "ca.crt": bundle})


def channel(address: str, files: Renamed, **names: str) -> grpc.aio.Channel:
    """Open a channel of any client, on connections of its own, with the files' present contents."""
    key, chain, ca = (Path(files[name]).read_bytes() for name in ("tls.key", "tls.crt", "ca.crt"))
    credentials = grpc.ssl_channel_credentials(ca, key or None, chain or None)
    options = [("grpc.use_local_subchannel_pool", 1), *(("grpc.ssl_target_name_override", n) for n in names.values())]
    return grpc.aio.secure_channel(address, credentials, options=options)


async def infer(opened: grpc.aio.Channel, value: float = 5.0) -> float:
    """Make a call through the protocol's door."""
    rpc: Any = opened.unary_unary(INFER)
    answer: bytes = await rpc(vector("identity", value).SerializeToString(), timeout=20)
    (given,) = arrays_of(ModelInferResponse.FromString(answer))
    return float(given[0])


async def status_of(opened: grpc.aio.Channel) -> grpc.StatusCode:
    """Return how a call through the protocol's door ends."""
    try:
        await infer(opened)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_every_client_comes_in_by_tls(mesh_of_tls: Secured, files: Callable[..., Renamed]) -> None:
    """A lane, a blocking client, the protocol's door and the command line work, also with an intermediate authority."""
    authority = mesh_of_tls.authority
    own = files(authority.issue("caller.example", through=True), authority.pem)
    async with Client(mesh_of_tls.address, tls=own.tls) as client:
        np.testing.assert_array_equal(await client.identity(X), X)
    async with channel(mesh_of_tls.address, own) as opened:
        assert await infer(opened) == 5.0

    def blocking() -> Any:
        with BlockingClient(mesh_of_tls.address, tls=own.tls) as mesh:
            return mesh.identity(X)

    np.testing.assert_array_equal(await asyncio.to_thread(blocking), X)
    variables = {"CA": own["ca.crt"], "CERT": own["tls.crt"], "KEY": own["tls.key"]}
    ran = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "unlatch", "call", "identity", "x=[1.5]", "--server", mesh_of_tls.address),
        cwd=ROOT,
        env={f"UNLATCH_TLS_{name}": path for name, path in variables.items()},
        stdout=subprocess.PIPE,
    )
    told, _ = await ran.communicate()
    assert ran.returncode == 0
    assert b"1.5" in told


Caller = Callable[[Authority, Authority], tuple[Named, bytes]]
REFUSED: dict[str, Caller] = {
    "no certificate": lambda ours, _: (NOBODY, ours.pem),
    "another authority's": lambda ours, other: (other.issue("caller.example"), ours.pem),
    "expired": lambda ours, _: (ours.issue("caller.example", seconds=-5.0), ours.pem),
    "not to be trusted by the caller": lambda ours, other: (ours.issue("caller.example"), other.pem),
}


@pytest.mark.parametrize("way", REFUSED)
async def test_who_shows_what_is_not_trusted_is_refused(
    mesh_of_tls: Secured, files: Callable[..., Renamed], way: str
) -> None:
    """Callers with untrusted certificates are refused at both doors and by a replica. Others are served meanwhile."""
    ours = mesh_of_tls.authority
    good = files(ours.issue("good.example"), ours.pem, "good")
    bad = files(*REFUSED[way](ours, Authority()))
    async with Client(mesh_of_tls.address, tls=good.tls) as client:
        served = [await client.identity(X)]
        for address in (mesh_of_tls.address, mesh_of_tls.dispatcher.wait_for("serving")["listen"]):
            async with channel(address, bad) as opened:
                assert await status_of(opened) == grpc.StatusCode.UNAVAILABLE
                lane: Any = opened.stream_stream("/unlatch.v1.Lane/Open")()
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await lane.read()
                assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
            served.append(await client.identity(X))
        without = TLS(ca=bad["ca.crt"]) if way == "no certificate" else bad.tls
        kind = CertificateError if way == "expired" else Unavailable
        async with Client(mesh_of_tls.address, tls=without) as refused_client:
            with pytest.raises(kind):
                await refused_client.identity(X, timeout=5.0)
        for given in served:
            np.testing.assert_array_equal(given, X)


async def test_who_speaks_no_tls_is_refused(mesh_of_tls: Secured) -> None:
    """Plaintext is refused at both doors."""
    async with grpc.aio.insecure_channel(mesh_of_tls.address) as opened:
        assert await status_of(opened) == grpc.StatusCode.UNAVAILABLE
    async with Client(mesh_of_tls.address) as client:
        with pytest.raises(Unavailable):
            await client.identity(X, timeout=5.0)


async def test_a_servers_name_is_verified(mesh_of_tls: Secured, files: Callable[..., Renamed]) -> None:
    """A server with another name is refused, unless that name is the one that is asked for."""
    own = files(mesh_of_tls.authority.issue("caller.example"), mesh_of_tls.authority.pem)
    address = mesh_of_tls.address.replace(HERE, "localhost")
    async with Client(address, tls=own.tls) as client:
        with pytest.raises(Unavailable, match="cannot connect to"):
            await client.identity(X, timeout=5.0)
    named = TLS(ca=own["ca.crt"], cert=own["tls.crt"], key=own["tls.key"], name=HERE)
    async with Client(address, tls=named) as client:
        np.testing.assert_array_equal(await client.identity(X, timeout=5.0), X)


@pytest.mark.parametrize("wrong", ["authority", "name"])
def test_a_replica_that_cannot_be_verified_gets_nothing(
    mesh_of_tls: Secured, files: Callable[..., Renamed], wrong: str
) -> None:
    """The gateway opens no lane to such a replica, and its log says why."""
    ours = mesh_of_tls.authority
    trusted = Authority().pem if wrong == "authority" else ours.pem
    own = files({**ours.issue(HERE)}, trusted)
    flags = ("--replica-name", "another.example") if wrong == "name" else ()
    replica = mesh_of_tls.dispatcher.wait_for("serving")["listen"]
    arguments = ("--listen", f"{HERE}:0", *ANY_PORTS, "--replicas", replica, *calling(own), *flags)
    with Service("gateway", *arguments) as gateway:
        reason = gateway.wait_for("no lane to replica")["message"]
        assert ("CERTIFICATE_VERIFY_FAILED" if wrong == "authority" else "Hostname Verification") in reason, reason
        assert not any(entry["event"] == "replica is ready" for entry in gateway.entries)
        gateway.stop()


def test_metrics_tell_when_certificates_expire(mesh_of_tls: Secured) -> None:
    """Metrics have each file's earliest expiry, by what the file is for."""
    for service, files, roles in (
        (mesh_of_tls.gateway, mesh_of_tls.gateway_files, {"tls-cert", "tls-client-ca", "replica-cert", "replica-ca"}),
        (mesh_of_tls.dispatcher, mesh_of_tls.dispatcher_files, {"tls-cert", "tls-client-ca"}),
    ):
        scrape = Scrape(service.wait_for("serving")["metrics_listen"])
        for role in roles:
            path = files["ca.crt" if role.endswith("ca") else "tls.crt"]
            expiry = load_pem_x509_certificate(Path(path).read_bytes()).not_valid_after_utc.timestamp()
            told = scrape.sum("unlatch_certificate_expiry_timestamp_seconds", role=role, file=path)
            assert told == expiry


class Load:
    """Calls on one client's lane and on one channel, one after another, inside a `with` block."""

    def __init__(self, client: Client, opened: grpc.aio.Channel) -> None:
        self.answered = 0
        self._ended = False
        self._tasks = [asyncio.create_task(self._calls(call)) for call in (client.identity, self._by(opened)) * 4]

    async def more(self) -> None:
        """Wait until more calls have been answered, or one has failed."""
        wanted = self.answered + 50
        await until(lambda: self.answered >= wanted or any(task.done() for task in self._tasks), "calls are answered")

    async def end(self) -> None:
        """Raise the error of a failed call, if there was one."""
        self._ended = True
        await asyncio.gather(*self._tasks)

    @staticmethod
    def _by(opened: grpc.aio.Channel) -> Callable[[Any], Any]:
        async def call(x: Any) -> Any:
            return x - x[0] + await infer(opened, float(x[0]))

        return call

    async def _calls(self, call: Callable[[Any], Any]) -> None:
        while not self._ended:
            x = X + self.answered
            np.testing.assert_array_equal(await call(x), x)
            self.answered += 1


async def taken(mesh: Secured, since: dict[Service, int]) -> None:
    """Wait until both services have taken the new files, and the gateway has a new lane with them."""
    for service, after in since.items():
        for files, names in (
            (mesh.dispatcher_files, "tls"),
            (mesh.gateway_files, "tls"),
            (mesh.gateway_files, "replica"),
        ):
            if (service is mesh.dispatcher) == (files is mesh.dispatcher_files):
                ca = "--tls-client-ca" if names == "tls" else "--replica-ca"
                paths = {f"--{names}-cert": files["tls.crt"], f"--{names}-key": files["tls.key"], ca: files["ca.crt"]}
                event = "certificates replaced: " + ", ".join(f"{name} {path}" for name, path in paths.items())
                await asyncio.to_thread(service.wait_for, event, after=after)
    await asyncio.to_thread(mesh.gateway.wait_for, "replica is ready", after=since[mesh.gateway])


@asynccontextmanager
async def swapping(mesh: Secured, load: Load) -> AsyncIterator[None]:
    """Swap files inside the `with` block. Afterwards all services have taken them, and calls are still answered."""
    since = {service: len(service.lines) for service in mesh.services}
    yield
    await taken(mesh, since)
    await load.more()


@pytest.mark.parametrize("kind", [Renamed, Mounted])
async def test_certificates_swapped_under_load_cost_no_call(tmp_path: Path, kind: type[Renamed]) -> None:
    """A new authority replaces the old one everywhere: no call fails, and then the old certificates are refused.

    This holds on open lanes and connections as on new ones.
    """
    with secured(tmp_path, kind) as mesh:
        old, new = mesh.authority, Authority()
        own = kind(tmp_path / "caller", {**old.issue("caller.example"), "ca.crt": old.pem})
        stale = Renamed(tmp_path / "stale", {**old.issue("stale.example"), "ca.crt": old.pem + new.pem})
        # The connection is opened with what holds to the end: most clients do not read their files again.
        lasting = Renamed(tmp_path / "lasting", {**new.issue("lasting.example"), "ca.crt": old.pem + new.pem})
        ends = mesh.dispatcher_files, mesh.gateway_files, own
        async with (
            Client(mesh.address, tls=own.tls) as client,
            Client(mesh.address, tls=stale.tls) as left_behind,
            channel(mesh.address, stale) as left_open,
        ):
            np.testing.assert_array_equal(await left_behind.identity(X), X)
            assert await status_of(left_open) == grpc.StatusCode.OK
            load = Load(client, left_open)
            await load.more()
            async with swapping(mesh, load):
                for files in ends:
                    files.swap({"ca.crt": old.pem + new.pem})
            await load.end()
            async with channel(mesh.address, lasting) as opened:
                load = Load(client, opened)
                async with swapping(mesh, load):
                    for files, name in zip(ends, (HERE, HERE, "caller.example"), strict=True):
                        files.swap(new.issue(name))
                # The old certificate is still as good as the new one.
                np.testing.assert_array_equal(await left_behind.identity(X), X)
                async with swapping(mesh, load):
                    for files in ends:
                        files.swap({"ca.crt": new.pem})
                assert await status_of(left_open) == grpc.StatusCode.UNAUTHENTICATED
                with pytest.raises(UnlatchError, match=r"cannot connect to|no longer trusted"):
                    await left_behind.identity(X, timeout=5.0)
                async with channel(mesh.address, stale) as anew:
                    assert await status_of(anew) == grpc.StatusCode.UNAVAILABLE
                await load.more()
                await load.end()


async def test_a_lane_ends_with_the_certificate_it_was_opened_with(
    mesh_of_tls: Secured, files: Callable[..., Renamed]
) -> None:
    """Once a peer's certificate has expired, its open lanes and connections take no more calls. Others' do."""
    ours = mesh_of_tls.authority
    good = files(ours.issue("good.example"), ours.pem, "good")
    brief = files(ours.issue("brief.example", seconds=5.0), ours.pem, "brief")
    async with (
        Client(mesh_of_tls.address, tls=good.tls) as client,
        Client(mesh_of_tls.address, tls=brief.tls) as briefly,
        channel(mesh_of_tls.address, brief) as opened,
    ):
        np.testing.assert_array_equal(await briefly.identity(X), X)
        assert await infer(opened) == 5.0
        with pytest.raises(UnlatchError):
            await called_until(briefly, time.monotonic() + 15.0)
        assert await status_of(opened) == grpc.StatusCode.UNAUTHENTICATED
        np.testing.assert_array_equal(await client.identity(X), X)


async def called_until(client: Client, end: float) -> None:
    """Call again and again. Raises the error of the first call that fails."""
    while time.monotonic() < end:
        await client.identity(X, timeout=5.0)


async def test_half_a_pair_is_not_taken(tmp_path: Path) -> None:
    """A certificate without its key changes nothing, and the log says so. With the key it is taken."""
    with secured(tmp_path, Renamed) as mesh:
        ours = mesh.authority
        own = Renamed(tmp_path / "caller", {**ours.issue("caller.example"), "ca.crt": ours.pem})
        pair = dict(ours.issue(HERE))
        key, cert = (mesh.gateway_files[name] for name in ("tls.key", "tls.crt"))
        mesh.gateway_files.swap({"tls.crt": pair["tls.crt"]})
        why = f"--tls-key {key}: the key does not match --tls-cert {cert}"
        await asyncio.to_thread(mesh.gateway.wait_for, f"certificates not replaced, old ones stay in use: {why}")
        async with Client(mesh.address, tls=own.tls) as client:
            np.testing.assert_array_equal(await client.identity(X), X)
            since = {mesh.gateway: len(mesh.gateway.lines)}
            mesh.gateway_files.swap({"tls.key": pair["tls.key"]})
            await taken(mesh, since)
            np.testing.assert_array_equal(await client.identity(X), X)
        served = await asyncio.to_thread(certificate_of, mesh.address, own)
        assert served == ssl.PEM_cert_to_DER_cert(pair["tls.crt"].decode())


def certificate_of(address: str, own: Renamed) -> bytes | None:
    """Return the certificate that a server shows to a new connection."""
    context = ssl.create_default_context(cafile=own["ca.crt"])
    context.load_cert_chain(own["tls.crt"], own["tls.key"])
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")

    with (
        socket.create_connection((host, int(port)), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname=host) as tls,
    ):
        return tls.getpeercert(binary_form=True)


async def test_connections_are_opened_anew_by_their_age(tmp_path: Path) -> None:
    """Other clients' connections end at a certain age. None of their calls fails, and lanes go on."""
    with secured(tmp_path, Renamed, "--connection-seconds", "1") as mesh:
        ours = mesh.authority
        own = Renamed(tmp_path / "caller", {**ours.issue("caller.example"), "ca.crt": ours.pem})
        async with Client(mesh.address, tls=own.tls) as client, channel(mesh.address, own) as opened:
            load = Load(client, opened)
            peers: set[str] = set()

            def seen() -> int:
                peers.update(connections(mesh.gateway.pid, mesh.address))
                return len(peers)

            await until(lambda: seen() >= 4, "another connection, and another")
            await load.end()


def connections(pid: int, address: str) -> set[str]:
    """Return the far ends of the connections to a service's port."""
    port = f"{int(address.rpartition(':')[2]):04X}"
    tables = (Path(f"/proc/{pid}/net/{table}").read_text() for table in ("tcp", "tcp6"))
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    return {row[2] for row in rows if row[1].endswith(f":{port}") and row[3] == "01"}


WRONG_FILES: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no such file": ({"tls.crt": None}, r"--tls-cert \S+tls.crt: No such file or directory"),
    "no certificate": ({"tls.crt": b"hello"}, r"--tls-cert \S+tls.crt: wanted certificates in PEM"),
    "no key": ({"tls.key": b"hello"}, r"--tls-key \S+tls.key: wanted a readable private key in PEM"),
    "another's key": (
        {"tls.key": Authority().issue(HERE)["tls.key"]},
        r"--tls-key \S+tls.key: the key does not match --tls-cert \S+tls.crt",
    ),
    "no authority": ({"ca.crt": b""}, r"--tls-client-ca \S+ca.crt: wanted certificates in PEM"),
    "expired": (dict(Authority().issue(HERE, seconds=-60.0)), r"--tls-cert \S+tls.crt: the certificate expired at 20"),
}


@pytest.mark.parametrize(("service", "way"), [*(("gateway", way) for way in WRONG_FILES), ("compute", "expired")])
def test_wrong_files_end_the_start(tmp_path: Path, service: str, way: str) -> None:
    """The start ends with code 2, the flag, the file and the mistake, and quotes nothing of the file."""
    authority = Authority()
    given = Renamed(tmp_path / "files", {**authority.issue(HERE), "ca.crt": authority.pem})
    contents, told = WRONG_FILES[way]
    given.swap({name: content for name, content in contents.items() if content is not None})
    for name in (name for name, content in contents.items() if content is None):
        Path(given[name]).unlink()
    with Service(service, *serving(given)) as started:
        assert started.wait() == 2
        assert len(started.lines) == 1
        assert re.match(rf"unlatch {service}: {told}", started.lines[0]), started.lines
        assert "hello" not in started.lines[0]


def test_wrong_files_end_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line's start ends in the same way."""
    assert run(["call", "identity", "x=[1]", "--tls-ca", str(tmp_path / "none")]) == 2
    assert "tls.ca" in capsys.readouterr().err
