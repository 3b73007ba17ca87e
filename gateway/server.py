"""The gateway put together: fleet, calls and doors, in the order of their lives."""

import asyncio
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client.registry import Collector

from unlatch.common.errors import Unavailable
from unlatch.common.lane.frames import MAX_MESSAGE_BYTES
from unlatch.common.lane.frames import SERVICE as LANE_SERVICE
from unlatch.common.lane.lanes import Lanes
from unlatch.common.net.rpc import handlers
from unlatch.common.net.unread import unread_answers
from unlatch.common.security.tls import ChannelSecurity, load, report, server_certificates
from unlatch.common.service.acceptors import UnaryMethod
from unlatch.common.service.health import Health
from unlatch.common.service.life import Life
from unlatch.common.service.serve import serve as serve_until_stopped
from unlatch.common.service.version import VERSION
from unlatch.common.telemetry.components import Component
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.processes import ProcessWatch
from unlatch.common.telemetry.recorder import Recorder
from unlatch.common.telemetry.tracing import Tracing
from unlatch.gateway.calls.call_log import CallLog
from unlatch.gateway.calls.calls import DRAINING, Calls
from unlatch.gateway.calls.record import Records
from unlatch.gateway.doors.client_lanes import ClientLanes
from unlatch.gateway.doors.oip import OipCalls
from unlatch.gateway.doors.oip_metadata import OipMetadata
from unlatch.gateway.doors.rpc_guard import SERVICE as OIP_SERVICE
from unlatch.gateway.doors.rpc_guard import RpcGuard
from unlatch.gateway.fleet.discovery import Discovery
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.fleet.fleets import Fleets
from unlatch.gateway.fleet.hold import HoldLimits
from unlatch.gateway.fleet.replica import Replica, ReplicaEvents
from unlatch.gateway.metrics import GatewayMetrics
from unlatch.gateway.settings import GatewaySettings
from unlatch.gateway.tenants.authentication import Authentication
from unlatch.gateway.tenants.shared_quotas import bytes_of_all
from unlatch.gateway.tenants.shared_usage import SharedUsage
from unlatch.gateway.tenants.tenants import Tenants
from unlatch.gateway.totals import MachineTotals
from unlatch.protos.unlatch_pb2 import Welcome

if TYPE_CHECKING:
    from unlatch.common.security.certificates import Certificates
    from unlatch.gateway.tenants.tokens import Tokens

# gRPC refuses a message that is too large before we see it, with an error that says little. So gRPC lets through this
# many times as much, and we refuse it, and say where large calls belong. gRPC's arguments are ints of C.
_REFUSED_BY_US = 2
_MAX_GRPC_BYTES = 2**31 - 1
# Calls are answered as usual for this part of a drain at most. The rest is for the calls that came last.
_MOVING_PART = 2 / 3


def _tokens(settings: GatewaySettings) -> "Tokens | None":
    if not settings.token_keys:
        return None
    # Imported here, since only tokens need PyJWT, which takes 8 MiB and 40 ms.
    from unlatch.gateway.tenants.tokens import Tokens

    return Tokens(
        settings.token_keys,
        issuer=settings.token_issuer,
        audience=settings.token_audience,
        algorithms=settings.token_algorithms,
        leeway_seconds=settings.token_leeway_seconds,
        claim=settings.token_tenant_claim,
    )


# Makes a replica from its address.
NewReplica = Callable[[str, ReplicaEvents, InternalErrors], Replica]


