"""A slot: one numbered place in the pool. When its worker exits, the slot starts another worker."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import monotonic
from typing import Protocol

import structlog

from unlatch.common.backoff import Backoff
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.compute.call import Call
from unlatch.compute.errors import StartError
from unlatch.compute.ipc.memory_limits import MemoryLimits
from unlatch.compute.metrics import WorkerMetrics
from unlatch.compute.pool import exits
from unlatch.compute.pool.exits import Exit
from unlatch.compute.pool.forkserver import Spawned
from unlatch.compute.pool.in_flight import RunListener
from unlatch.compute.pool.process import WorkerProcess
from unlatch.compute.pool.recycling import Recycling
from unlatch.compute.pool.slot_worker import SlotWorker
from unlatch.compute.readiness import Readiness
from unlatch.compute.settings import ComputeSettings

log = structlog.get_logger()

# After so many failed starts in a row, the cause counts as lasting.
_MAX_VAIN_STARTS = 3


class Spawns(Protocol):
    """Forks worker processes: the forkserver, or a test's substitute."""

    async def spawn_within(self, seconds: float, *, unfit: int = 0) -> Spawned:
        """Fork a worker process, but not from the forkserver with the pid `unfit`. Raises StartError."""


class Slot:
    """Keep one numbered place filled with a worker. `attach` makes a WorkerProcess of a forked process."""

    def __init__(
        self,
        number: int,
        forkserver: Spawns,
        metrics: WorkerMetrics,
        readiness: Readiness,
        limits: MemoryLimits,
        settings: ComputeSettings,
        errors: InternalErrors,
        *,
        attach: Callable[..., WorkerProcess] = WorkerProcess,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.number = number
        self._forkserver = forkserver
        self._metrics = metrics
        self._readiness = readiness
        self._limits = limits
        self._settings = settings
        self._errors = errors
        self._attach = attach
        self._clock = clock
        self._worker: SlotWorker | None = None
        self._stopping = False
        # The pid of a forkserver whose children cannot serve, because of the kernels that it has loaded.
        self._unfit_parent = 0
        # Waits after exits without a finished call between them. After the first exit there is no wait.
        self._exits = Backoff(first_seconds=0.05, longest_seconds=5.0, free_tries=1)
        # Waits after failed starts: longer, because a start may load the kernels anew, and a repair takes a person.
        self._start_failures = Backoff(first_seconds=0.1, longest_seconds=20.0)

    @property
    def runs(self) -> int:
        """How many runs the worker holds."""
        return len(self._worker.in_flight) if self._worker is not None else 0

    @property
    def runs_long(self) -> bool:
        """Whether the worker runs a long call, or has one staged."""
        return self._worker is not None and self._worker.in_flight.runs_long

    @property
    def bytes(self) -> int:
        """How many bytes the input tensors of the worker's calls have."""
        return self._worker.in_flight.bytes if self._worker is not None else 0

    @property
    def recycling(self) -> Recycling | None:
        """The check of the worker's limits, while the worker serves; else None."""
        return self._worker.recycling if self._worker is not None else None

    def seconds_left(self, now: float) -> float:
        """Return how many more seconds the worker's runs are expected to take."""
        return self._worker.in_flight.seconds_left(now) if self._worker is not None else 0.0

    def has_room(self, now: float) -> bool:
        """Whether the worker can take one run more."""
        return self._worker is not None and self._worker.has_room(now)

    def run(self, calls: Sequence[Call], now: float) -> None:
        """Give the worker a call, or several to run as one. Raises ResourceExhausted if there is no reply memory."""
        assert self._worker is not None
        self._worker.in_flight.run(calls, now)

    def holds(self, call: Call) -> bool:
        """Whether the worker has the call."""
        return self._worker is not None and self._worker.in_flight.holds(call)

    def kill(self, cause: Exit) -> None:
        """Kill the present worker; the slot starts another."""
        if self._worker is not None:
            self._worker.kill(cause)

    def sweep(self, dropped_inputs: Iterable[int]) -> None:
        """Tell the worker to unmap input segments that are gone, and reply segments that were unused for a while."""
        if self._worker is not None:
            self._worker.in_flight.sweep(dropped_inputs)

    def look(self) -> None:
        """Check that the worker keeps to its limits, and update its memory metric."""
        if self.recycling is not None:
            self.recycling.look()
            self._metrics.memory_bytes = self.recycling.taken_bytes

    async def keep(self, listener: RunListener, started: "asyncio.Future[None]") -> None:
        """Keep a worker in the slot: start another whenever one exits, until the slot is stopped.

        `started` gets the result of the first start. If the first start fails, no other is tried.
        """
        try:
            worker = await self._start(listener)
        except Exception as error:  # noqa: BLE001 (it is told)
            if not started.done():
                started.set_exception(error)
            return
        if not started.done():
            started.set_result(None)
        while True:
            cause = await worker.exited
            self._emptied(worker, cause, listener, served=True)
            if self._stopping:
                return
            await asyncio.sleep(0.0 if cause.at_once else self._exits.failed())
            worker = await self._replacement(listener)

    def stop(self) -> bool:
        """Stop filling the slot, and kill its worker. Returns whether there is a worker whose exit must be awaited."""
        self._stopping = True
        self.kill(exits.POOL_STOPS)
        return self._worker is not None

    async def _replacement(self, listener: RunListener) -> SlotWorker:
        """Start a worker in place of one that has exited; try again, with waits, until a start succeeds."""
        while True:
            try:
                return await self._start(listener)
            except Exception as error:
                if self._stopping:
                    raise asyncio.CancelledError from error
                if not isinstance(error, StartError):
                    self._errors.caught("worker_start", error)
                delay = self._start_failures.failed()
                lasting = self._start_failures.failures >= _MAX_VAIN_STARTS
                lasting |= isinstance(error, StartError) and error.lasting
                self._readiness.failed(self.number, str(error), lasting=lasting)
                await asyncio.sleep(delay)

    async def _start(self, listener: RunListener) -> SlotWorker:
        """Start one worker, and wait until it serves. Raises StartError if it does not become ready."""
        within = self._settings.worker_start_seconds
        spawned = await self._forkserver.spawn_within(within, unfit=self._unfit_parent)
        try:
            worker = SlotWorker(
                self.number,
                spawned,
                listener,
                self._metrics,
                self._errors,
                self._settings,
                self._exits.succeeded,
                attach=self._attach,
                clock=self._clock,
            )
        except ProcessLookupError as error:
            raise StartError(f"a worker ended as it was forked: {exits.by_itself(spawned.process.exitcode)}") from error
        except OSError as error:
            raise StartError(f"a worker did not start: {error}") from error
        self._worker = worker
        self._metrics.started(worker.process.pid, worker.parent)
        late = asyncio.get_running_loop().call_later(within, worker.kill, exits.UNREADY)
        try:
            await asyncio.wait((worker.ready, worker.exited), return_when=asyncio.FIRST_COMPLETED)
        finally:
            late.cancel()
        try:
            why = self._serves(worker)
        except Exception as error:  # noqa: BLE001 (an entry point's guard: the worker must not be left alone)
            why = str(self._errors.caught("worker_start", error))
        if why:
            # Raise StartError only after the process is gone, because then the slot may be filled again.
            worker.kill(exits.MISFIT)
            cause = await worker.exited
            self._emptied(worker, cause, listener, served=False)
            lasting = cause == exits.UNREADY or self._unfit_parent == worker.parent
            raise StartError(why, lasting=lasting)
        listener.assign()
        return worker

    def _serves(self, worker: SlotWorker) -> str:
        """Let a ready worker take runs. Returns why it cannot serve, or an empty string."""
        if not worker.ready.done():
            return f"a worker ended before it was ready: {worker.exited.result()}"
        why = worker.ready.result() or self._limits.refusal(worker.kernels.values())
        if why:
            # All children of this forkserver have the same kernels, so all of them are unfit.
            self._unfit_parent = worker.parent
            return why
        if not self._readiness.fits(worker.kernels):
            return "its kernels are not those of the workers that are up: their files have changed"
        worker.serve(self._limits)
        self._start_failures.succeeded()
        self._metrics.ready()
        self._readiness.up(self.number, worker.kernels)
        return ""

    def _emptied(self, worker: SlotWorker, cause: Exit, listener: RunListener, *, served: bool) -> None:
        """Settle the calls of a worker that has exited, and update metrics, readiness and the log."""
        self._worker = None
        lost = worker.in_flight.calls_held
        for step in (
            partial(worker.close, cause, stopping=self._stopping),
            partial(self._metrics.ended, "" if self._stopping else cause.reason),
            partial(self._readiness.down, self.number),
        ):
            try:
                step()
            except Exception as error:  # noqa: BLE001 (an entry point's guard: the slot is to be filled again)
                self._errors.caught("worker_exit", error)
        if served and not self._stopping:
            tell = log.info if cause in exits.PLANNED else log.warning
            tell("worker ended", worker=self.number, reason=cause.reason, message=str(cause), calls_lost=lost)
        listener.changed()
