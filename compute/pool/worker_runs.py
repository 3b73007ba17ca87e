"""The runs that a worker holds: what is the same whether it executes one at a time or many at once.

    WorkerRuns ── InFlight      one run is executed, one staged (compute/pool/in_flight.py)
               ── SideBySide    an async worker's: many are executed at once (compute/pool/side_by_side.py)

Both handle a worker's frames and timers. compute/dispatch/outcomes.py decides the outcomes of the calls, and the
listener (the dispatcher) carries them out. Each entry point has a guard: after an unexpected exception the state of the
worker is unknown, so it is killed, and its exit settles its calls.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Protocol

from unlatch.common.kernel.datatypes import is_held, is_served
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.compute.call import Call
from unlatch.compute.ipc.arena import WorkerSegments
from unlatch.compute.ipc.frames import Blocks, Cancel, Done, Failed, Result, Unblocks, Wants
from unlatch.compute.metrics import WorkerMetrics
from unlatch.compute.pool import exits
from unlatch.compute.pool.exits import Exit
from unlatch.compute.pool.occupancy import Held, Occupancy
from unlatch.compute.pool.process import WorkerProcess
from unlatch.compute.pool.run import Event, Run, RunState
from unlatch.compute.settings import ComputeSettings

# How long a caller may take to confirm that it knows of the beginning. A plain worker is idle meanwhile.
_CONFIRMED_WITHIN_SECONDS = 5.0
# The numbers of calls in one Cancel frame: a frame is bounded, and an async worker may have thousands of calls.
_CANCELLED_AT_ONCE = 4096


class RunListener(Protocol):
    """Receives the events of runs from the pool. The dispatcher is the listener."""

    def happened(self, run: Run, event: Event) -> None:
        """Settle the calls of a run after an event. Raises nothing."""

    def assign(self) -> None:
        """Give waiting calls to workers now, because a worker may have room. Raises nothing."""

    def changed(self) -> None:
        """Give waiting calls to workers in the next round of the event loop, because a worker may have room."""


class WorkerRuns(ABC):
    """Track the runs that one worker process was given, and handle its replies, cancels and timeouts."""

    def __init__(
        self,
        worker: int,
        process: WorkerProcess,
        listener: RunListener,
        occupancy: Occupancy,
        metrics: WorkerMetrics,
        errors: InternalErrors,
        settings: ComputeSettings,
    ) -> None:
        self.worker = worker
        self._process = process
        self._listener = listener
        self._occupancy = occupancy
        self._metrics = metrics
        self._errors = errors
        self._kill_grace_seconds = settings.kill_grace_seconds
        self._max_reply_bytes = settings.max_reply_bytes
        self._loop = asyncio.get_running_loop()
        self._numbers = count(1)
        self.segments = WorkerSegments(process.send)
        # Whether the worker may be given runs: it is ready (`serve`), and is not about to be replaced.
        self.accepts = False
        # The number of calls that the worker has ended.
        self.calls = 0
        # Numbers of cancelled calls that the worker has not been told of yet.
        self._cancelled: list[int] = []

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def calls_held(self) -> int:
        """How many calls the worker's runs have."""

    @property
    @abstractmethod
    def expected_end(self) -> float:
        """When the last of the worker's runs is expected to end, by the monotonic clock. Only while it holds one."""

    @abstractmethod
    def held(self) -> Held:
        """Return what the worker holds now."""

    @abstractmethod
    def has_room(self, now: float) -> bool:
        """Whether the worker can take one run more now."""

    @abstractmethod
    def run(self, calls: Sequence[Call], now: float) -> None:
        """Give the worker a call, or several of one kernel and the same parameters to run as one.

        Raises ResourceExhausted if there is no memory for the reply.
        """

    @abstractmethod
    def holds(self, call: Call) -> bool:
        """Whether the worker has the call."""

    @abstractmethod
    def refuse(self, message: str, cause: Exit) -> None:
        """Fail the running call because it exceeds the memory limit, and kill the worker."""

    @abstractmethod
    def heard(self, frame: Done | Failed) -> bool:
        """Handle the reply that ends a run. Returns False for an invalid reply: the worker is killed."""

    @abstractmethod
    def lost(self, cause: Exit, *, stopping: bool) -> None:
        """Settle the calls of a worker that has exited."""

    def asked(self, frame: Wants | Blocks | Unblocks) -> None:  # noqa: ARG002 (async workers ask)
        """Handle what only an async worker sends. Any other worker is killed for it."""
        self._process.kill(exits.UNASKED)

    def serve(self) -> None:
        """Take runs from now on: the worker is ready."""
        self.accepts = True
        self._occupancy.changed(self)

    def withdraw(self, call: Call) -> None:
        """Tell the worker that a call's caller has left. If the run outlasts the grace period, kill it."""
        self.guarded("withdraw", self._withdraw, call)

    def kill(self, cause: Exit) -> None:
        """Kill the worker, whatever it is doing. Its exit settles its calls."""
        self._process.kill(cause)

    def guarded(self, place: str, work: Callable[..., None], *arguments: object) -> None:
        """Do some work on the worker's behalf, under the guard of an entry point.

        After an unexpected exception the worker is killed, and its exit settles the calls that it holds.
        """
        try:
            work(*arguments)
        except Exception as error:  # noqa: BLE001 (an entry point's guard)
            self._errors.caught(place, error)
            self._process.kill(exits.INTERNAL_ERROR)

    @abstractmethod
    def _withdraw(self, call: Call) -> None: ...

    @abstractmethod
    def _has(self, run: Run) -> bool:
        """Return whether a run has not ended."""

    @abstractmethod
    def _send_next(self) -> None:
        """Send the worker the runs that it may begin."""

    @abstractmethod
    def _take_out(self, run: Run, *calls: Call) -> None:
        """Remove calls from a run that has not been sent to the worker."""

    def _announce(self, run: Run) -> None:
        """Tell callers that a run is about to begin, if they must know and have not been told."""
        if run.unconfirmed and run.state is RunState.STAGED:
            run.announce(partial(self.guarded, "caller_heard", self._confirmed))
            if run.unconfirmed:
                self._loop.call_later(_CONFIRMED_WITHIN_SECONDS, self.guarded, "not_heard", self._not_heard, run)

    def _confirmed(self, run: Run, call: Call) -> None:
        """Note that a call's caller knows that the call is about to begin, and send the run if it may begin."""
        run.unconfirmed.discard(call)
        if self._has(run):
            self._occupancy.changed(self)
            self._send_next()

    def _not_heard(self, run: Run) -> None:
        """Fail the calls whose callers have not confirmed: the worker waits for them, and so do other calls."""
        if self._has(run) and not run.is_sent:
            self._take_out(run, *run.unconfirmed)

    def _cancel_soon(self, *numbers: int) -> None:
        """Tell the worker that calls are cancelled: those of one round of the event loop together.

        A worker that reads none has a socket buffer of limited size.
        """
        if not self._cancelled:
            self._loop.call_soon(self.guarded, "cancel", self._tell_cancelled)
        self._cancelled += numbers

    def _tell_cancelled(self) -> None:
        cancelled, self._cancelled = self._cancelled, []
        for start in range(0, len(cancelled), _CANCELLED_AT_ONCE):
            self._process.send(Cancel(cancelled[start : start + _CANCELLED_AT_ONCE]))

    def _is_sound(self, result: Result, run: Run) -> bool:
        """Return whether a result can be sent on. A worker may write anything, and must not harm the dispatcher."""
        if len(result.tensors) != len(run.spec.outputs):
            return False
        end = 0
        for tensor in result.tensors:
            if not is_served(tensor.dtype) or not is_held(tensor.dtype, tensor.shape, tensor.length):
                return False
            end = max(end, tensor.offset + tensor.length)
        if run.inline is not None:
            return end <= len(run.inline)
        return run.segment is not None and end <= self._max_reply_bytes and run.segment.follow_growth_to(end)
