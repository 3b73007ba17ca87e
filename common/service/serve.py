"""Parts of a service that gateway and dispatcher share: ports, metrics, health, drain, end."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import grpc.aio
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client.registry import Collector

from unlatch.common.lane.lanes import Lanes
from unlatch.common.net.ports import BindError
from unlatch.common.net.rpc import bind, options, server_options
from unlatch.common.net.settings import ServiceSettings
from unlatch.common.net.sockets import refuse_connections
from unlatch.common.security.tls import refusal, server_credentials
from unlatch.common.service.acceptors import Acceptors, UnaryMethod, are_usable
from unlatch.common.service.connections import ConnectionWatch, connection_bound
from unlatch.common.service.gc_pauses import GcPauses
from unlatch.common.service.health import Health
from unlatch.common.service.life import Life, go_first
from unlatch.common.service.metrics_server import serve_metrics
from unlatch.common.telemetry.loop_watch import LoopWatch
from unlatch.common.telemetry.recorder import Recorder

if TYPE_CHECKING:
    from unlatch.common.security.certificates import Certificates

log = structlog.get_logger()

# After the drain only connections are left to close.
_STOP_GRACE_SECONDS = 0.2


async def serve(
    process: str,
    settings: ServiceSettings,
    *,
    certificates: "Certificates | None",
    lanes: Lanes,
    handlers: Sequence[grpc.GenericRpcHandler],
    reflected: Sequence[str],
    max_message_bytes: int,
    health: Health,
    collectors: Iterable[Collector],
    live: Callable[[], int],
    drain: Callable[[], Awaitable[None]],
    life: Life,
    accepted_ahead: UnaryMethod | None = None,
    shares_ports: bool = False,
) -> None:
    """Serve until a signal, drain, and return with every port closed. Raises BindError for a port that is taken.

    `collectors` have the metrics of the service. `live` returns the number of live calls, which the garbage collector
    would have to walk. Acceptors take the method `accepted_ahead`, if they work here (common/service/acceptors.py).
    `shares_ports` says that other processes listen on the same addresses, but for that of metrics.
    """
    recorder = Recorder()
    bound = connection_bound(settings.max_connections)
    server = grpc.aio.server(options=server_options(max_message_bytes, settings, bound, shares_port=shares_ports))
    server.add_generic_rpc_handlers(tuple(handlers))
    acceptors = Acceptors(server, accepted_ahead) if accepted_ahead and await are_usable() else None
    if settings.reflects:
        reflection.enable_server_reflection((*reflected, reflection.SERVICE_NAME), server)
    listen = bind(server, "--listen", settings.listen, server_credentials(certificates) if certificates else None)
    probes = grpc.aio.server(options=options(max_message_bytes, shares_port=shares_ports))
    health_pb2_grpc.add_HealthServicer_to_server(health, probes)
    health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection((health_name, reflection.SERVICE_NAME), probes)
    health_listen = bind(probes, "--health-listen", settings.health_listen)
    try:
        metrics_listen, close_metrics = serve_metrics(settings.metrics_listen, [recorder, *collectors])
    except OSError as error:
        raise BindError(f"--metrics-listen {settings.metrics_listen}: {error.strerror}") from None
    with LoopWatch(recorder, process), GcPauses(live):
        await server.start()
        if acceptors is not None:
            acceptors.start()
        await probes.start()
        go_first()
        log.info("serving", listen=listen, health_listen=health_listen, metrics_listen=metrics_listen)
        watch = ConnectionWatch(listen, bound, recorder)
        beside = [asyncio.create_task(_tell(health, life)), asyncio.create_task(watch.run())]
        if certificates is not None:
            # Lanes that were opened with older certificates are opened again.
            grace_seconds = settings.tls_grace_seconds
            watching = certificates.watch(
                looked=lambda: lanes.check(lambda context: refusal(certificates, context), grace_seconds),
                taken=lambda: lanes.reopen(grace_seconds),
            )
            beside.append(asyncio.create_task(watching))
        await life.until_stop()
        for task in beside:
            task.cancel()
        health.end()
        await refuse_connections(listen)
        try:
            async with asyncio.timeout(settings.drain_seconds):
                await drain()
        except TimeoutError:
            log.warning("drain timed out", drain_seconds=settings.drain_seconds)
        # All at once, since each takes its time and stopping a service waits for them all.
        await asyncio.gather(
            server.stop(_STOP_GRACE_SECONDS), probes.stop(_STOP_GRACE_SECONDS), asyncio.to_thread(close_metrics)
        )
    log.info("stopped")


async def _tell(health: Health, life: Life) -> None:
    """Notify a supervisor once calls are served; for a gateway that is when it has a replica."""
    await health.until_serving()
    life.ready()
