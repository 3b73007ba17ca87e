"""The dispatcher: calls whose bytes have landed wait in the backlog for a worker of the pool.

    admit ──> its bytes land ──> offer ──> waits ──> given to a worker, alone or with others like it ──> settled
      └ refused: it could not       └ refused: it is   └ failed: its deadline has passed, or would pass before
        be answered in time           poison, or the     the run ends
                                      backlog is full

The backlog chooses the next call (common/waiting/backlog.py). The pool chooses a worker with room. outcomes.py decides
how an event ends the calls of a worker, and `settle` carries the decision out.

Each entry point has a guard. An unexpected exception fails only the calls that the entry point handles; it is counted
and logged, and the dispatcher continues.
"""

import asyncio
import math
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from time import monotonic

import structlog

from unlatch.common.errors import ResourceExhausted, Unavailable, UnlatchError
from unlatch.common.fair import ByTurns
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.waiting.backlog import MARGIN, Backlog, Send, retry_milliseconds
from unlatch.common.waiting.demand import Beside, Estimate
from unlatch.common.waiting.order import by_length
from unlatch.compute.call import Call
from unlatch.compute.dispatch.batching import companions
from unlatch.compute.dispatch.outcomes import (
    DROP,
    Answer,
    Drop,
    Fail,
    FailRunning,
    Outcome,
    Requeue,
    RunAlone,
    Settled,
    Strike,
    outcomes,
    unexpected,
    verdict,
)
from unlatch.compute.dispatch.poison import Poison
from unlatch.compute.ipc.frames import Failed
from unlatch.compute.metrics import ComputeMetrics
from unlatch.compute.pool import exits
from unlatch.compute.pool.pool import Pool
from unlatch.compute.pool.run import Event, Replied, Run, WorkerExited
from unlatch.compute.pool.worker_runs import WorkerRuns
from unlatch.compute.settings import ComputeSettings

log = structlog.get_logger()

# Expected time of the way back to the caller: a call takes this beyond its wait and its run.
_REPLY_SECONDS = 0.002
# Calls refused in one round of the event loop. Refusing a call takes about 20 µs.
_REFUSED_AT_ONCE = 32
# Waiting calls checked again for poison in one round of the event loop.
_RECONSIDERED_AT_ONCE = 16
# Tuples for isinstance: making a union takes longer than the check.
_ENDS = (Replied, WorkerExited)
_KEEPS_SEGMENT = (Answer, FailRunning)


