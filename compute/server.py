"""The compute service put together: forkserver, pool, dispatcher, lanes; in the order of their lives."""

import asyncio
import os
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import NamedTuple

import grpc.aio
from prometheus_client.registry import Collector

from unlatch.common.errors import Unavailable
from unlatch.common.kernel.messages import to_message
from unlatch.common.kernel.spec import KernelSpec
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
from unlatch.compute.errors import StartError
from unlatch.compute.intake.intake import CallIntake
from unlatch.compute.ipc.arena import InputArena
from unlatch.compute.ipc.frames import ASYNC, PLAIN
from unlatch.compute.ipc.memory_budget import MemoryBudget, memory_budget
from unlatch.compute.ipc.memory_limits import MemoryLimits
from unlatch.compute.metrics import FORKSERVER, ComputeMetrics
from unlatch.compute.pool.async_pool import AsyncPool, by_kernel
from unlatch.compute.pool.forkserver import ForkServer
from unlatch.compute.pool.occupancy import Occupancy
from unlatch.compute.pool.pool import Pool, sweep
from unlatch.compute.pool.slot import Slot
from unlatch.compute.readiness import Readiness, ServedKernels
from unlatch.compute.reports import Reports
from unlatch.compute.settings import ComputeSettings
from unlatch.protos.unlatch_pb2 import Welcome

# Bytes of frames and small replies that gateways have still to read on all lanes. Past it a lane is read again when it
# has nothing left to send. A part of what memory_budget.py keeps for the services.
_UNSENT_BYTES = 8 * MAX_UNSENT_BYTES


class WorkersOfKind(NamedTuple):
    """The pool of the workers of one kind, and the dispatcher with the calls that wait for them."""

    pool: Pool
    dispatcher: Dispatcher


