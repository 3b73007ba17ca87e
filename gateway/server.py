"""The gateway put together: fleet, calls and doors, in the order of their lives."""

import asyncio
import os
from collections import ChainMap
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from unlatch.common.lane.frames import MAX_MESSAGE_BYTES
from unlatch.common.lane.frames import SERVICE as LANE_SERVICE
from unlatch.common.lane.lanes import Lanes
from unlatch.common.net.rpc import handlers
from unlatch.common.security.tls import ChannelSecurity, guarded, guarded_stream, load, report, server_certificates
from unlatch.common.service.health import Health
from unlatch.common.service.serve import serve as serve_until_stopped
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.processes import ProcessWatch
from unlatch.common.telemetry.recorder import Recorder
from unlatch.common.telemetry.tracing import Tracing
from unlatch.gateway.calls.call_log import CallLog
from unlatch.gateway.calls.calls import Calls
from unlatch.gateway.calls.record import Records
from unlatch.gateway.doors.client_lanes import ClientLanes
from unlatch.gateway.doors.oip import SERVICE as OIP_SERVICE
from unlatch.gateway.doors.oip import OipCalls
from unlatch.gateway.doors.oip_metadata import OipMetadata
from unlatch.gateway.doors.rpc_guard import RpcGuard
from unlatch.gateway.fleet.discovery import Discovery
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.fleet.replica import Replica
from unlatch.gateway.metrics import GatewayMetrics
from unlatch.gateway.settings import GatewaySettings
from unlatch.gateway.tenants.authentication import Authentication
from unlatch.gateway.tenants.tenants import Tenants
from unlatch.gateway.tenants.tokens import Tokens
from unlatch.protos.unlatch_pb2 import Kernel, Welcome

if TYPE_CHECKING:
    from unlatch.common.security.certificates import Certificates

# gRPC refuses a message that is too large before we see it, with an error that says little. So gRPC lets through this
# many times as much, and we refuse it, and say where large calls belong. gRPC's arguments are ints of C.
_REFUSED_BY_US = 2
_MAX_GRPC_BYTES = 2**31 - 1


def _tokens(settings: GatewaySettings) -> Tokens | None:
    if not settings.token_keys:
        return None
    return Tokens(
        settings.token_keys,
        issuer=settings.token_issuer,
        audience=settings.token_audience,
        algorithms=settings.token_algorithms,
        leeway_seconds=settings.token_leeway_seconds,
        claim=settings.token_tenant_claim,
    )


