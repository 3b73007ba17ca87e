"""The compute service put together: forkserver, pool, dispatcher, lanes; in the order of their lives."""

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
from unlatch.compute.dispatch.dispatcher import Dispatcher
from unlatch.compute.dispatch.poison import Poison
from unlatch.compute.intake.intake import CallIntake
from unlatch.compute.ipc.arena import InputArena
from unlatch.compute.ipc.memory_budget import memory_budget
from unlatch.compute.ipc.memory_limits import MemoryLimits
from unlatch.compute.metrics import FORKSERVER, ComputeMetrics
from unlatch.compute.pool.forkserver import ForkServer
from unlatch.compute.pool.pool import Pool
from unlatch.compute.pool.slot import Slot
from unlatch.compute.readiness import Readiness
from unlatch.compute.reports import Reports
from unlatch.compute.settings import ComputeSettings
from unlatch.protos.unlatch_pb2 import Welcome


class ComputeService:
    """The parts of a replica, and what they tell one another."""

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
        self.errors = errors = InternalErrors(self.recorder)
        self.health = Health(SERVICE)
        self.arena = InputArena(arena_bytes)
        self.metrics = ComputeMetrics(self.recorder, processes, lambda: len(self.dispatcher))
        self.metrics.forkserver_runs(forkserver.pid)
        self.metrics.limited(limits.memory_bytes)
        self.readiness = Readiness(self.readiness_changed)
        parts = self.readiness, limits, settings, errors
        slots = [
            Slot(number, forkserver, self.metrics.worker(number), *parts) for number in range(settings.worker_count)
        ]
        self.pool = Pool(slots, self.arena, errors, reserved_workers=settings.workers_reserved)
        self.poison = Poison(settings.poison_seconds, errors)
        self.dispatcher = Dispatcher(
            self.pool,
            self.poison,
            self.metrics,
            errors,
            weights=settings.tenant_weights,
            max_calls=settings.max_queued_calls,
            long_call_seconds=settings.long_call_seconds,
        )
        beside = self.metrics, Tracing(), errors
        self._intake = CallIntake(self.readiness.kernels, self.arena, self.dispatcher, *beside, settings.max_call_bytes)
        self._welcome = Welcome()
        self._reports = Reports(self.pool, self.dispatcher, settings, errors)
        self.lanes = Lanes(lambda: self._welcome, errors.caught, self._reports.load)
        self._reporting: asyncio.Task[None] | None = None

    async def open(self, _: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """A gateway opens a lane."""
        await self.lanes.carry(LaneServer(self._intake.accept, self.errors.caught), context)

    async def start(self) -> None:
        """Fill the pool. Raises StartError."""
        await self.dispatcher.start()
        self._welcome = self._greeting()
        self._reporting = asyncio.create_task(self._reports.run(self.lanes))
        self.health.set(serving=True)

    def readiness_changed(self, why: str) -> None:
        """Tell callers, probes and what waits whether calls are taken; `why` says why not."""
        self.dispatcher.shut(
            Unavailable(f"no worker can be started: {why}", retry_after_milliseconds=1000) if why else None
        )
        self.health.set(serving=not why)
        if why:
            self.lanes.rest()
        else:
            self._welcome = self._greeting()
            self.lanes.greet_again()

    async def close(self) -> None:
        """End every worker and free all shared memory."""
        if self._reporting is not None:
            self._reporting.cancel()
        await self.pool.stop()
        await self.forkserver.close()
        self.poison.close()
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
    budget = memory_budget(settings, granted_memory())
    limits = MemoryLimits(
        memory_bytes=budget.worker_bytes,
        recycle_calls=settings.recycle_calls,
        recycle_growth_bytes=settings.recycle_growth_bytes,
    )
    forkserver = ForkServer(
        settings.kernels, settings.worker_blas_threads, settings.max_reply_bytes, limits.memory_bytes
    )
    with ProcessWatch(reaper=FORKSERVER) as processes:
        processes.watch("dispatcher", os.getpid())
        service = ComputeService(settings, forkserver, budget.arena_bytes, limits, processes)
        report(service.recorder, certificates)
        try:
            await service.start()
            await serve_until_stopped(
                "dispatcher",
                settings,
                certificates=certificates,
                lanes=service.lanes,
                handlers=[handlers(SERVICE, streams={"Open": service.open})],
                reflected=[SERVICE],
                max_message_bytes=MAX_MESSAGE_BYTES,
                health=service.health,
                recorder=service.recorder,
                collectors=[service.metrics, processes],
                live=service.dispatcher.__len__,
                drain=service.lanes.drain,
                notify_socket=notify_socket,
            )
        finally:
            await service.close()
