"""The runs that one worker holds: one that it executes, and one staged behind it. A run has one call or several.

    given ──> begun ──> Done, or Failed ──> its calls are answered; several that failed together run again, each alone
    │         ├─ no caller waits, or the timeout has passed ─ grace ─> the worker is killed, and its core is free
    │         └─ the worker exits ──> its calls run again, each alone, if pure and not poison
    └─ the worker exits ──> its calls go back to the backlog; only if pure where they may have begun

This module handles the worker's frames and timers. compute/dispatch/outcomes.py decides the outcomes of the calls, and
the listener (the dispatcher) carries them out. Each entry point has a guard: after an unexpected exception the state of
the worker is unknown, so it is killed, and its exit settles its calls.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from time import monotonic
from typing import Protocol

import structlog

from unlatch.common.kernel.datatypes import is_held, is_served
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.compute.call import Call
from unlatch.compute.ipc.frames import Cancel, Done, Failed, Member, Result, RunFrame, ToWorker
from unlatch.compute.metrics import WorkerMetrics
from unlatch.compute.pool import exits
from unlatch.compute.pool.exits import Exit
from unlatch.compute.pool.run import (
    Event,
    MemoryExceeded,
    NotHeard,
    Replied,
    Run,
    RunState,
    TimedOut,
    Usage,
    Withdrawn,
    WorkerExited,
)
from unlatch.compute.pool.segments import KnownSegments

log = structlog.get_logger()

# One run that is executed, and one staged.
_MAX_RUNS = 2
# A run that is staged behind a run as short as this counts as about to begin.
_SOON_SECONDS = 0.02
# How long a caller may take to confirm that its call is about to begin. The worker is idle meanwhile.
_HEARD_SECONDS = 5.0


class RunListener(Protocol):
    """Receives the events of runs from the pool. The dispatcher is the listener."""

    def happened(self, run: Run, event: Event) -> None:
        """Settle the calls of a run after an event. Raises nothing."""

    def assign(self) -> None:
        """Give waiting calls to workers now, because a worker may have room. Raises nothing."""

    def changed(self) -> None:
        """Give waiting calls to workers in the next round of the event loop, because a worker may have room."""


class Process(Protocol):
    """The operating system's process of a worker, as far as InFlight uses it."""

    @property
    def ending(self) -> bool:
        """Whether the process is being ended, so that it gets no more frames."""

    @property
    def cpu_seconds(self) -> float:
        """The processor time that the process has used."""

    def send(self, frame: ToWorker, fd: int | None = None) -> None:
        """Send a frame, with a file descriptor or without."""

    def kill(self, cause: Exit) -> None:
        """Kill the worker. `cause` becomes the reason of its exit."""

    def hear(self) -> None:
        """Handle the frames that the worker has sent already."""


