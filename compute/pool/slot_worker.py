"""A worker of a slot, from its start to its exit: its process, its runs in flight, its limits.

process starts ──> Loaded…, Ready ──> `ready` ──> serves: `in_flight`, `recycling` ──> exits ──> `exited`
                   Misfit ──────────> `ready` with what is wrong
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.compute.ipc.frames import Done, Failed, Loaded, Misfit, Ready, Shrunk, ToDispatcher
from unlatch.compute.ipc.memory_limits import MemoryLimits
from unlatch.compute.metrics import WorkerMetrics
from unlatch.compute.pool import exits
from unlatch.compute.pool.exits import Exit
from unlatch.compute.pool.forkserver import Spawned
from unlatch.compute.pool.in_flight import InFlight, RunListener
from unlatch.compute.pool.process import WorkerProcess
from unlatch.compute.pool.recycling import Recycling
from unlatch.compute.settings import ComputeSettings


class SlotWorker:
    """A worker in a process that was forked. `on_reply` is called after each valid reply.

    Raises OSError; ProcessLookupError if the process has ended already.
    """

    def __init__(
        self,
        number: int,
        spawned: Spawned,
        listener: RunListener,
        metrics: WorkerMetrics,
        errors: InternalErrors,
        settings: ComputeSettings,
        on_reply: Callable[[], None],
        *,
        attach: Callable[..., WorkerProcess] = WorkerProcess,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.parent = spawned.parent
        self.kernels: dict[str, KernelSpec] = {}
        self._listener = listener
        self._errors = errors
        self._on_reply = on_reply
        loop = asyncio.get_running_loop()
        # Empty once the worker's kernels are known; or the reason why it cannot serve.
        self.ready: asyncio.Future[str] = loop.create_future()
        self.exited: asyncio.Future[Exit] = loop.create_future()
        self.process = attach(
            spawned.process,
            spawned.channel,
            self._on_frame,
            self.exited.set_result,
            stopped_seconds=settings.stopped_worker_seconds,
            on_error=errors.caught,
        )
        self.in_flight = InFlight(
            number,
            self.process,
            listener,
            metrics,
            errors,
            kill_grace_seconds=settings.kill_grace_seconds,
            long_call_seconds=settings.long_call_seconds,
            max_reply_bytes=settings.max_reply_bytes,
            clock=clock,
        )
        # None until the worker serves, and after its exit.
        self.recycling: Recycling | None = None

    def has_room(self, now: float) -> bool:
        """Return whether the worker can take one run more."""
        return self.recycling is not None and not self.recycling.retires and self.in_flight.has_room(now)

    def serve(self, limits: MemoryLimits) -> None:
        """Let the worker take runs from now on."""
        with suppress(OSError):  # the process has ended meanwhile: it gets no run before its exit is handled
            self.recycling = Recycling(self.process, self.in_flight, limits)

    def kill(self, cause: Exit) -> None:
        """Kill the worker, whatever it is doing."""
        self.process.kill(cause)

    def close(self, cause: Exit, *, stopping: bool) -> None:
        """Settle the runs of a worker that has exited, and free its resources."""
        recycling, self.recycling = self.recycling, None
        self.in_flight.lost(cause, stopping=stopping)
        if recycling is not None:
            recycling.close()

    def _on_frame(self, frame: ToDispatcher) -> None:
        try:
            if isinstance(frame, Done | Failed):
                self._replied(frame)
            elif isinstance(frame, Shrunk):
                if self.recycling is not None:
                    self.recycling.shrunk(frame)
            elif self.ready.done():
                self.kill(exits.NOT_STARTING)
            else:
                self._starts(frame)
        except Exception as error:  # noqa: BLE001 (an entry point's guard: the exit settles what the worker has)
            self._errors.caught("worker_frame", error)
            self.kill(exits.INTERNAL_ERROR)

    def _replied(self, frame: Done | Failed) -> None:
        if self.in_flight.heard(frame):
            self._on_reply()
            if self.recycling is not None:
                self.recycling.rested()
            self._listener.assign()

    def _starts(self, frame: Loaded | Ready | Misfit) -> None:
        if isinstance(frame, Loaded):
            self.kernels[frame.kernel.name] = frame.kernel
        else:
            self.ready.set_result(frame.message if isinstance(frame, Misfit) else "")
