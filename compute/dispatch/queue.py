"""The queue: calls whose bytes have landed wait for a worker.

    admit ──> its bytes land ──> offer ──> waits ──> given to a worker, alone or with others like it ──> ran
      └ refused: it could not       └ refused: the      └ failed: its time is over, or would be before it is done
        be answered in time           queue is full

The policy says who is next (common/waiting/order.py). What is predicted comes from the times that runs have taken.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from itertools import islice
from time import monotonic
from typing import Protocol

from unlatch.common.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from unlatch.common.waiting.admission import MARGIN, refusal_in_time, retry_milliseconds, too_late
from unlatch.common.waiting.demand import Estimate
from unlatch.common.waiting.forecast import Forecast
from unlatch.common.waiting.order import Policy
from unlatch.compute.call import Call
from unlatch.compute.ipc.frames import MAX_MEMBERS_BYTES, described_bytes

# What a call is expected to take beyond its wait and its run, on its way back to its caller.
_REPLY_SECONDS = 0.002
# Where only workers that run no long call have room.
_SHORT = frozenset({False})
# Refusing one takes about 20 µs.
_REFUSED_AT_ONCE = 32
# Larger calls gain nothing by company, and putting them side by side takes their memory again.
_MOST_BATCH_BYTES = 32 * 1024 * 1024
# Of many calls that would fit one by one but not together, the front has no time to look at all.
_MOST_LOOKED_AT = 1024


class Workers(Protocol):
    """What the queue needs to know of the pool."""

    @property
    def keeps_some_free(self) -> bool:
        """Whether some workers are kept free of long calls now."""

    def has_room(self, *, long: bool) -> bool:
        """Whether some worker can take one more call in hand; a long one, where workers are kept free of those."""

    def wait_seconds(self, before: float, *, short: bool) -> float:
        """How long until a worker begins a call that has so many seconds of work before it in the queue.

        With `short`, of the workers that run no long call.
        """

    def run(self, calls: Sequence[Call]) -> None:
        """Give a call to a worker, or several as one. Raises ResourceExhausted where there is none for the reply."""

    def abandon(self, call: Call) -> None:
        """Nobody waits for a call any more that was given to a worker."""


class Queue:
    """Calls that wait. `max_calls` trades memory and waiting against refusals: what is over it is refused at once."""

    def __init__(self, policy: Policy[Call], max_calls: int, long_call_seconds: float) -> None:
        self._policy = policy
        self._times = Forecast()
        self._workers: Workers | None = None
        self._max_calls = max_calls
        self._long_call_seconds = long_call_seconds
        self._shut: Unavailable | None = None

    def feed(self, workers: Workers) -> None:
        """From now on calls go to these workers. (The pool in turn calls `pump` whenever it has room.)"""
        self._workers = workers

    def __len__(self) -> int:
        return len(self._policy)

    def admit(self, call: Call) -> None:
        """A call has come. Raises ResourceExhausted where it could not be answered in time, by what runs have taken."""
        seconds = self._times.expected(call.spec.name, call.size)
        call.estimate = Estimate(seconds, seconds > self._long_call_seconds)
        if call.demand.deadline == math.inf:
            return
        left = call.demand.deadline - monotonic()
        wait = self._wait_seconds(call, (left - _REPLY_SECONDS) / MARGIN - seconds)
        refusal = refusal_in_time(
            call.demand,
            self._times,
            wait_seconds=wait,
            run_seconds=seconds,
            reply_seconds=_REPLY_SECONDS,
            left_seconds=left,
        )
        if refusal is not None:
            raise refusal

    def wait_seconds(self, *, short: bool) -> float:
        """How long a new call would wait; with `short`, one that is not long."""
        workers = self._workers
        if workers is None:
            return 0.0
        short = short and workers.keeps_some_free
        return workers.wait_seconds(self._policy.seconds(short=short), short=short)

    def offer(self, call: Call) -> None:
        """Let a call wait, or run at once. Where too many wait one is refused: who can best do without."""
        if self._shut is not None:
            self._fail(call, self._shut)
            return
        self._policy.add(call)
        if len(self._policy) > self._max_calls:
            refused = self._policy.one_too_many(call)
            self._policy.remove(refused)
            self._fail(refused, self.full(f"the queue is full: max_queued_calls={self._max_calls}"))
        self.pump()

    def full(self, what: str) -> ResourceExhausted:
        """What is told a caller for whom there is no room: to come back when a tenth of what waits is done."""
        waited = self.wait_seconds(short=False)
        return ResourceExhausted(what, retry_after_milliseconds=retry_milliseconds(waited / 10))

    def put_back(self, call: Call) -> None:
        """A worker was lost that had this call: it is next again. It has waited its turn, so no bound is in its way."""
        if self._shut is not None:
            self._turn_down(call, self._shut)
        else:
            self._policy.put_back(call)

    def take_back(self, fits: Callable[[Call], bool], most: int) -> list[Call]:
        """The first calls that wait and fit: they wait no more."""
        found = list(islice(filter(fits, self._policy), most))
        for call in found:
            self._policy.remove(call)
        return found

    def shut(self, why: Unavailable | None) -> None:
        """Refuse what waits and what comes, since there will be no worker for it; until told that there is (None)."""
        self._shut = why
        self._refuse_some()

    def run_again(self, call: Call) -> None:
        """A call that was begun is next again, and from now on runs alone, whoever did harm to whom."""
        call.demand = call.demand._replace(batch=None)
        # What its first run cost was charged whole: what is taken back here is not part of it.
        self._policy.charge(call, call.estimate.seconds)
        self.put_back(call)

    def withdraw(self, call: Call) -> None:
        """A call's caller has left: if the call still waits it is dropped, if a worker has it the worker is told."""
        if self._policy.remove(call):
            call.release()
        elif self._workers is not None:
            self._workers.abandon(call)

    def ran(self, call: Call, run_seconds: float, cpu_seconds: float, *, done: bool) -> None:
        """A worker has run a call, to its end or to the worker's: what it took is learned, and charged to its tenant.

        `run_seconds` is by the clock and tells how long others wait, `cpu_seconds` is what the call cost.
        """
        learn = self._times.learn if done else self._times.learn_at_least
        learn(call.spec.name, call.size, run_seconds)
        self._policy.charge(call, cpu_seconds - call.estimate.seconds)

    def not_run(self, call: Call) -> None:
        """A call whose turn it was is not run after all: it has cost its tenant nothing."""
        self._policy.charge(call, -call.estimate.seconds)

    def pump(self) -> None:
        """Hand calls to workers while there is room."""
        hopeless = 0
        while (workers := self._workers) is not None and (call := self._next(workers)) is not None:
            if not self._is_hopeless(call, workers):
                self._run(call, workers)
                continue
            self._turn_down(call, too_late(call.spec.name))
            hopeless += 1
            if hopeless == _REFUSED_AT_ONCE:
                # By turns: after a standstill it may be all that wait.
                asyncio.get_running_loop().call_soon(self.pump)
                return

    def _run(self, call: Call, workers: Workers) -> None:
        calls = [call, *self._companions(call)]
        try:
            workers.run(calls)
        except ResourceExhausted as error:
            for refused in calls:
                self._turn_down(refused, error)

    def _next(self, workers: Workers) -> Call | None:
        if not self._policy:
            return None
        if workers.has_room(long=True):
            return self._policy.next()
        return self._policy.next(_SHORT) if workers.keeps_some_free and workers.has_room(long=False) else None

    def _is_hopeless(self, call: Call, workers: Workers) -> bool:
        if call.demand.deadline == math.inf:
            return False
        left = call.demand.deadline - monotonic()
        # What cannot be done in time must not keep a worker from what can. It may be staged, behind what is not long.
        if not self._policy or left > MARGIN * (self._long_call_seconds + call.estimate.seconds):
            return left < 0
        return left < MARGIN * (workers.wait_seconds(0.0, short=not call.estimate.long) + call.estimate.seconds)

    def _companions(self, call: Call) -> list[Call]:
        """Calls that run as one with this one, taken."""
        if call.demand.batch is None:
            return []
        rows, size, seconds = call.rows, call.size, call.estimate.seconds
        most = MAX_MEMBERS_BYTES // described_bytes(len(shape) for shape in call.arguments.shapes)
        most_seconds = _seconds_for(call)
        found: list[Call] = []
        for other in islice(self._policy.alike(call), _MOST_LOOKED_AT):
            if rows >= call.spec.max_batch_size or len(found) + 1 >= most:
                break
            if other.estimate.long and not call.estimate.long:
                # It may be that this worker is kept free of those.
                continue
            more = rows + other.rows, size + other.size, seconds + other.estimate.seconds
            if more[0] <= call.spec.max_batch_size and more[1] <= _MOST_BATCH_BYTES and more[2] <= most_seconds:
                rows, size, seconds = more
                found.append(other)
        for other in found:
            self._policy.take(other)
        return found

    def _wait_seconds(self, call: Call, longest: float) -> float:
        """How long a call would wait; where it is `longest` at most, no better way is looked for."""
        if self._workers is None:
            return 0.0
        wait = self._workers.wait_seconds(self._policy.seconds_before(call), short=False)
        if call.estimate.long or wait <= max(0.0, longest) or not self._workers.keeps_some_free:
            return wait
        before = self._policy.seconds_before(call, short=True)
        return min(wait, self._workers.wait_seconds(before, short=True))

    def _refuse_some(self) -> None:
        # By turns, since many may wait.
        for _ in range(_REFUSED_AT_ONCE):
            if self._shut is None or (call := self._policy.next()) is None:
                return
            self._turn_down(call, self._shut)
        asyncio.get_running_loop().call_soon(self._refuse_some)

    @staticmethod
    def _fail(call: Call, error: DeadlineExceeded | ResourceExhausted | Unavailable) -> None:
        """End a call that waited, or was about to."""
        call.fail(error)
        call.release()

    def _turn_down(self, call: Call, error: DeadlineExceeded | ResourceExhausted | Unavailable) -> None:
        """The same for a call whose turn it was."""
        self.not_run(call)
        self._fail(call, error)


def _seconds_for(call: Call) -> float:
    """What a run of several may take, as far as is known: none is to be late, or over its limit, for the others."""
    left = call.demand.deadline - monotonic()
    return min(left, call.spec.timeout_seconds or math.inf)
