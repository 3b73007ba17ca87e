"""The compute service put together: forkserver, pool, queue, lanes; in the order of their lives."""

import asyncio
import os
from importlib.metadata import version

import grpc.aio

from unlatch.common.errors import Unavailable
from unlatch.common.kernel.messages import to_message
from unlatch.common.lane.frames import MAX_MESSAGE_BYTES, SERVICE
from unlatch.common.lane.lanes import Lanes
from unlatch.common.lane.server import LaneServer
from unlatch.common.machine.memory import granted_memory
from unlatch.common.net.rpc import handlers
from unlatch.common.security.tls import report, server_certificates
from unlatch.common.service.health import Health
from unlatch.common.service.serve import serve as serve_until_stopped
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.processes import ProcessWatch
from unlatch.common.telemetry.recorder import Recorder
from unlatch.common.telemetry.tracing import Tracing
from unlatch.common.waiting.order import Policy
from unlatch.compute.call import Call
from unlatch.compute.dispatch.queue import Queue
from unlatch.compute.intake.intake import Door
from unlatch.compute.intake.poison import Suspects
from unlatch.compute.ipc.arena import InputArena
from unlatch.compute.ipc.memory_budget import share_out
from unlatch.compute.ipc.memory_limits import MemoryLimits
from unlatch.compute.metrics import FORKSERVER, ComputeMetrics
from unlatch.compute.pool.forkserver import ForkServer
from unlatch.compute.pool.pool import Pool
from unlatch.compute.pool.slot import Slot
from unlatch.compute.readiness import Readiness
from unlatch.compute.reports import Reports
from unlatch.compute.settings import ComputeSettings
from unlatch.protos.unlatch_pb2 import Welcome


class Replica:
    """What the parts of a replica tell one another."""

    def __init__(
        self,
        settings: ComputeSettings,
        forkserver: ForkServer,
        arena_bytes: int,
        limits: MemoryLimits,
        processes: ProcessWatch,
    ) -> None:
        self._settings = settings
        self.forkserver = forkserver
        self.recorder = Recorder()
        self._caught = InternalErrors(self.recorder).caught
        self.health = Health(SERVICE)
        self.arena = InputArena(arena_bytes)
        self.queue = Queue(Policy[Call](settings.tenant_weights), settings.max_queued_calls, settings.long_call_seconds)
        self.metrics = ComputeMetrics(self.recorder, processes, self.queue.__len__)
        self.metrics.forkserver_runs(forkserver.pid)
        self.suspects = Suspects(self.queue, settings.poison_seconds)
        self.readiness = Readiness(self.readiness_changed)
        self.metrics.limited(limits.memory_bytes)
        parts = self.queue, self.suspects, self.readiness, limits, settings
        slots = [
            Slot(number, forkserver, self.metrics.worker(number), *parts) for number in range(settings.worker_count)
        ]
        self.pool = Pool(slots, self.arena, self.queue, settings.workers_reserved)
        self.queue.feed(self.pool)
        beside = self.suspects, self.metrics, Tracing()
        self._door = Door(self.readiness.kernels, self.arena, self.queue, *beside, settings.max_call_bytes)
        self._welcome = Welcome()
        self._reports = Reports(self.pool, self.queue, settings)
        self.lanes = Lanes(lambda: self._welcome, self._caught, self._reports.load)
        self._reporting: asyncio.Task[None] | None = None

    async def open(self, _: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """A gateway opens a lane."""
        await self.lanes.carry(LaneServer(self._door.accept, self._caught), context)

    async def start(self) -> None:
        """Fill the pool. Raises StartError."""
        await self.pool.start()
        self._welcome = self._greeting()
        self._reporting = asyncio.create_task(self._reports.run(self.lanes))
        self.health.set(serving=True)

    def readiness_changed(self, why: str) -> None:
        """Tell callers, probes and what waits whether calls are taken; `why` says why not."""
        self.queue.shut(Unavailable(f"no worker can be started: {why}", retry_after_milliseconds=1000) if why else None)
        self.health.set(serving=not why)
        if why:
            self.lanes.rest()
        else:
            self._welcome = self._greeting()
            self.lanes.greet_again()

    async def close(self) -> None:
        """End every worker and let go of all memory."""
        if self._reporting is not None:
            self._reporting.cancel()
        await self.pool.stop()
        await self.forkserver.close()
        self.suspects.close()
        self.arena.close()

    def _greeting(self) -> Welcome:
        return Welcome(
            server=self._settings.name,
            version=version("unlatch"),
            kernels=[to_message(spec) for spec in self.readiness.kernels.values()],
            window_calls=self._settings.window_calls,
            window_bytes=self._settings.window_bytes,
        )


async def serve(settings: ComputeSettings, notify_socket: str = "") -> None:
    """Run a replica until it is told to stop. Raises StartError, BindError, CertificateError when it cannot start."""
    certificates = server_certificates(settings)
    shares = share_out(settings, granted_memory())
    limits = MemoryLimits(
        memory_bytes=shares.worker_bytes,
        recycle_calls=settings.recycle_calls,
        recycle_growth_bytes=settings.recycle_growth_bytes,
    )
    forkserver = ForkServer(
        settings.kernels, settings.worker_blas_threads, settings.max_reply_bytes, limits.memory_bytes
    )
    with ProcessWatch(reaper=FORKSERVER) as processes:
        processes.watch("dispatcher", os.getpid())
        replica = Replica(settings, forkserver, shares.arena_bytes, limits, processes)
        report(replica.recorder, certificates)
        try:
            await replica.start()
            await serve_until_stopped(
                "dispatcher",
                settings,
                certificates=certificates,
                lanes=replica.lanes,
                handlers=[handlers(SERVICE, streams={"Open": replica.open})],
                reflected=[SERVICE],
                max_message_bytes=MAX_MESSAGE_BYTES,
                health=replica.health,
                recorder=replica.recorder,
                collectors=[replica.metrics, processes],
                live=replica.queue.__len__,
                drain=replica.lanes.drain,
                notify_socket=notify_socket,
            )
        finally:
            await replica.close()