class ComputeService:
    """The parts of a replica, and what they tell one another."""

    def __init__(
        self,
        settings: ComputeSettings,
        forkserver: ForkServer,
        processes: ProcessWatch,
        budget_of: Callable[[int], MemoryBudget],
    ) -> None:
        self._settings = settings
        self._budget_of = budget_of
        self.forkserver = forkserver
        self.recorder = Recorder()
        self.errors = errors = InternalErrors(self.recorder)
        self.health = Health(SERVICE)
        self.arena = InputArena(budget_of(0).arena_bytes)
        self.metrics = ComputeMetrics(self.recorder, processes, lambda: self.waiting)
        self.metrics.forkserver_runs(forkserver.pid)
        self.served = ServedKernels()
        self.poison = Poison(settings.poison_seconds, errors)
        self.plain = self._plain_workers()
        self.pool, self.dispatcher = self.plain
        # None as long as no kernel is `async def`.
        self._async: WorkersOfKind | None = None
        beside = self.metrics, Tracing(), errors
        intake = CallIntake(self.served.kernels, self.arena, self._dispatcher_of, *beside, settings.max_call_bytes)
        self.accept = intake.accept
        self._welcome = Welcome()
        self._reports = Reports(self.pool, self.dispatcher, settings, errors, self._load_of_async)
        self._unsent = HeldBytes(max_bytes=_UNSENT_BYTES)
        unread = unread_answers(settings.unread_seconds)
        self.lanes = Lanes(lambda _: self._welcome, errors.caught, unread, self._reports.load)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def waiting(self) -> int:
        """The number of calls that wait for a worker."""
        return sum(len(kind.dispatcher) for kind in self._kinds)

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
        """Fill the pools. Raises StartError."""
        await self.dispatcher.start()
        await self._start_async()
        self.metrics.limited(self._limits(self.served.kernels.values()).memory_bytes)
        self._welcome = self._greeting()
        self._tasks += [
            asyncio.create_task(self._reports.run(self.lanes)),
            asyncio.create_task(sweep(self.arena, lambda: [kind.pool for kind in self._kinds], self.errors)),
        ]
        self.health.set(serving=True)

    @property
    def _kinds(self) -> "list[WorkersOfKind]":
        return [self.plain] if self._async is None else [self.plain, self._async]

    def _plain_workers(self) -> "WorkersOfKind":
        settings, count = self._settings, self._settings.worker_count
        occupancy, readiness = Occupancy(count), Readiness(self.readiness_changed, self.served)
        rest = self._limits, settings, self.errors
        slots = [
            Slot(number, PLAIN, self.forkserver, occupancy, self.metrics.worker(number), readiness, *rest)
            for number in range(count)
        ]
        pool = Pool(slots, occupancy, self.arena, self.errors, reserved_workers=settings.workers_reserved)
        return WorkersOfKind(pool, Dispatcher(pool, self.poison, self.metrics, self.errors, settings))

    def _async_workers(self, count: int) -> "WorkersOfKind":
        settings, first = self._settings, self._settings.worker_count
        occupancy, readiness = Occupancy(count), Readiness(self._async_readiness_changed, self.served)
        rest = self._limits, settings, self.errors
        slots = [
            Slot(first + at, ASYNC, self.forkserver, occupancy, self.metrics.async_worker(first + at), readiness, *rest)
            for at in range(count)
        ]
        pool = AsyncPool(slots, occupancy, self.arena, self.errors)
        return WorkersOfKind(pool, Dispatcher(pool, self.poison, self.metrics, self.errors, settings, kind=by_kernel))

    def _limits(self, kernels: Iterable[KernelSpec]) -> MemoryLimits:
        """Return the limits of each worker, when these kernels are served. Raises StartError."""
        settings = self._settings
        return MemoryLimits(
            memory_bytes=self._budget_of(settings.async_worker_count(kernels)).worker_bytes,
            recycle_calls=settings.recycle_calls,
            recycle_growth_bytes=settings.recycle_growth_bytes,
        )

    async def _start_async(self) -> None:
        """Start async workers if a kernel is `async def`. Raises StartError."""
        kernels = self.served.kernels.values()
        first = next((spec.name for spec in kernels if spec.concurrency is not None), None)
        if first is None or self._async is not None:
            return
        count = self._settings.async_worker_count(kernels)
        if not count:
            raise StartError(f"async_workers: kernel {first} is `async def`, so at least 1 is needed")
        self._async = self._async_workers(count)
        await self._async.dispatcher.start()

    def _dispatcher_of(self, spec: KernelSpec) -> Dispatcher:
        if spec.concurrency is None:
            return self.dispatcher
        if self._async is None:
            # The kernel came with files that have changed since the start.
            raise Unavailable(f"kernel {spec.name} is `async def`, and this replica has started no async worker")
        return self._async.dispatcher

    def _load_of_async(self) -> tuple[int, float]:
        """Return the number of async workers, and the seconds that a new call would wait for one."""
        if self._async is None:
            return 0, 0.0
        return self._async.pool.workers, self._async.dispatcher.wait_seconds(short=False)

    def _async_readiness_changed(self, why: str) -> None:
        """Refuse the calls of async kernels as long as no async worker can be started. Other kernels are served."""
        assert self._async is not None
        self._async.dispatcher.shut(_not_started(why, "async worker"))
        if not why:
            self._welcome = self._greeting()
            self.lanes.greet_again()

    def readiness_changed(self, why: str) -> None:
        """Tell callers, probes and what waits whether calls are taken; `why` says why not."""
        self.dispatcher.shut(_not_started(why, "worker"))
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
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(kind.pool.stop() for kind in self._kinds))
        await self.forkserver.close()
        self.poison.close()
        self.arena.close()

    def _greeting(self) -> Welcome:
        kernels = self.served.kernels.values()
        return Welcome(
            server=self._settings.name,
            version=VERSION,
            kernels=[to_message(spec) for spec in kernels],
            window_calls=self._settings.window_calls + self._settings.async_calls(kernels),
            window_bytes=self._settings.window_bytes,
            process=this_process(),
        )


def new_service(settings: ComputeSettings, processes: ProcessWatch, memory_bytes: int) -> ComputeService:
    """Start a forkserver, and make the service whose workers it forks. It may use `memory_bytes`; 0 is no limit."""
    # By the number of async workers, which is known when the kernels are. Each budget is made once, since it may warn.
    budget_of = cache(partial(memory_budget, settings, memory_bytes))
    # Raises StartError before anything runs if there is too little for the workers.
    budget_of(0)
    forkserver = ForkServer(
        settings.kernels, settings.worker_blas_threads, settings.max_reply_bytes, python=settings.worker_python
    )
    return ComputeService(settings, forkserver, processes, budget_of)


def _not_started(why: str, what: str) -> Unavailable | None:
    return Unavailable(f"no {what} can be started: {why}", retry_after_milliseconds=1000) if why else None


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
                live=lambda: service.waiting,
                drain=service.drain,
                life=life,
            )
        finally:
            await service.close()
