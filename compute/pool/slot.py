"""A slot: one numbered place in the pool, and its worker. When the worker exits, the slot starts another.

process starts ──> Loaded…, Ready ──> `ready` ──> serves: `in_flight`, `recycling` ──> exits ──> `exited`
                   Misfit ──────────> `ready` with what is wrong
"""

import asyncio
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress

import structlog

from unlatch.common.backoff import Backoff
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.compute.errors import KilledAtStartError, StartError
from unlatch.compute.ipc.frames import (
    ASYNC,
    Done,
    Failed,
    Loaded,
    Misfit,
    Ready,
    Serve,
    Shrunk,
    ToDispatcher,
)
from unlatch.compute.ipc.memory_limits import MemoryLimits
from unlatch.compute.metrics import AsyncWorkerMetrics, WorkerMetrics
from unlatch.compute.pool import exits
from unlatch.compute.pool.exits import Exit
from unlatch.compute.pool.forkserver import ForkServer, Spawned
from unlatch.compute.pool.in_flight import InFlight
from unlatch.compute.pool.occupancy import Occupancy
from unlatch.compute.pool.process import WorkerProcess
from unlatch.compute.pool.recycling import Recycling
from unlatch.compute.pool.side_by_side import SideBySide
from unlatch.compute.pool.worker_runs import RunListener, WorkerRuns
from unlatch.compute.readiness import Readiness
from unlatch.compute.settings import ComputeSettings

log = structlog.get_logger()

# After this number of failed starts in a row, the cause counts as lasting.
_MAX_VAIN_STARTS = 3


class SlotWorker:
    """A worker of a slot, in a process that was forked."""

    def __init__(self, slot: "Slot", spawned: Spawned, listener: RunListener) -> None:
        self.parent = spawned.parent
        # Whether it cannot serve because a setup has failed, and not because of its kernels.
        self.setup_failed = False
        self.kernels: dict[str, KernelSpec] = {}
        self._slot = slot
        self._listener = listener
        loop = asyncio.get_running_loop()
        # Empty once the worker's kernels are known; or the reason why it cannot serve.
        self.ready: asyncio.Future[str] = loop.create_future()
        self.exited: asyncio.Future[Exit] = loop.create_future()
        self.process = WorkerProcess(
            spawned,
            self._on_frame,
            self.exited.set_result,
            stopped_seconds=slot.settings.stopped_worker_seconds,
            errors=slot.errors,
            queues=slot.kind == ASYNC,
        )
        rest = slot.errors, slot.settings
        self.in_flight: WorkerRuns
        if isinstance(slot.metrics, AsyncWorkerMetrics):
            self.in_flight = SideBySide(slot.number, self.process, listener, slot.occupancy, slot.metrics, *rest)
        else:
            self.in_flight = InFlight(slot.number, self.process, listener, slot.occupancy, slot.metrics, *rest)
        # None until the worker serves, and after its exit.
        self.recycling: Recycling | None = None

    def serve(self, limits: MemoryLimits) -> None:
        """Let the worker take runs from now on."""
        with suppress(OSError):  # the process has ended meanwhile: it gets no run before its exit is handled
            self.recycling = Recycling(self.process, self.in_flight, limits)
            self.process.send(Serve(limits.memory_bytes))
            self.in_flight.serve()

    def close(self, cause: Exit, *, stopping: bool) -> None:
        """Settle the runs of a worker that has exited, and free its resources."""
        recycling, self.recycling = self.recycling, None
        self.in_flight.lost(cause, stopping=stopping)
        if recycling is not None:
            recycling.close()

    def _on_frame(self, frame: ToDispatcher) -> None:
        self.in_flight.guarded("worker_frame", self._hear, frame)

    def _hear(self, frame: ToDispatcher) -> None:
        if isinstance(frame, Done | Failed):
            if self.in_flight.heard(frame):
                self._slot.exit_backoff.succeeded()
                if self.recycling is not None:
                    self.recycling.rested()
                self._listener.assign()
        elif isinstance(frame, Shrunk):
            if self.recycling is not None:
                self.recycling.shrunk(frame)
        elif not isinstance(frame, Loaded | Ready | Misfit):
            self.in_flight.asked(frame)
        elif self.ready.done():
            self.process.kill(exits.NOT_STARTING)
        else:
            self._starts(frame)

    def _starts(self, frame: Loaded | Ready | Misfit) -> None:
        if isinstance(frame, Loaded):
            self.kernels[frame.kernel.name] = frame.kernel
        elif isinstance(frame, Ready):
            self.process.teardown_seconds = self._slot.settings.teardown_seconds if frame.teardown else 0.0
            self.ready.set_result("")
        else:
            self.setup_failed = frame.setup
            self.ready.set_result(frame.message)


