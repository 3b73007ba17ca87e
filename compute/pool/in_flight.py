"""The runs that one worker holds: one that it executes, and one staged behind it. A run has one call or several.

    given ──> begun ──> Done, or Failed ──> its calls are answered; several that failed together run again, each alone
    │         ├─ no caller waits, or the timeout has passed ─ grace ─> the worker is killed
    │         └─ the worker exits ──> its calls run again, each alone, if pure and not poison
    └─ the worker exits ──> its calls go back to the backlog; if they may have begun, only if pure

compute/pool/worker_runs.py has what async workers share with this.
"""

from collections import deque
from collections.abc import Sequence
from time import monotonic

from unlatch.common.errors import DeadlineExceeded, ResourceExhausted
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.compute.call import Call
from unlatch.compute.ipc.frames import Cancel, Done, Failed, Member, Result, RunFrame
from unlatch.compute.metrics import WorkerMetrics
from unlatch.compute.pool import exits
from unlatch.compute.pool.exits import Exit
from unlatch.compute.pool.occupancy import Held, Occupancy
from unlatch.compute.pool.process import WorkerProcess
from unlatch.compute.pool.run import LimitReached, Replied, Run, RunState, TakenOut, Usage, WorkerExited
from unlatch.compute.pool.worker_runs import RunListener, WorkerRuns
from unlatch.compute.settings import ComputeSettings

# One run that is executed, and one staged.
_MAX_RUNS = 2
# A run that is staged behind a run as short as this counts as about to begin.
_SOON_SECONDS = 0.02


