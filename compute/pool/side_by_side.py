"""The runs of an async worker: many at once, each of one call, each with an end of its own.

    given ──> begun ──> Done, or Failed ──> its call is answered
    │         ├─ Wants ──> Lend: a segment for its reply
    │         ├─ no caller waits, or the timeout has passed ─ grace ─> the worker is killed
    │         └─ the worker exits ──> its call runs again if pure and not poison
    └─ its caller has not confirmed, or leaves ──> taken out

**A death beside others.** If a worker dies by itself, it is unknown which of its calls was the cause. All that are pure
run again with the others. Those that are there a second time run in two smaller companies, one after the other: a
worker that has calls of one company takes no others. A company that lives is innocent. One that dies is divided again,
until a call is alone when its worker dies. That is a strike against this call (compute/dispatch/poison.py), and no
innocent call ever gets one.

**A coroutine that blocks its event loop** keeps all calls of its worker from going on, and from noticing cancels. If
the worker is killed for that, the call of this coroutine fails, since else it would run again and block again.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from time import monotonic

import structlog

from unlatch.common.errors import DeadlineExceeded, Internal, ResourceExhausted, UnlatchError
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.compute.call import Call
from unlatch.compute.ipc.frames import NO_SEGMENT, Blocks, Done, Failed, Lend, Member, RunFrame, Unblocks, Wants
from unlatch.compute.metrics import AsyncWorkerMetrics
from unlatch.compute.pool import exits
from unlatch.compute.pool.exits import Exit
from unlatch.compute.pool.occupancy import Held, Occupancy
from unlatch.compute.pool.process import WorkerProcess
from unlatch.compute.pool.run import LimitReached, Replied, Run, RunState, TakenOut, Usage, WorkerExited
from unlatch.compute.pool.worker_runs import RunListener, WorkerRuns
from unlatch.compute.settings import ComputeSettings

log = structlog.get_logger()

_companies = count(1)


class SideBySide(WorkerRuns):
    """Track the runs of an async worker."""

    def __init__(
        self,
        worker: int,
        process: WorkerProcess,
        listener: RunListener,
        occupancy: Occupancy,
        metrics: AsyncWorkerMetrics,
        errors: InternalErrors,
        settings: ComputeSettings,
    ) -> None:
        super().__init__(worker, process, listener, occupancy, metrics, errors, settings)
        self._runs: dict[int, Run] = {}
        self._numbers_of: dict[Call, int] = {}
        self._of_kernels: Counter[str] = Counter()
        self._of_async = metrics
        # The company that the worker's calls belong to, while it has some.
        self._company = 0
        # The number of the call whose coroutine blocks the event loop now. Meanwhile the worker takes no runs.
        self._blocking: int | None = None

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def calls_held(self) -> int:
        """How many calls the worker's runs have."""
        return len(self._runs)

    @property
    def expected_end(self) -> float:
        """When the last run is expected to end. No wait is reckoned from that here, since others end before."""
        return 0.0

    def held(self) -> Held:
        """Return what the worker holds now."""
        rank = (len(self._runs), 0, self.worker) if self.has_room(0.0) else None
        return rank, bool(self._runs), False, 0.0

    def has_room(self, now: float) -> bool:  # noqa: ARG002 (it asks for no time)
        """Whether the worker takes runs. The room for a call depends on its kernel (`takes`)."""
        return self.accepts and not self._process.ending and self._blocking is None

    def takes(self, call: Call) -> bool:
        """Whether the worker, which takes runs, has room for a call of this kernel and this company."""
        if self._runs and call.company != self._company:
            return False
        return self._of_kernels[call.spec.name] < (call.spec.concurrency or 0)

    def run(self, calls: Sequence[Call], now: float) -> None:
        """Give the worker a call."""
        (call,) = calls
        number = next(self._numbers)
        run = Run(self.worker, {call: number}, None, self.segments, now)
        self._company = call.company
        self._runs[number] = run
        self._numbers_of[call] = number
        self._of_kernels[call.spec.name] += 1
        self._occupancy.changed(self)
        call.holder = self
        self._announce(run)
        if not run.unconfirmed:
            self._send(run)

    def holds(self, call: Call) -> bool:
        """Whether the worker has the call."""
        return call in self._numbers_of

    def heard(self, frame: Done | Failed) -> bool:
        """Handle the reply that ends a run. Returns False for an invalid reply: the worker is killed."""
        results = {result.call: result for result in frame.results} if isinstance(frame, Done) else {}
        number = next(iter(results), 0) if isinstance(frame, Done) else frame.call
        run = self._runs.get(number)
        if run is None or not run.is_sent or len(results) > 1:
            self._process.kill(exits.OTHER_CALL)
            return False
        run.inline = frame.inline if isinstance(frame, Done) else None
        if results and not self._is_sound(results[number], run):
            self._process.kill(exits.UNSOUND_REPLY)
            return False
        self.calls += 1
        self._forget(number, run)
        cpu_seconds = min(frame.cpu_nanoseconds / 1e9, monotonic() - run.begun)
        usage = Usage(frame.run_nanoseconds / 1e9, cpu_seconds, finished=bool(results) and run.wanted)
        try:
            run.stop_timer()
            self._of_async.ended_run(cpu_seconds)
            self._metrics.ran(run.spec.name, "ok" if results else "error")
        finally:
            # Even if the lines above raise: the run is no longer in `_runs`, so only the listener can settle it.
            self._listener.happened(run, Replied(frame, results, usage))
        return True

    def asked(self, frame: Wants | Blocks | Unblocks) -> None:
        """Lend a segment for a large reply, or note that a coroutine blocks its event loop, or does so no more."""
        run = self._runs.get(frame.call)
        if not isinstance(frame, Wants):
            self._blocking = frame.call if isinstance(frame, Blocks) else None
            self._occupancy.changed(self)
            self._listener.changed()
            if isinstance(frame, Blocks):
                # The task of a call may go on after the call has ended.
                kernel = "" if run is None else run.spec.name
                self._of_async.blocked(kernel)
                log.warning("coroutine blocks its event loop", kernel=kernel, worker=self.worker, place=frame.place)
            return
        if run is None or not run.is_sent or run.segment is not None:
            self._process.kill(exits.UNASKED)
            return
        try:
            run.segment = self.segments.lend()
        except ResourceExhausted:
            self._process.send(Lend(frame.call, NO_SEGMENT))
        else:
            self._process.send(Lend(frame.call, run.segment.number))

    def refuse(self, message: str, cause: Exit) -> None:
        """Kill the worker because it exceeds the memory limit. A call that is alone in it fails for that."""
        begun = [run for run in self._runs.values() if run.is_sent]
        if len(begun) == 1:
            self._fail(begun[0], ResourceExhausted(f"kernel {begun[0].spec.name} {message}"))
        # Of several calls each may have taken the memory. They are divided until it is found.
        self.kill(cause if len(begun) == 1 else replace(cause, blames_call=True))

    def lost(self, cause: Exit, *, stopping: bool) -> None:
        """Settle the calls of a worker that has exited."""
        runs = list(self._runs.values())
        begun = [run for run in runs if run.state is RunState.RUNNING]
        for number, run in list(self._runs.items()):
            self._forget(number, run)
        if cause.blames_call and len(begun) > 1:
            _divide([run.first for run in begun])
        # From the last to the first, because each run's call is put at the head of the backlog.
        for run in reversed(runs):
            run.stop_timer()
            usage = Usage(monotonic() - run.begun, 0.0, finished=False) if run.state is RunState.RUNNING else None
            self._listener.happened(run, WorkerExited(cause, stopping, usage, beside=len(begun) > 1))
        self.segments.close()

    def _has(self, run: Run) -> bool:
        return run.first in self._numbers_of

    def _forget(self, number: int, run: Run) -> None:
        del self._runs[number], self._numbers_of[run.first]
        self._of_kernels[run.spec.name] -= 1
        self._occupancy.changed(self)

    def _send_next(self) -> None:
        for run in [run for run in self._runs.values() if not run.is_sent and not run.unconfirmed]:
            self._send(run)

    def _send(self, run: Run) -> None:
        if self._process.ending:
            # The run would be lost, and would count as begun.
            return
        call = run.first
        number = run.numbers[call]
        self._begin(run, number)
        member = Member(number, self.segments.input(call.block), call.tensors)
        self._process.send(RunFrame(run.spec.name, call.arguments.parameters, NO_SEGMENT, (member,)))

    def _begin(self, run: Run, number: int) -> None:
        now = monotonic()
        run.begin(now)
        self._of_async.began_run()
        run.first.begins(now)
        self._metrics.waited(now - run.first.landed)
        seconds = run.spec.timeout_seconds
        if seconds is not None:
            run.timer = self._loop.call_later(seconds, self.guarded, "timeout", self._timed_out, run, number)

    def _withdraw(self, call: Call) -> None:
        number = self._numbers_of.get(call)
        if number is None:
            return
        run = self._runs[number]
        if not run.is_sent:
            self._take_out(run, call)
            return
        self._cancel_soon(number)
        self._kill_soon(run, number, exits.ABANDONED)

    def _take_out(self, run: Run, *calls: Call) -> None:
        for call in calls:
            self._listener.happened(run, TakenOut(calls))
            self._forget(run.numbers[call], run)
            run.take_out(call)
            # Not `assign`, because other callers may be leaving in the same round.
            self._listener.changed()

    def _has_ended(self, run: Run, number: int) -> bool:
        """Return whether a run ended before its timer fired: after a standstill, timers run before sockets are read."""
        self._process.hear()
        return self._runs.get(number) is not run

    def _timed_out(self, run: Run, number: int) -> None:
        if self._has_ended(run, number):
            return
        limit = run.spec.timeout_seconds or 0.0
        self._fail(run, DeadlineExceeded(f"kernel {run.spec.name} ran for longer than its timeout of {limit:.3g} s"))
        self._cancel_soon(number)
        self._kill_soon(run, number, exits.TIMED_OUT)

    def _kill_soon(self, run: Run, number: int, cause: Exit) -> None:
        """Kill the worker after the grace period, unless the run ends before. No caller waits for the run any more."""
        run.stop_timer()
        grace = self._kill_grace_seconds
        run.timer = self._loop.call_later(grace, self.guarded, "grace", self._grace_over, run, number, cause)

    def _grace_over(self, run: Run, number: int, cause: Exit) -> None:
        if self._has_ended(run, number):
            return
        blocking = self._runs.get(self._blocking or 0)
        if blocking is not None and blocking is not run:
            seconds = monotonic() - blocking.begun
            told = f"kernel {blocking.spec.name} blocked the event loop of its worker, and has run for {seconds:.2g} s"
            self._fail(blocking, Internal(f"{told}; an `async def` kernel must await what takes long"))
        self.kill(cause)

    def _fail(self, run: Run, error: UnlatchError) -> None:
        """Fail the call of a run that the worker still executes."""
        self._listener.happened(run, LimitReached(error, monotonic() - run.begun))


def _divide(calls: Sequence[Call]) -> None:
    """Divide those calls that were there before when a worker died in two companies. All calls are marked for that."""
    again = [call for call in calls if call.deaths_beside]
    for call in calls:
        call.deaths_beside += 1
    half = (len(again) + 1) // 2
    for company in (again[:half], again[half:]):
        number = next(_companies)
        for call in company:
            call.company = number