class Slot:
    """Keep one numbered place filled with a worker of a kind. `limits` are those of a worker with certain kernels."""

    def __init__(
        self,
        number: int,
        kind: str,
        forkserver: ForkServer,
        occupancy: Occupancy,
        metrics: WorkerMetrics,
        readiness: Readiness,
        limits: Callable[[Iterable[KernelSpec]], MemoryLimits],
        settings: ComputeSettings,
        errors: InternalErrors,
    ) -> None:
        self.worker: SlotWorker | None = None
        # The runs of the worker, while there is one.
        self.in_flight: WorkerRuns | None = None
        self.number = number
        self.kind = kind
        self._forkserver = forkserver
        self.occupancy = occupancy
        self.metrics = metrics
        self._readiness = readiness
        self._limits = limits
        self.settings = settings
        self.errors = errors
        self._stopping = False
        # The pid of a forkserver whose children cannot serve, because of the kernels that it has loaded.
        self._unfit_parent = 0
        # Waits after exits without a finished call between them. After the first exit there is no wait.
        self.exit_backoff = Backoff(first_seconds=0.05, longest_seconds=5.0, free_tries=1)
        # Waits after failed starts. These are longer: a start may load the kernels anew, and a person must repair it.
        self._start_failures = Backoff(first_seconds=0.1, longest_seconds=20.0)

    @property
    def recycling(self) -> Recycling | None:
        """The check of the worker's limits, while the worker serves; else None."""
        return self.worker.recycling if self.worker is not None else None

    def sweep(self, dropped_inputs: Iterable[int]) -> None:
        """Tell the worker to unmap input segments that are gone, and reply segments that were unused for a while."""
        if self.in_flight is not None:
            self.in_flight.segments.sweep(dropped_inputs)

    def look(self) -> None:
        """Check that the worker keeps to its limits, and update its memory metric."""
        if self.recycling is not None:
            self.recycling.look()
            self.metrics.memory_bytes = self.recycling.taken_bytes

    async def keep(self, listener: RunListener, started: "asyncio.Future[None]") -> None:
        """Keep a worker in the slot: start another whenever one exits, until the slot is stopped.

        `started` gets the result of the first start. If the first start fails, no other is tried.
        """
        delay = 0.0
        while not self._stopping:
            await asyncio.sleep(delay)
            try:
                worker = await self._start(listener)
            except Exception as error:  # noqa: BLE001 (`started` gets it, or it is logged)
                if not started.done():
                    started.set_exception(error)
                    return
                delay = self._start_failed(error)
                continue
            if not started.done():
                started.set_result(None)
            cause = await worker.exited
            lost = worker.in_flight.calls_held
            self._emptied(worker, cause, listener)
            if not self._stopping:
                tell = log.info if cause in exits.PLANNED else log.warning
                tell("worker ended", worker=self.number, reason=cause.reason, message=str(cause), calls_lost=lost)
            delay = 0.0 if cause.at_once else self.exit_backoff.failed()

    def stop(self) -> bool:
        """Stop filling the slot, and kill its worker. Returns whether there is a worker whose exit must be awaited."""
        self._stopping = True
        if self.worker is not None:
            # An async worker cancels what it runs, and then runs its teardowns; any other would run them after its run.
            if self.kind != ASYNC and len(self.worker.in_flight):
                self.worker.process.kill(exits.POOL_STOPS)
            else:
                self.worker.process.end(exits.POOL_STOPS)
        return self.worker is not None

    def _start_failed(self, error: Exception) -> float:
        """Report why a replacement could not be started. Returns the seconds to wait before the next start."""
        delay = self._start_failures.failed()
        if not self._stopping:
            if not isinstance(error, StartError):
                self.errors.caught("worker_start", error)
            lasting = self._start_failures.failures >= _MAX_VAIN_STARTS
            lasting |= isinstance(error, StartError) and error.lasting
            self._readiness.failed(self.number, str(error), lasting=lasting)
        return delay

    async def _start(self, listener: RunListener) -> SlotWorker:
        """Start one worker, and wait until it serves. Raises StartError if it does not become ready."""
        within, stopped_seconds = self.settings.worker_start_seconds, self.settings.stopped_worker_seconds
        spawned = await self._forkserver.spawn_within(
            within, self.kind, stopped_seconds=stopped_seconds, unfit=self._unfit_parent
        )
        worker = SlotWorker(self, spawned, listener)
        self.worker, self.in_flight = worker, worker.in_flight
        self.metrics.started(worker.process.pid, worker.parent)
        late = asyncio.get_running_loop().call_later(within, worker.process.kill, exits.UNREADY)
        try:
            await asyncio.wait((worker.ready, worker.exited), return_when=asyncio.FIRST_COMPLETED)
        finally:
            late.cancel()
        try:
            why = self._serves(worker)
        except Exception as error:  # noqa: BLE001 (an entry point's guard: the worker must not be left alone)
            why = str(self.errors.caught("worker_start", error))
        if why:
            # Raise StartError only after the process is gone, because then the slot may be filled again.
            worker.process.kill(exits.MISFIT)
            cause = await worker.exited
            self._emptied(worker, cause, listener)
            lasting = cause == exits.UNREADY or self._unfit_parent == worker.parent
            kind = KilledAtStartError if cause == exits.by_itself(-signal.SIGKILL) else StartError
            raise kind(why, lasting=lasting)
        listener.assign()
        return worker

    def _serves(self, worker: SlotWorker) -> str:
        """Let a ready worker take runs. Returns why it cannot serve, or an empty string."""
        if not worker.ready.done():
            return f"a worker ended before it was ready: {worker.exited.result()}"
        try:
            limits = self._limits(worker.kernels.values())
        except StartError as error:
            return str(error)
        why = worker.ready.result() or limits.refusal(worker.kernels.values())
        if why:
            if not worker.setup_failed:
                # All children of this forkserver have the same kernels, so all of them are unfit.
                self._unfit_parent = worker.parent
            return why
        if not self._readiness.fits(worker.kernels):
            return "its kernels are not those of the workers that are up: their files have changed"
        worker.serve(limits)
        self._start_failures.succeeded()
        self.metrics.ready()
        self._readiness.up(self.number, worker.kernels)
        return ""

    def _emptied(self, worker: SlotWorker, cause: Exit, listener: RunListener) -> None:
        """Settle the calls of a worker that has exited, and update metrics and readiness."""
        self.worker = self.in_flight = None
        with self.errors.guarded("worker_exit"):
            worker.close(cause, stopping=self._stopping)
        with self.errors.guarded("worker_exit"):
            self.metrics.ended("" if self._stopping else cause.reason)
        with self.errors.guarded("worker_exit"):
            self._readiness.down(self.number)
        listener.changed()