class Gateway:
    """The parts of a gateway, and what they tell one another. `new_replica` makes each replica that discovery finds.

    `usage` is where the units of a machine count what is used of quotas and bounds, if there are several.
    """

    def __init__(
        self,
        settings: GatewaySettings,
        certificates: "Certificates | None",
        new_replica: NewReplica,
        of_lanes: "Certificates | None" = None,
        usage: SharedUsage | None = None,
    ) -> None:
        self._settings = settings
        self._certificates = certificates
        self._of_lanes = of_lanes
        self.recorder = Recorder()
        # What lanes are greeted with, by fleet.
        self._welcomes: dict[Fleet, Welcome] = {}
        report(self.recorder, certificates, of_lanes)
        self.health = Health(OIP_SERVICE, LANE_SERVICE)
        self._tokens = _tokens(settings)
        self._totals = MachineTotals() if usage is None else usage.totals
        held = bytes_of_all(settings.max_live_bytes, usage)
        self._tenants = Tenants(settings.tenants, held, settings.tenant_weights, usage)
        self._errors = errors = InternalErrors(self.recorder)
        self._new_replica = new_replica
        self.fleets = Fleets(settings.replicas, self._fleet)
        self.metrics = GatewayMetrics(
            self.recorder, errors, lambda: len(self.calls), self.fleets, self._tenants.in_flight
        )
        log = CallLog(settings.logged_calls_per_second, settings.logged_failures_per_second)
        self.calls = Calls(self.fleets, settings, Records(self.metrics, Tracing(), log), self._totals)
        self.unread = unread_answers(settings.unread_seconds)
        self.lanes = Lanes(self._greeting, errors.caught, self.unread)
        refused = partial(self.metrics.unauthenticated.add, 1)
        authentication = Authentication(self._tokens, refused, encrypted=certificates is not None)
        self.rpc_guard = RpcGuard(certificates, authentication, self._tenants, self.metrics, settings.message_seconds)
        self.clients = ClientLanes(
            self.calls,
            self.lanes,
            authentication,
            self._tenants,
            max_lanes=settings.max_lanes,
            stalled_call_seconds=settings.stalled_call_seconds,
            grace_seconds=settings.tls_grace_seconds,
            caught=errors.caught,
            metrics=self.metrics,
            totals=self._totals,
        )
        self._watching: list[asyncio.Task[Any]] = []

    def start(self) -> None:
        """Read the files of keys and tenants, and open the lanes to the replicas. Raises FileError."""
        files = [self._tenants.file, None if self._tokens is None else self._tokens.file]
        for file in files:
            if file is not None:
                file.load()
                self._watching.append(asyncio.create_task(file.run()))
        if self._tokens is not None:
            self._tokens.on_change = self.clients.checking.start
        for fleet in self.fleets:
            fleet.members.start()
        if self._of_lanes is not None:
            self._watching.append(asyncio.create_task(self._of_lanes.watch()))

    def _fleet(self, targets: tuple[str, ...]) -> Fleet:
        settings, errors = self._settings, self._errors
        discovery = Discovery(
            targets,
            settings.discovery_seconds,
            settings.most_replicas,
            name=settings.name,
            bound=not settings.replica_subset,
        )
        return Fleet(
            discovery,
            self._tenants.weights,
            self._fleet_changed,
            lambda target, events: self._new_replica(target, events, errors),
            errors,
            HoldLimits(settings.hold_seconds, settings.max_held_calls, settings.max_held_bytes),
            self._totals,
        )

    def _fleet_changed(self) -> None:
        """Tell probes, and clients where the catalogue is another one."""
        self.health.set(serving=self.fleets.take_calls)
        welcomes = {fleet: self._welcome(fleet) for fleet in self.fleets}
        if welcomes != self._welcomes:
            self._welcomes = welcomes
            self.lanes.greet_again()

    async def serve(
        self,
        process: str,
        collectors: Iterable[Collector],
        life: Life,
        *,
        shares_ports: bool = False,
        before_drain: Callable[[], None] = lambda: None,
    ) -> None:
        """Serve both doors until a signal, and drain. `collectors` are served beside the gateway's own metrics.

        `shares_ports` says that other gateways of this machine listen on the same addresses. `before_drain` is called
        when the drain begins. Raises BindError.
        """
        settings, caught = self._settings, self.metrics.errors.caught

        async def drain() -> None:
            before_drain()
            await self.drain()

        calls = OipCalls(self.calls, self.rpc_guard, self.unread, settings.max_message_bytes, caught)
        methods = {**OipMetadata(self.fleets, self.metrics).methods(), "ModelInfer": calls.one}
        unary = {name: self.rpc_guard.unary(name, method) for name, method in methods.items()}
        infer = UnaryMethod(OIP_SERVICE, "ModelInfer", unary["ModelInfer"])
        streams = {"ModelStreamInfer": self.rpc_guard.stream("ModelStreamInfer", calls.stream)}
        await serve_until_stopped(
            process,
            settings,
            certificates=self._certificates,
            lanes=self.lanes,
            handlers=[
                handlers(OIP_SERVICE, unary=unary, streams=streams),
                handlers(LANE_SERVICE, streams={"Open": self.clients.open}),
            ],
            reflected=[OIP_SERVICE, LANE_SERVICE],
            max_message_bytes=min(max(_REFUSED_BY_US * settings.max_message_bytes, MAX_MESSAGE_BYTES), _MAX_GRPC_BYTES),
            health=self.health,
            collectors=[Component("gateway", lambda: [self.recorder]), *collectors],
            live=self.calls.__len__,
            drain=drain,
            life=life,
            accepted_ahead=infer if settings.accept_ahead else None,
            shares_ports=shares_ports,
        )

    async def drain(self) -> None:
        """Answer calls until callers have moved to other gateways. Then refuse calls, and answer those that have come.

        Lanes are told to move. Other callers move when their connections reach their age, and cannot open new ones
        here. Callers that have no other gateway stay for most of the drain's time.
        """
        self.lanes.leave()
        with suppress(TimeoutError):
            async with asyncio.timeout(_MOVING_PART * self._settings.drain_seconds):
                await self.calls.callers_left()
        # Each lane is told as soon as its own calls are answered, whatever others wait for.
        await asyncio.gather(self.calls.drain(), self.lanes.end(Unavailable(DRAINING)))

    async def close(self) -> None:
        """Close the lanes to the replicas."""
        for task in self._watching:
            task.cancel()
        for fleet in self.fleets:
            await fleet.members.close()

    def _greeting(self, tenant: str) -> Welcome:
        fleet = self.fleets.of(tenant)
        return self._welcomes.get(fleet) or self._welcome(fleet)

    def _welcome(self, fleet: Fleet) -> Welcome:
        return Welcome(
            server="gateway",
            version=VERSION,
            kernels=fleet.members.catalogue.kernels(),
            window_calls=self._settings.window_calls,
            window_bytes=self._settings.window_bytes,
        )


async def serve(settings: GatewaySettings, life: Life) -> None:
    """Run a gateway until it is told to stop. Raises BindError or CertificateError when it cannot start."""
    certificates, of_lanes = server_certificates(settings), _lanes_certificates(settings)
    security = ChannelSecurity(of_lanes, settings.replica_name)
    with ProcessWatch() as processes:
        processes.watch("gateway", os.getpid())
        gateway = Gateway(
            settings,
            certificates,
            lambda target, events, errors: Replica(target, events, security, settings.tls_grace_seconds, errors),
            of_lanes,
        )
        gateway.start()
        try:
            await gateway.serve("gateway", [processes], life)
        finally:
            await gateway.close()


def _lanes_certificates(settings: GatewaySettings) -> "Certificates | None":
    """Return the certificates for lanes to replicas, if those speak TLS. Raises CertificateError."""
    names = ("--replica-cert", "--replica-key", "--replica-ca")
    paths = settings.replica_cert, settings.replica_key, settings.replica_ca
    return load(*paths, names=names) if any(paths) else None