class Gateway:
    """The parts of a gateway, and what they tell one another."""

    def __init__(
        self, settings: GatewaySettings, certificates: "Certificates | None", of_lanes: "Certificates | None"
    ) -> None:
        self._settings = settings
        self._of_lanes = of_lanes
        self.recorder = Recorder()
        self._kernels: list[Kernel] = []
        report(self.recorder, certificates, of_lanes)
        self.health = Health(OIP_SERVICE, LANE_SERVICE)
        self._tokens = _tokens(settings)
        self._tenants = Tenants(settings.tenants)
        discovery = Discovery(
            settings.replicas,
            settings.discovery_seconds,
            settings.most_replicas,
            name=settings.name,
            bound=not settings.replica_subset,
        )
        errors = InternalErrors(self.recorder)
        # The weights of the file of tenants come first.
        weights = ChainMap(self._tenants.weights, settings.tenant_weights)
        security = ChannelSecurity(of_lanes, settings.replica_name)
        self.fleet = Fleet(
            discovery,
            weights,
            self._fleet_changed,
            lambda target, events: Replica(target, events, security, settings.tls_grace_seconds, errors),
            errors,
        )
        self.metrics = GatewayMetrics(
            self.recorder, errors, lambda: len(self.calls), self.fleet, self._tenants.in_flight
        )
        log = CallLog(settings.logged_calls_per_second, settings.logged_failures_per_second)
        self.calls = Calls(self.fleet, settings, Records(self.metrics, Tracing(), log))
        self.lanes = Lanes(self._welcome, errors.caught)
        authentication = Authentication(self._tokens, self.metrics.unauthenticated)
        self.rpc_guard = RpcGuard(authentication, self._tenants, settings.message_seconds)
        self.clients = ClientLanes(
            self.calls,
            self.lanes,
            authentication,
            self._tenants,
            stalled_call_seconds=settings.stalled_call_seconds,
            grace_seconds=settings.tls_grace_seconds,
            caught=errors.caught,
        )
        self._watching: list[asyncio.Task[Any]] = []
        self._checking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Read the files of keys and tenants, and open the lanes to the replicas. Raises FileError."""
        files = [self._tenants.file, None if self._tokens is None else self._tokens.file]
        for file in files:
            if file is not None:
                file.load()
                self._watching.append(asyncio.create_task(file.run()))
        if self._tokens is not None:
            self._tokens.on_change = self._check_lanes
        self.fleet.start()
        if self._of_lanes is not None:
            self._watching.append(asyncio.create_task(self._of_lanes.watch()))

    def _fleet_changed(self) -> None:
        """Tell probes, and clients where the catalogue is another one."""
        self.health.set(serving=self.fleet.takes_calls)
        kernels = self.fleet.catalogue.kernels()
        if kernels != self._kernels:
            self._kernels = kernels
            self.lanes.greet_again()

    async def drain(self) -> None:
        """Answer the calls that have come by either door, and take no new ones."""
        await self.calls.drain()
        await self.lanes.drain()

    async def close(self) -> None:
        """Close the lanes to the replicas."""
        for task in self._watching:
            task.cancel()
        await self.fleet.close()

    def _check_lanes(self) -> None:
        self._checking = asyncio.create_task(self.clients.check())

    def _welcome(self) -> Welcome:
        return Welcome(
            server="gateway",
            version=version("unlatch"),
            kernels=self._kernels,
            window_calls=self._settings.window_calls,
            window_bytes=self._settings.window_bytes,
        )


async def serve(settings: GatewaySettings, notify_socket: str = "") -> None:
    """Run a gateway until it is told to stop. Raises BindError or CertificateError when it cannot start."""
    certificates, of_lanes = server_certificates(settings), _lanes_certificates(settings)
    with ProcessWatch() as processes:
        processes.watch("gateway", os.getpid())
        gateway = Gateway(settings, certificates, of_lanes)
        gateway.start()
        calls = OipCalls(gateway.calls, gateway.rpc_guard, settings.max_message_bytes, gateway.metrics.errors.caught)
        methods = {**OipMetadata(gateway.fleet, gateway.metrics).methods(), "ModelInfer": calls.one}
        measured = {
            name: gateway.metrics.measured(OIP_SERVICE, name, guarded(certificates, gateway.rpc_guard.unary(method)))
            for name, method in methods.items()
        }
        stream = gateway.metrics.measured(
            OIP_SERVICE, "ModelStreamInfer", guarded_stream(certificates, calls.stream), "bidi_stream"
        )
        try:
            await serve_until_stopped(
                "gateway",
                settings,
                certificates=certificates,
                lanes=gateway.lanes,
                handlers=[
                    handlers(OIP_SERVICE, unary=measured, streams={"ModelStreamInfer": stream}),
                    handlers(LANE_SERVICE, streams={"Open": gateway.clients.open}),
                ],
                reflected=[OIP_SERVICE, LANE_SERVICE],
                max_message_bytes=min(_REFUSED_BY_US * settings.max_message_bytes + MAX_MESSAGE_BYTES, _MAX_GRPC_BYTES),
                health=gateway.health,
                recorder=gateway.recorder,
                collectors=[processes],
                live=gateway.calls.__len__,
                drain=gateway.drain,
                notify_socket=notify_socket,
            )
        finally:
            await gateway.close()


def _lanes_certificates(settings: GatewaySettings) -> "Certificates | None":
    """Return the certificates for lanes to replicas, if those speak TLS. Raises CertificateError."""
    names = ("--replica-cert", "--replica-key", "--replica-ca")
    paths = settings.replica_cert, settings.replica_key, settings.replica_ca
    return load(*paths, names=names) if any(paths) else None