class InFlight(WorkerRuns):
    """Track the runs of a worker that executes one at a time."""

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
        super().__init__(worker, process, listener, occupancy, metrics, errors, settings)
        self._long_call_seconds = settings.long_call_seconds
        self._runs: deque[Run] = deque()
        # The worker's processor time at the end of its last run. Between runs it uses hardly any.
        self._cpu_seconds = process.cpu_seconds
        self._cpu_seconds_at_end = 0.0

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def calls_held(self) -> int:
        """How many calls the worker's runs have."""
        return sum(len(run.numbers) for run in self._runs)

    @property
    def expected_end(self) -> float:
        """When the last of the worker's runs is expected to end, by the monotonic clock. Only while it holds one."""
        return self._runs[0].begun + sum([run.expected_seconds for run in self._runs])

    def held(self) -> Held:
        """Return what the worker holds now."""
        runs = self._runs
        has_place = self.accepts and not self._process.ending
        if not runs:
            return (0, 0, self.worker) if has_place else None, False, False, 0.0
        first = runs[0]
        if len(runs) < _MAX_RUNS:
            rank = (1, first.size, self.worker) if has_place else None
            return rank, True, first.first.estimate.long, first.expected_seconds
        last = runs[1]
        long = first.first.estimate.long or last.first.estimate.long
        return None, True, long, first.expected_seconds + last.expected_seconds

    def has_room(self, now: float) -> bool:
        """Whether the worker can take one run more now."""
        runs = self._runs
        if len(runs) == _MAX_RUNS or not self.accepts or self._process.ending:
            return False
        return not runs or self._ends_soon(runs[0], now)

    def _ends_soon(self, run: Run, now: float) -> bool:
        """Return whether a call may be staged behind a run: not if the run is long, or has taken long already.

        Also not if no caller waits for the run: the staged call would wait for the grace period and for a new worker.
        """
        return run.wanted and not run.first.estimate.long and now - run.begun < self._long_call_seconds

    def run(self, calls: Sequence[Call], now: float) -> None:
        """Give the worker a call, or several of one kernel and the same parameters to run as one.

        Raises ResourceExhausted if there is no memory for the reply.
        """
        segment = self.segments.lend()
        run = Run(self.worker, {call: next(self._numbers) for call in calls}, segment, self.segments, now)
        self._runs.append(run)
        self._occupancy.changed(self)
        for call in calls:
            call.holder = self
        before = self._runs[0]
        if run is before or 0.0 < before.expected_seconds < _SOON_SECONDS:
            self._announce(run)
        self._send_next()

    def holds(self, call: Call) -> bool:
        """Whether the worker has the call."""
        return any(call in run.numbers for run in self._runs)

    def refuse(self, message: str, cause: Exit) -> None:
        """Fail the running call because it exceeds the memory limit, and kill the worker."""
        run = self._runs[0]
        if run.is_sent:
            if self._has_ended(run):
                # The run had ended before: its reply had not been read yet.
                return
            error = ResourceExhausted(f"kernel {run.spec.name} {message}")
            self._listener.happened(run, LimitReached(error, monotonic() - run.begun))
        # Else the worker runs nothing, so none of its calls is the cause.
        self.kill(cause)

    def kill(self, cause: Exit) -> None:
        """Kill the worker, whatever it is doing. Its exit settles its calls."""
        # The processor clock of the process cannot be read after its end.
        self._cpu_seconds_at_end = self._process.cpu_seconds
        super().kill(cause)

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
        self._occupancy.changed(self)
        try:
            run.stop_timer()
            self._metrics.rests()
            self._go_on()
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
        self._occupancy.changed(self)
        # From the last to the first, because each run's calls are put at the head of the backlog.
        for run in reversed(runs):
            usage = None
            if run.state is RunState.RUNNING:
                # The processor time of a worker that exited by itself is unknown: count all of the elapsed time.
                elapsed = monotonic() - run.begun
                usage = self._used(elapsed, self._cpu_seconds_at_end or self._cpu_seconds + elapsed, finished=False)
            run.stop_timer()
            self._listener.happened(run, WorkerExited(cause, stopping, usage))
        self.segments.close()

    def _go_on(self) -> None:
        """Begin the run that was staged, or announce to its callers that it is next."""
        if self._runs:
            run = self._runs[0]
            if run.is_sent:
                self._begin(run)
            else:
                self._announce(run)

    def _has(self, run: Run) -> bool:
        return run in self._runs

    def _send_next(self) -> None:
        """Send the worker the runs that it may begin, in order."""
        if self._process.ending:
            # The runs would be lost, and would count as begun.
            return
        for run in self._runs:
            if run.unconfirmed:
                return
            if not run.is_sent:
                self._send(run)

    def _send(self, run: Run) -> None:
        run.state = RunState.SENT
        if run is self._runs[0]:
            self._begin(run)
        members = tuple(
            Member(number, self.segments.input(call.block), call.tensors) for call, number in run.numbers.items()
        )
        segment = run.segment
        assert segment is not None
        self._process.send(RunFrame(run.spec.name, run.first.arguments.parameters, segment.number, members))

    def _begin(self, run: Run) -> None:
        now = monotonic()
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
            run.timer = self._loop.call_later(spec.timeout_seconds, self.guarded, "timeout", self._timed_out, run)

    def _withdraw(self, call: Call) -> None:
        run = next((run for run in self._runs if call in run.numbers), None)
        if run is None:
            return
        if not run.is_sent:
            self._take_out(run, call)
            return
        self._cancel_soon(run.numbers[call])
        if run is self._runs[0] and not run.wanted:
            self._kill_soon(run, exits.ABANDONED)

    def _take_out(self, run: Run, *calls: Call) -> None:
        """Remove calls from a run that has not been sent to the worker."""
        self._listener.happened(run, TakenOut(calls))
        for call in calls:
            run.take_out(call)
        self._occupancy.changed(self)
        if not run.numbers:
            self._runs.remove(run)
            # Not `assign`, because other callers may be leaving in the same round.
            self._listener.changed()
            if self._runs:
                self._announce(self._runs[0])
        self._send_next()

    def _has_ended(self, run: Run) -> bool:
        """Return whether a run ended before its timer fired: after a standstill, timers run before sockets are read."""
        self._process.hear()
        return not self._runs or self._runs[0] is not run

    def _timed_out(self, run: Run) -> None:
        if self._has_ended(run):
            return
        limit = run.spec.timeout_seconds or 0.0
        error = DeadlineExceeded(f"kernel {run.spec.name} ran for longer than its timeout of {limit:.3g} s")
        self._listener.happened(run, LimitReached(error, limit))
        if run.runs_again_alone:
            # Each call runs again alone, with a whole timeout of its own.
            self.kill(exits.TIMED_OUT)
            return
        self._process.send(Cancel(list(run.numbers.values())))
        self._kill_soon(run, exits.TIMED_OUT)

    def _kill_soon(self, run: Run, cause: Exit) -> None:
        """Kill the worker after the grace period, unless the run ends before. No caller waits for the run any more."""
        run.stop_timer()
        run.timer = self._loop.call_later(self._kill_grace_seconds, self.guarded, "grace", self._grace_over, run, cause)

    def _grace_over(self, run: Run, cause: Exit) -> None:
        if not self._has_ended(run):
            self.kill(cause)

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

    def _is_whole(self, results: dict[int, Result], run: Run) -> bool:
        """Return whether each call of a run has a valid result, except calls that have ended already."""
        return all(
            self._is_sound(results[number], run) if number in results else call.ended
            for call, number in run.numbers.items()
        )