class Dispatcher:
    """Hold the calls that wait, and give them to the workers of a pool. `kind` tells which calls find room together."""

    def __init__(
        self,
        pool: Pool,
        poison: Poison,
        metrics: ComputeMetrics,
        errors: InternalErrors,
        settings: ComputeSettings,
        *,
        kind: Callable[[Call], Hashable] = by_length,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._pool = pool
        self._poison = poison
        self._metrics = metrics
        self._errors = errors
        self._long_call_seconds = settings.long_call_seconds
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._backlog = Backlog[Call](
            settings.tenant_weights,
            reply_seconds=_REPLY_SECONDS,
            caught=partial(errors.caught, "assign"),
            kind=kind,
            max_calls=settings.max_queued_calls,
            full=lambda: self.full(f"the queue is full: max_queued_calls={settings.max_queued_calls}"),
        )
        # The kinds of the calls that wait: empty if none waits. Asking this costs less than the backlog's length.
        self._waiting = self._backlog.kinds
        self._refusing = ByTurns(self._refuse, at_once=_REFUSED_AT_ONCE, caught=partial(errors.caught, "shut"))
        # Whether `assign` is scheduled for the next round of the event loop.
        self._assigns_soon = False

    def __len__(self) -> int:
        return len(self._backlog)

    async def start(self) -> None:
        """Fill the pool. Raises StartError."""
        await self._pool.start(self)

    def admit(self, call: Call) -> None:
        """Estimate a new call from past runs.

        Raises ResourceExhausted if it could not be answered in time, and DeadlineExceeded if its deadline has passed.
        """
        seconds = self._backlog.forecast.expected(call.spec.name, call.size)
        at_once = call.spec.concurrency
        if at_once is None:
            call.estimate = Estimate(seconds, seconds > self._long_call_seconds)
        else:
            call.estimate = Estimate(seconds / at_once, beside=Beside(call.spec.name, at_once))
        if call.demand.deadline == math.inf:
            return
        now = self._clock()
        longest = (call.demand.deadline - now - _REPLY_SECONDS) / MARGIN - seconds
        before = self._backlog.seconds_before(call) if self._waiting else 0.0
        if self._pool.longest_wait_seconds(before) <= longest:
            return
        wait = self._wait_seconds(call, before, longest, now)
        refusal = self._backlog.refusal_in_time(call, wait_seconds=wait, run_seconds=seconds)
        if refusal is not None:
            raise refusal

    def wait_seconds(self, *, short: bool) -> float:
        """Return how many seconds a new call would wait; with `short`, a new call that is not long."""
        now = self._clock()
        short = short and self._pool.keeps_some_free(now)
        return self._pool.wait_seconds(self._backlog.seconds(short=short), now, short=short)

    def full(self, what: str) -> ResourceExhausted:
        """Return the error for a call without room. Its RetryInfo is the time for a tenth of the backlog."""
        waited = self.wait_seconds(short=False)
        return ResourceExhausted(what, retry_after_milliseconds=retry_milliseconds(waited / 10))

    def offer(self, call: Call, *, judged: bool = False) -> None:
        """Let a call wait or run at once. A call like one that killed a worker is checked for poison first."""
        try:
            if not judged and self._poison.suspects(call):
                self._poison.judge(call, partial(self._judged, call))
                return
            self._enqueue(call)
        except Exception as error:  # noqa: BLE001 (an entry point's guard)
            internal = self._errors.caught("offer", error)
            self._backlog.withdraw(call)
            self.settle(call, Fail(internal))
        self.assign()

    def withdraw(self, call: Call) -> None:
        """Drop a waiting call whose caller has left."""
        with self._errors.guarded("withdraw"):
            self._backlog.withdraw(call)
        self.settle(call, DROP)

    def shut(self, why: Unavailable | None) -> None:
        """Refuse all waiting and new calls with this error, since no worker can be started; None ends that."""
        self._backlog.shut(why)
        self._refusing.start()

    def changed(self) -> None:
        """Schedule `assign` for the next round of the event loop: a worker may have room, or a call has come back."""
        if not self._assigns_soon:
            self._assigns_soon = True
            self._loop.call_soon(self._assign_soon)

    def assign(self) -> None:
        """Give waiting calls to workers, as long as a worker has room."""
        try:
            refused = 0
            # Refusals at once are bounded: after the process has stood still, all waiting calls may be late.
            while self._waiting and refused < _REFUSED_AT_ONCE:
                # One time for the whole decision: with two readings of the clock, a free worker could count as busy.
                now = self._clock()
                opening = self._pool.opening(now)
                if opening is None:
                    return
                kinds = opening.kinds(self._waiting)
                turn = self._backlog.next(kinds, opening.takes, partial(self._seconds_until_done, now))
                if isinstance(turn, Send):
                    self._hand_out(turn.place, turn.entry, now)
                elif turn is not None:
                    self.settle(turn.entry, Fail(turn.error))
                    refused += 1
                else:
                    return
            if self._waiting:
                self.changed()
        except Exception as error:  # noqa: BLE001 (an entry point's guard)
            self._errors.caught("assign", error)

    def happened(self, run: Run, event: Event) -> None:
        """Settle the calls of a run after an event of that run."""
        try:
            rows = outcomes(run, event)
        except Exception as error:  # noqa: BLE001 (an entry point's guard)
            rows = unexpected(run, event, self._errors.caught("outcomes", error))
        if isinstance(event, _ENDS):
            try:
                self._account(run, event, rows)
            except Exception as error:  # noqa: BLE001 (an entry point's guard)
                self._errors.caught("account", error)
        # From the last to the first, because calls that wait again are put at the head of the backlog.
        for call, outcome, refund in reversed(rows):
            self.settle(call, outcome, refund=refund, run=run)

    def settle(self, call: Call, outcome: Outcome, *, refund: bool = False, run: Run | None = None) -> None:
        """Carry out the outcome of a call. Only this function ends a call in the dispatcher, or lets it wait again.

        `refund` gives back what the tenant was charged when the call's turn came. `run` is the run of the call, if any.
        """
        try:
            # The backlog refunds a call that is put back without having run.
            if refund and not isinstance(outcome, Requeue):
                self._backlog.not_run(call)
            self._perform(call, outcome, run)
        except Exception as error:  # noqa: BLE001 (an entry point's guard)
            internal = self._errors.caught("settle", error)
            # The reply of a call that has ended may be on its way, and its segment is kept until it is sent.
            if not (isinstance(outcome, Answer) and call.ended):
                outcome = FailRunning(internal) if isinstance(outcome, FailRunning) else Fail(internal)
                self._backlog.withdraw(call)
                self._perform(call, outcome, run)
        if run is not None and not isinstance(outcome, _KEEPS_SEGMENT):
            run.read(call)

    def _perform(self, call: Call, outcome: Outcome, run: Run | None) -> None:
        if isinstance(outcome, (Answer, Fail, Drop)):
            call.holder = None
            # No worker reads the call's memory any more.
            call.release()
            if isinstance(outcome, Answer):
                assert run is not None
                call.answer(outcome.tensors, run.memory, outcome.ran, partial(run.read, call))
            elif isinstance(outcome, Fail):
                call.fail(outcome.error, outcome.ran)
        elif isinstance(outcome, FailRunning):
            call.fail(outcome.error, outcome.ran)
        elif isinstance(outcome, Strike):
            self._poison.strike(call, outcome.why, partial(self._struck, call, outcome))
        else:
            self._put_back(call, outcome)

    def _put_back(self, call: Call, outcome: Requeue | RunAlone) -> None:
        """Put a call back at the head of the backlog. No bound refuses it, because it has waited its turn."""
        call.holder = self
        if isinstance(outcome, RunAlone):
            call.demand = call.demand._replace(batch=None)
            call.deaths += outcome.died
            refusal = self._backlog.put_back_after_run(call)
        else:
            refusal = self._backlog.put_back(call)
        if refusal is not None:
            self._perform(call, Fail(refusal.error), None)
        self.changed()

    def _struck(self, call: Call, strike: Strike, poison: UnlatchError | None) -> None:
        """Settle a call whose run killed a worker. If it is poison, check the waiting calls again."""
        matches = self._poison.matcher(call)
        self.settle(call, verdict(call, strike, poison))
        if poison is not None:
            self._reconsider(matches)

    def _reconsider(self, matches: Callable[[Call], bool]) -> None:
        """Check waiting calls that may be poison, some in each round of the event loop, because many may wait."""
        found: list[Call] = []
        with self._errors.guarded("reconsider"):
            found = self._backlog.take_out(matches, _RECONSIDERED_AT_ONCE)
        for call in found:
            self.offer(call)
        if found:
            self._loop.call_soon(self._reconsider, matches)

    def _judged(self, call: Call, poison: UnlatchError | None) -> None:
        """Let a call wait after its check for poison, unless it is poison or its caller has left."""
        if call.ended:
            self.settle(call, DROP)
        elif poison is not None:
            self.settle(call, Fail(poison))
        else:
            self.offer(call, judged=True)

    def _enqueue(self, call: Call) -> None:
        """Give a call to a worker, or add it to the backlog. If that is full, settle the call that it refuses."""
        call.holder = self
        if not self._waiting and not self._backlog.is_shut:
            # Most calls find a worker with room, and need not wait.
            now = self._clock()
            opening = self._pool.opening(now)
            has_room = opening is not None and (opening.takes_long or not call.estimate.long)
            in_flight = opening.takes(call) if opening is not None and has_room else None
            if in_flight is not None and call.demand.deadline >= now:
                self._backlog.take_at_once(call)
                self._hand_out(in_flight, call, now)
                return
        refusal = self._backlog.add(call)
        if refusal is not None:
            self.settle(refusal.entry, Fail(refusal.error))

    def _assign_soon(self) -> None:
        self._assigns_soon = False
        self.assign()

    def _hand_out(self, in_flight: WorkerRuns, call: Call, now: float) -> None:
        """Give a call to a worker with room, together with waiting calls that can run as one batch with it."""
        if call.ended:
            self.settle(call, DROP, refund=True)
            return
        calls = [call]
        try:
            if call.demand.batch is not None:
                for other in companions(call, self._backlog.alike(call), now):
                    self._backlog.take(other)
                    calls.append(other)
            self._pool.run(in_flight, calls, now)
        except ResourceExhausted as error:
            for refused in calls:
                self.settle(refused, Fail(error), refund=True)
        except Exception as error:  # noqa: BLE001 (an entry point's guard)
            internal = self._errors.caught("assign", error)
            for failed in calls:
                if in_flight.holds(failed):
                    # The worker may have the call. It is killed, and its exit frees the call's memory.
                    in_flight.kill(exits.INTERNAL_ERROR)
                    self.settle(failed, FailRunning(internal))
                else:
                    self.settle(failed, Fail(internal), refund=True)

    def _seconds_until_done(self, now: float, call: Call, _: WorkerRuns) -> float:
        """Return the seconds until a call would be done; 0 if it may run even if it could be late.

        A call that would be late must not occupy a worker that could finish another call in time. The call may be
        staged behind a call that is not long.
        """
        seconds, left = call.estimate.run_seconds, call.demand.deadline - now
        if len(self._backlog) < 2 or left > MARGIN * (self._long_call_seconds + seconds):
            return 0.0
        return self._pool.wait_seconds(0.0, now, short=not call.estimate.long) + seconds

    def _wait_seconds(self, call: Call, before: float, longest: float, now: float) -> float:
        """Return the seconds that a call would wait, with `before` seconds of work before it.

        A wait of at most `longest` is returned without further search.
        """
        wait = self._pool.wait_seconds(before, now, short=False)
        if call.estimate.long or wait <= max(0.0, longest) or not self._pool.keeps_some_free(now):
            return wait
        before = self._backlog.seconds_before(call, short=True)
        return min(wait, self._pool.wait_seconds(before, now, short=True))

    def _log_failure(self, run: Run, failed: Failed) -> None:
        """Log the traceback of a kernel that raised."""
        if failed.log:
            log.error("kernel failed", kernel=run.spec.name, worker=run.worker, exception=failed.log)

    def _account(self, run: Run, event: Replied | WorkerExited, rows: list[Settled]) -> None:
        """Log a failure, learn the run time for the forecast, and charge each call of the run an equal part.

        The forecast learns seconds by the clock, because other calls wait that long. Tenants pay for processor seconds.
        """
        if isinstance(event, Replied) and isinstance(event.frame, Failed):
            self._log_failure(run, event.frame)
        usage = event.usage
        ran = [row for row in rows if not row.refund]
        if usage is None or not ran:
            return
        seconds, cpu_seconds = usage.seconds / len(ran), usage.cpu_seconds / len(ran)
        forecast = self._backlog.forecast
        learn = forecast.learn if usage.finished else forecast.learn_at_least
        for call, outcome, _ in ran:
            learn(call.spec.name, call.size, seconds)
            self._backlog.ran(call, cpu_seconds)
            if call.ended:
                self._metrics.wasted.add(cpu_seconds, str(run.worker))
            elif isinstance(event, Replied) and not isinstance(outcome, RunAlone):
                self._poison.clear(call)

    def _refuse(self) -> Iterator[None]:
        """Fail the waiting calls, as long as no worker can be started. Yields after each call (a ByTurns step)."""
        for refusal in self._backlog.refusals_while_shut():
            self.settle(refusal.entry, Fail(refusal.error))
            yield
