"""The compute service put together: forkserver, pool, dispatcher, lanes; in the order of their lives."""

import asyncio
import os

import grpc.aio
from prometheus_client.registry import Collector

from unlatch.common.errors import Unavailable
from unlatch.common.kernel.messages import to_message
from unlatch.common.lane.frames import MAX_MESSAGE_BYTES, MAX_UNSENT_BYTES, SERVICE
from unlatch.common.lane.held_bytes import HeldBytes
from unlatch.common.lane.lanes import Lanes
from unlatch.common.lane.local import LocalLane
from unlatch.common.lane.server import LaneServer
from unlatch.common.machine.cgroups import granted_memory
from unlatch.common.machine.process_states import this_process
from unlatch.common.net.rpc import handlers
from unlatch.common.net.unread import unread_answers
from unlatch.common.security.tls import report, server_certificates
from unlatch.common.service.health import Health
from unlatch.common.service.life import Life
from unlatch.common.service.serve import serve as serve_until_stopped
from unlatch.common.service.version import VERSION
from unlatch.common.telemetry.components import Component
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
from unlatch.compute.pool.occupancy import Occupancy
from unlatch.compute.pool.pool import Pool
from unlatch.compute.pool.slot import Slot
from unlatch.compute.readiness import Readiness
from unlatch.compute.reports import Reports
from unlatch.compute.settings import ComputeSettings
from unlatch.protos.unlatch_pb2 import Welcome

# Bytes of frames and small replies that gateways have still to read on all lanes. Past it a lane is read again when it
# has nothing left to send. A part of what memory_budget.py keeps for the services.
_UNSENT_BYTES = 8 * MAX_UNSENT_BYTES


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
        occupancy = Occupancy(settings.worker_count)
        slots = [
            Slot(number, forkserver, occupancy, self.metrics.worker(number), *parts)
            for number in range(settings.worker_count)
        ]
        self.pool = Pool(slots, occupancy, self.arena, errors, reserved_workers=settings.workers_reserved)
        self.poison = Poison(settings.poison_seconds, errors)
        self.dispatcher = Dispatcher(self.pool, self.poison, self.metrics, errors, settings)
        beside = self.metrics, Tracing(), errors
        intake = CallIntake(self.readiness.kernels, self.arena, self.dispatcher, *beside, settings.max_call_bytes)
        self.accept = intake.accept
        self._welcome = Welcome()
        self._reports = Reports(self.pool, self.dispatcher, settings, errors)
        self._unsent = HeldBytes(max_bytes=_UNSENT_BYTES)
        unread = unread_answers(settings.unread_seconds)
        self.lanes = Lanes(lambda _: self._welcome, errors.caught, unread, self._reports.load)
        self._reporting: asyncio.Task[None] | None = None

    @property
    def collectors(self) -> list[Collector]:
        """The metrics of the service."""
        return [self.recorder, self.metrics]

    async def open(self, _: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """A gateway opens a lane."""
        await self.lanes.carry(LaneServer(self.accept, self.errors.caught, within=self._unsent), context)

    async def carry(self, lane: LocalLane) -> None:
        """Serve a lane of this process until it ends. The lane's calls go to `accept`."""
        self.lanes.greet(lane)
        try:
            await lane.run()
        finally:
            self.lanes.forget(lane)

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

    async def drain(self) -> None:
        """Answer what gateways send until they know of the end, then refuse what still comes.

        A gateway may send a refused call again, on another lane: it was certainly not begun.
        """
        await self.lanes.drain()
        await self.lanes.end(Unavailable("this replica is ending and takes no new calls"))

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
            version=VERSION,
            kernels=[to_message(spec) for spec in self.readiness.kernels.values()],
            window_calls=self._settings.window_calls,
            window_bytes=self._settings.window_bytes,
            process=this_process(),
        )


def new_service(settings: ComputeSettings, processes: ProcessWatch, memory_bytes: int) -> ComputeService:
    """Start a forkserver, and make the service whose workers it forks. It may use `memory_bytes`; 0 is no limit."""
    budget = memory_budget(settings, memory_bytes)
    limits = MemoryLimits(
        memory_bytes=budget.worker_bytes,
        recycle_calls=settings.recycle_calls,
        recycle_growth_bytes=settings.recycle_growth_bytes,
    )
    forkserver = ForkServer(
        settings.kernels,
        settings.worker_blas_threads,
        settings.max_reply_bytes,
        limits.memory_bytes,
        python=settings.worker_python,
    )
    return ComputeService(settings, forkserver, budget.arena_bytes, limits, processes)


async def serve(settings: ComputeSettings, life: Life) -> None:
    """Run a replica until it is told to stop. Raises StartError, BindError, CertificateError when it cannot start."""
    certificates = server_certificates(settings)
    with ProcessWatch(reaper=FORKSERVER) as processes:
        processes.watch("dispatcher", os.getpid())
        service = new_service(settings, processes, granted_memory())
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
                collectors=[Component("compute", lambda: service.collectors), processes],
                live=service.dispatcher.__len__,
                drain=service.drain,
                life=life,
            )
        finally:
            await service.close()
