"""A unit put together, in the order of its life: compute service, gateway, doors.

client ── gRPC ──> Gateway ── LocalReplica ── LocalLane ──> ComputeService ── socketpair, shared memory ──> workers
                   └──────────── one process, one event loop ───────────┘
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Never

import grpc.aio

from unlatch.common.lane.frames import MAX_MESSAGE_BYTES
from unlatch.common.lane.frames import SERVICE as LANE_SERVICE
from unlatch.common.net.rpc import bind, handlers, options
from unlatch.common.security.tls import server_certificates
from unlatch.common.service.life import Life
from unlatch.common.telemetry.components import Component
from unlatch.common.telemetry.processes import ProcessWatch
from unlatch.compute.metrics import FORKSERVER
from unlatch.compute.settings import ComputeSettings
from unlatch.gateway.server import Gateway
from unlatch.gateway.settings import GatewaySettings
from unlatch.gateway.tenants.shared_usage import SharedUsage
from unlatch.unit.place import Place
from unlatch.unit.replica import LocalCompute


async def serve(
    settings: GatewaySettings, compute: ComputeSettings, life: Life, place: Place | None, *, reload: bool
) -> None:
    """Run a unit until it is told to stop. Raises what keeps a gateway or a replica from starting."""
    certificates = server_certificates(settings)
    with ProcessWatch(reaper=FORKSERVER) as processes:
        processes.watch("unit", os.getpid())
        replica = LocalCompute(compute, processes, place)
        try:
            # First, because its forkserver must start before gRPC's threads do.
            await replica.start()
            async with _siblings_served(place, replica):
                usage = None if place is None else SharedUsage(place.quotas_fd, place.number, place.units)
                gateway = Gateway(settings, certificates, replica.replica, usage=usage)
                gateway.start()
                reloading = asyncio.create_task(_reload(replica, life)) if reload else None
                try:
                    await gateway.serve(
                        "unit",
                        [Component("compute", lambda: replica.collectors), processes],
                        life,
                        shares_ports=place is not None,
                        before_drain=replica.leave_siblings,
                    )
                finally:
                    if reloading is not None:
                        reloading.cancel()
                        await asyncio.wait((reloading,))
                    await gateway.close()
        finally:
            await replica.close()


@asynccontextmanager
async def _siblings_served(place: Place | None, replica: LocalCompute) -> AsyncIterator[None]:
    """Take calls of sibling units for this unit's replica, while the block lasts. Raises BindError."""
    if place is None:
        yield
        return
    server = grpc.aio.server(options=options(MAX_MESSAGE_BYTES))
    server.add_generic_rpc_handlers((handlers(LANE_SERVICE, streams={"Open": replica.open}),))
    bind(server, "lanes of siblings", place.lanes(place.number))
    await server.start()
    try:
        yield
    finally:
        # Their calls are answered, or out of time, when the replica has drained.
        await replica.close()
        await server.stop(None)


async def _reload(replica: LocalCompute, life: Life) -> Never:
    """Replace the compute service whenever SIGUSR1 asks for it, and tell the supervisor when the new one serves.

    The supervisor watches the kernels' files and tries them first. A trial takes a fork, and a process with gRPC's
    threads must not fork.
    """
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, asked.set)
    while True:
        await asked.wait()
        asked.clear()
        await replica.replace()
        life.ready()
