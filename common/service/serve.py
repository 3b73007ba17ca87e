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
from unlatch.common.net.rpc import BindError, bind, options, server_options
from unlatch.common.net.settings import ServiceSettings, Settings
from unlatch.common.security.tls import refusal, server_credentials
from unlatch.common.service.gc_pauses import GcPauses
from unlatch.common.service.health import Health
from unlatch.common.service.life import Life, go_first, notify_ready
from unlatch.common.telemetry.loop_watch import LoopWatch
from unlatch.common.telemetry.metrics_server import serve_metrics
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
    recorder: Recorder,
    collectors: Iterable[Collector],
    live: Callable[[], int],
    drain: Callable[[], Awaitable[None]],
    notify_socket: str,
) -> None:
    """Serve until a signal, drain, and return with every port closed. Raises BindError for a port that is taken.

    `live` returns the number of live calls, which the garbage collector would have to walk.
    """
    life = Life()
    server = grpc.aio.server(options=[*server_options(max_message_bytes, settings), *_aging(settings, certificates)])
    server.add_generic_rpc_handlers(tuple(handlers))
    if settings.reflects:
        reflection.enable_server_reflection((*reflected, reflection.SERVICE_NAME), server)
    listen = bind(server, settings.listen, server_credentials(certificates) if certificates else None)
    probes = grpc.aio.server(options=options(max_message_bytes))
    health_pb2_grpc.add_HealthServicer_to_server(health, probes)
    health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection((health_name, reflection.SERVICE_NAME), probes)
    health_listen = bind(probes, settings.health_listen)
    try:
        metrics_listen, close_metrics = serve_metrics(settings.metrics_listen, [recorder, *collectors])
    except (OSError, ValueError) as error:
        raise BindError(f"cannot serve metrics on {settings.metrics_listen}: {error}") from None
    with LoopWatch(recorder, process), GcPauses(live):
        await server.start()
        await probes.start()
        go_first()
        log.info("serving", listen=listen, health_listen=health_listen, metrics_listen=metrics_listen)
        beside = [asyncio.create_task(_tell(health, notify_socket))]
        if certificates is not None:
            beside.append(asyncio.create_task(_watch(certificates, lanes, settings.tls_grace_seconds)))
        await life.until_stop()
        for task in beside:
            task.cancel()
        health.end()
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


def _aging(settings: Settings, certificates: "Certificates | None") -> list[tuple[str, int]]:
    """The maximum age of secured connections. RPCs that are running at that age are not cut off."""
    if certificates is None:
        return []
    return [("grpc.max_connection_age_ms", round(settings.tls_connection_seconds * 1000))]


async def _watch(certificates: "Certificates", lanes: Lanes, grace_seconds: float) -> None:
    """Keep the certificates up to date, and reopen lanes that were opened with older ones."""
    await certificates.watch(
        looked=lambda: lanes.check(lambda context: refusal(certificates, context), grace_seconds),
        taken=lambda: lanes.reopen(grace_seconds),
    )


async def _tell(health: Health, notify_socket: str) -> None:
    """Notify a supervisor once calls are served; for a gateway that is when it has a replica."""
    await health.until_serving()
    notify_ready(notify_socket)