class InFlight:
    """Track the runs that one worker process was given, and handle its replies, cancels and timeouts."""

    def __init__(
        self,
        worker: int,
        process: Process,
        listener: RunListener,
        metrics: WorkerMetrics,
        errors: InternalErrors,
        *,
        kill_grace_seconds: float = 0.25,
        long_call_seconds: float = 0.1,
        max_reply_bytes: int = 1 << 29,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._worker = worker
        self._process = process
        self._listener = listener
        self._metrics = metrics
        self._errors = errors
        self._kill_grace_seconds = kill_grace_seconds
        self._long_call_seconds = long_call_seconds
        self._max_reply_bytes = max_reply_bytes
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._numbers = count(1)
        self._runs: deque[Run] = deque()
        # The worker's processor time at the end of its last run: between runs it uses none.
        self._cpu_seconds = process.cpu_seconds
        self._cpu_seconds_at_end = 0.0
        self._segments = KnownSegments(process.send)
        # Calls that the worker has ended.
        self.calls = 0
        # Numbers of cancelled calls that the worker has not been told of yet.
        self._cancelled: list[int] = []

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def calls_held(self) -> int:
        """How many calls the worker's runs have."""
        return sum(len(run.numbers) for run in self._runs)

    @property
    def bytes(self) -> int:
        """How many bytes the input tensors of the worker's calls have."""
        return sum(call.size for run in self._runs for call in run.numbers)

    @property
    def runs_long(self) -> bool:
        """Whether the worker runs a long call, or has one staged."""
        return any(run.first.estimate.long for run in self._runs)

    def has_room(self, now: float) -> bool:
        """Whether the worker can take one run more."""
        if self._process.ending:
            return False
        return not self._runs or (len(self._runs) < _MAX_RUNS and self._ends_soon(self._runs[0], now))

    def _ends_soon(self, run: Run, now: float) -> bool:
        """Return whether a call may be staged behind a run: not if the run is long, or has taken long already.

        Also not if no caller waits for the run: the staged call would wait for the grace period and for a new worker.
        """
        return run.wanted and not run.first.estimate.long and now - run.begun < self._long_call_seconds

    def seconds_left(self, now: float) -> float:
        """Return how many more seconds the worker's runs are expected to take."""
        if not self._runs:
            return 0.0
        left = self._runs[0].begun - now
        for run in self._runs:
            left += run.expected_seconds
        return max(0.0, left)

    def run(self, calls: Sequence[Call], now: float) -> None:
        """Give the worker a call, or several of one kernel and the same parameters to run as one.

        Raises ResourceExhausted if there is no memory for the reply.
        """
        segment = self._segments.reply()
        numbers = {call: next(self._numbers) for call in calls}
        run = Run(self._worker, numbers, segment, self._segments.replies, now)
        self._runs.append(run)
        for call in calls:
            call.holder = self
        before = self._runs[0]
        if run is before or 0.0 < before.expected_seconds < _SOON_SECONDS:
            self._announce(run)
        self._send_next()

    def holds(self, call: Call) -> bool:
        """Whether the worker has the call."""
        return any(call in run.numbers for run in self._runs)

    def withdraw(self, call: Call) -> None:
        """Tell the worker that a call's caller has left. If the run outlasts the grace period, kill it."""
        try:
            self._withdraw(call)
        except Exception as error:  # noqa: BLE001 (an entry point's guard)
            self._survive("withdraw", error)

    def refuse(self, message: str, cause: Exit) -> None:
        """Fail the running call because it exceeds the memory limit, and kill the worker."""
        run = self._runs[0]
        if not run.is_sent:
            # The worker runs nothing, so none of its calls is the cause.
            self._kill_now(cause)
            return
        if self._has_ended(run):
            # The run had ended before: its reply had not been read yet.
            return
        self._listener.happened(run, MemoryExceeded(message, self._clock() - run.begun))
        self._kill_now(cause)

    def sweep(self, dropped_inputs: Iterable[int]) -> None:
        """Tell the worker to unmap input segments that are gone, and reply segments that were unused for a while."""
        self._segments.sweep(dropped_inputs)

    def heard(self, frame: Done | Failed) -> bool:
        """Handle the reply that ends a run. Returns False for an invalid reply: the worker is killed."""
        results = {result.call: result for result in frame.results} if isinstance(frame, Done) else {}
        run = self._ended_by(frame, results)
        if run is None:
            return False
        # A call that was cancelled may not have been begun, or may have stopped when it noticed.
        finished = (bool(results) or len(run.numbers) == 1) and run.wanted
        usage = self._used(frame.run_nanoseconds / 1e9, self._process.cpu_seconds, finished=finished)
        self.calls += len(results) or len(run.numbers)
        self._runs.popleft()
        try:
            run.end()
            self._metrics.rests()
            self._go_on()
            if isinstance(frame, Failed) and frame.log:
                log.error("kernel failed", kernel=run.spec.name, worker=self._worker, story=frame.log)
            self._count(run, results)
        finally:
            # Even if the lines above raise: the run is no longer in `_runs`, so only the listener can settle it.
            self._listener.happened(run, Replied(frame, results, usage))
        return True

    def _ended_by(self, frame: Done | Failed, results: dict[int, Result]) -> Run | None:
        """Return the run that a frame ends. None for a frame that ends none, or whose results are unsound."""
        run = self._runs[0] if self._runs and self._runs[0].is_sent else None
        named = [result.call for result in frame.results] if isinstance(frame, Done) else [frame.call]
        if run is None or not named or len(set(run.numbers.values()).intersection(named)) < len(named):
            self._process.kill(exits.OTHER_CALL)
            return None
        if results and not self._is_whole(results, run):
            self._process.kill(exits.UNSOUND_REPLY)
            return None
        return run

    def lost(self, cause: Exit, *, stopping: bool) -> None:
        """Settle the calls of a worker that has exited."""
        runs, self._runs = self._runs, deque()
        # From the last to the first, because each run's calls are put at the head of the backlog.
        for run in reversed(runs):
            usage = None
            if run.state is RunState.RUNNING:
                # The processor time of a worker that exited by itself is unknown: count all of the elapsed time.
                elapsed = self._clock() - run.begun
                usage = self._used(elapsed, self._cpu_seconds_at_end or self._cpu_seconds + elapsed, finished=False)
            self._listener.happened(run, WorkerExited(cause, stopping, usage))
            run.end()
        self._segments.close()

    def _go_on(self) -> None:
        """Begin the run that was staged, or announce to its callers that it is next."""
        if self._runs:
            run = self._runs[0]
            if run.is_sent:
                self._begin(run)
            elif run.must_be_announced:
                self._announce(run)

    def _announce(self, run: Run) -> None:
        if run.must_be_announced and run.announce(self._known):
            self._loop.call_later(_HEARD_SECONDS, self._guarded, "not_heard", self._not_heard, run)

    def _known(self, run: Run, call: Call) -> None:
        """Note that a call's caller knows that the call is about to begin, and send the run if it may begin."""

        def known() -> None:
            run.known_to(call)
            self._send_next()

        self._guarded("caller_heard", known)

    def _not_heard(self, run: Run) -> None:
        """Fail the calls whose callers have not confirmed: the worker waits for them, and so do other calls."""
        if run in self._runs and not run.is_sent:
            silent = run.unheard
            self._listener.happened(run, NotHeard(silent))
            for call in silent:
                self._take_out(run, call)

    def _send_next(self) -> None:
        """Send the worker the runs that it may begin, in order."""
        if self._process.ending:
            # The runs would be lost, and would count as begun.
            return
        for run in self._runs:
            if not run.may_be_sent:
                return
            if not run.is_sent:
                self._send(run)

    def _send(self, run: Run) -> None:
        run.state = RunState.SENT
        if run is self._runs[0]:
            self._begin(run)
        members = tuple(
            Member(number, self._segments.input(call), call.tensors) for call, number in run.numbers.items()
        )
        self._process.send(RunFrame(run.spec.name, run.first.arguments.parameters, run.segment.number, members))

    def _begin(self, run: Run) -> None:
        now = self._clock()
        run.begin(now)
        spec = run.spec
        self._metrics.begins(spec.name, now, len(run.numbers), batch=spec.batch)
        for call in run.numbers:
            call.begins(now)
            self._metrics.waited(now - call.landed)
        if not run.wanted:
            # The worker was told not to begin the run, but may have begun it before it read that.
            self._kill_soon(run, exits.ABANDONED)
        elif spec.timeout_seconds is not None:
            run.timer = self._loop.call_later(spec.timeout_seconds, self._guarded, "timeout", self._timed_out, run)

    def _withdraw(self, call: Call) -> None:
        run = next((run for run in self._runs if call in run.numbers), None)
        if run is None:
            return
        if not run.is_sent:
            self._listener.happened(run, Withdrawn(call))
            self._take_out(run, call)
            return
        if not self._cancelled:
            # Cancels of the same round go in one frame: a worker that reads none has a socket buffer of limited size.
            self._loop.call_soon(self._guarded, "cancel", self._tell_cancelled)
        self._cancelled.append(run.numbers[call])
        if run is self._runs[0] and not run.wanted:
            self._kill_soon(run, exits.ABANDONED)

    def _take_out(self, run: Run, call: Call) -> None:
        """Remove a call from a run that has not been sent to the worker."""
        run.take_out(call)
        if not run.numbers:
            self._runs.remove(run)
            run.end()
            # Not `assign`, because other callers may be leaving in the same round.
            self._listener.changed()
            if self._runs and self._runs[0].must_be_announced:
                self._announce(self._runs[0])
        self._send_next()

    def _has_ended(self, run: Run) -> bool:
        """Return whether a run ended before its timer fired: after a standstill, timers run before sockets are read."""
        self._process.hear()
        return not self._runs or self._runs[0] is not run

    def _timed_out(self, run: Run) -> None:
        if self._has_ended(run):
            return
        self._listener.happened(run, TimedOut())
        if run.runs_again_alone:
            # Each call runs again alone, with a whole timeout of its own.
            self._kill_now(exits.TIMED_OUT)
            return
        self._process.send(Cancel(list(run.numbers.values())))
        self._kill_soon(run, exits.TIMED_OUT)

    def _kill_soon(self, run: Run, cause: Exit) -> None:
        """Kill the worker after the grace period, unless the run ends before. No caller waits for the run any more."""
        run.stop_timer()
        run.timer = self._loop.call_later(
            self._kill_grace_seconds, self._guarded, "grace", self._grace_over, run, cause
        )

    def _grace_over(self, run: Run, cause: Exit) -> None:
        if not self._has_ended(run):
            self._kill_now(cause)

    def _kill_now(self, cause: Exit) -> None:
        # The processor clock of the process cannot be read after its end.
        self._cpu_seconds_at_end = self._process.cpu_seconds
        self._process.kill(cause)

    def _tell_cancelled(self) -> None:
        cancelled, self._cancelled = self._cancelled, []
        self._process.send(Cancel(cancelled))

    def _used(self, seconds: float, cpu_seconds: float, *, finished: bool) -> Usage:
        """Return the usage of a run that has ended, when the worker's processor clock shows `cpu_seconds`."""
        used = max(0.0, cpu_seconds - self._cpu_seconds)
        self._cpu_seconds = cpu_seconds
        return Usage(seconds, used, finished)

    def _count(self, run: Run, results: dict[int, Result]) -> None:
        """Count the calls that the worker has ended, except calls that failed together and run again alone."""
        several_failed = not results and len(run.numbers) > 1
        for call, number in run.numbers.items():
            if call.ended or not several_failed:
                self._metrics.ran(run.spec.name, "ok" if number in results else "error")

    def _guarded(self, place: str, work: Callable[..., None], *arguments: object) -> None:
        """Call `work` from a timer or a lane, under the guard of an entry point."""
        try:
            work(*arguments)
        except Exception as error:  # noqa: BLE001 (an entry point's guard)
            self._survive(place, error)

    def _survive(self, place: str, error: Exception) -> None:
        """Count and log an unexpected exception, and kill the worker: its exit settles the calls that it holds."""
        self._errors.caught(place, error)
        self._process.kill(exits.INTERNAL_ERROR)

    def _is_whole(self, results: dict[int, Result], run: Run) -> bool:
        """Return whether each call of a run has a valid result, except calls that have ended already."""
        for call, number in run.numbers.items():
            result = results.get(number)
            if not (call.ended if result is None else self._is_sound(result, run)):
                return False
        return True

    def _is_sound(self, result: Result, run: Run) -> bool:
        """Return whether a result can be sent on. A worker may write anything, and must not harm the dispatcher."""
        if len(result.tensors) != len(run.spec.outputs):
            return False
        end = 0
        for tensor in result.tensors:
            if not is_served(tensor.dtype) or not is_held(tensor.dtype, tensor.shape, tensor.length):
                return False
            end = max(end, tensor.offset + tensor.length)
        return end <= self._max_reply_bytes and run.segment.follow_growth_to(end)
