"""Occupancy of the workers: which one takes the next run, and how long the runs of all of them will take.

The dispatcher asks for both at each call. So the answers are kept where runs change, instead of being searched for in
every slot: a call costs no more with more workers. After a worker has changed, the next question looks at it once.

Room also depends on the clock and on callers who leave, and neither is reported here. So `first` may return a worker
that has no room any more. The pool checks that and passes the worker over until it changes.
"""

import asyncio
import math
from bisect import bisect_left, insort
from functools import partial
from heapq import heapify, heappop, heappush
from typing import Protocol

# Plain tuples, because each call makes two of them.
# A worker's rank: the number of its runs, the bytes of their calls' inputs, and the worker. The lowest has least to do.
Rank = tuple[int, int, int]
# What a worker holds: its rank, or None if it cannot hold one more run; whether it holds runs; whether one of them is
# long; the seconds that they are expected to take in all.
Held = tuple[Rank | None, bool, bool, float]

# Times are kept as whole microseconds, so that their sum stays exact, however often a time is added or subtracted.
_MICROSECONDS = 1e6
# Outdated entries of a heap are removed when their time has passed, or all at once if there are more than this.
_MAX_OUTDATED = 1024


class Holding(Protocol):
    """The runs in flight of one worker."""

    @property
    def worker(self) -> int:
        """The number of the worker's slot."""

    @property
    def expected_end(self) -> float:
        """When the last of the worker's runs is expected to end, by the monotonic clock. Only while it holds one."""

    def held(self) -> Held:
        """Return what the worker holds now."""

    def __len__(self) -> int: ...


class _Ends:
    """The times at which workers are expected to end their last runs. A time that has passed is removed."""

    def __init__(self) -> None:
        self._by_worker: dict[int, int] = {}
        self._sum = 0
        # Includes outdated entries: those of workers whose time has changed since.
        self._heap: list[tuple[int, int]] = []

    def set(self, worker: int, end: float | None) -> None:
        """Set the time at which a worker is expected to end its last run; None if it has no run."""
        self._sum -= self._by_worker.pop(worker, 0)
        if end is not None:
            self._by_worker[worker] = time = int(end * _MICROSECONDS)
            self._sum += time
            heappush(self._heap, (time, worker))
            if len(self._heap) > len(self._by_worker) + _MAX_OUTDATED:
                self._heap = [(time, worker) for worker, time in self._by_worker.items()]
                heapify(self._heap)

    def seconds_left(self, now: float) -> float:
        """Return the sum of the seconds from `now` until each time. The clock never goes back."""
        heap, at = self._heap, int(now * _MICROSECONDS)
        while heap and heap[0][0] <= at:
            time, worker = heappop(heap)
            if self._by_worker.get(worker) == time:
                self.set(worker, None)
        return (self._sum - len(self._by_worker) * at) / _MICROSECONDS


class Occupancy:
    """Track what the workers of a pool hold. The runs in flight of a worker call `changed`."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._held: list[Held] = [(None, False, False, 0.0)] * workers
        # Sums over all workers.
        self._busy = self._long = 0
        self._expected_seconds = 0.0
        # The ranks of workers that can hold one more run, in order.
        self._ranks: list[Rank] = []
        # Of workers without a long run, and of those with one.
        self._ends, self._long_ends = _Ends(), _Ends()
        # Workers that have changed since they were last looked at, and those whose ends have. Most questions need no
        # ends.
        self._changed: dict[int, Holding] = {}
        self._ends_changed: dict[int, Holding] = {}
        self._waiters: list[asyncio.Future[bool]] = []

    def changed(self, holding: Holding) -> None:
        """Note that a worker's runs have changed, that one has begun, or that the worker takes runs from now on."""
        self._changed[holding.worker] = holding
        if self._waiters:
            for waiter in self._waiters:
                _finish(waiter, changed=True)

    async def until_changed(self, seconds: float) -> bool:
        """Wait until a worker changes, for at most `seconds`. Returns whether one has changed."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        timer = loop.call_later(seconds, partial(_finish, waiter, changed=False))
        self._waiters.append(waiter)
        try:
            return await waiter
        finally:
            self._waiters.remove(waiter)
            timer.cancel()

    @property
    def busy(self) -> int:
        """The number of workers that hold runs."""
        self._update()
        return self._busy

    @property
    def long(self) -> int:
        """The number of workers that hold a long run."""
        if self._changed:
            self._update()
        return self._long

    def first(self) -> int | None:
        """Return the worker with the lowest rank; None if no worker can hold one more run."""
        if self._changed:
            self._update()
        return self._ranks[0][2] if self._ranks else None

    def pass_over(self, worker: int) -> None:
        """Leave a worker out of `first` until it changes."""
        rank, busy, long, seconds = self._held[worker]
        if rank is not None:
            del self._ranks[bisect_left(self._ranks, rank)]
            self._held[worker] = None, busy, long, seconds

    def longest_wait_seconds(self, before: float) -> float:
        """Return an upper bound of `wait_seconds` with `short=False`. Most calls need no more, and it costs less."""
        if self._changed:
            self._update()
        return (before + self._expected_seconds) / self.workers

    def wait_seconds(self, before: float, now: float, *, short: bool) -> float:
        """Return the seconds until a worker begins a call that has `before` seconds of work before it.

        With `short`, only workers without a long run count.
        """
        self._update()
        if not before and self._busy < self.workers:
            return 0.0
        for worker, holding in self._ends_changed.items():
            end, long = (holding.expected_end if holding else None), self._held[worker][2]
            self._ends.set(worker, None if long else end)
            self._long_ends.set(worker, end if long else None)
        self._ends_changed.clear()
        left, count = before + self._ends.seconds_left(now), self.workers
        if short:
            count -= self._long
        else:
            left += self._long_ends.seconds_left(now)
        return left / count if count else math.inf

    def _update(self) -> None:
        all_held, ranks = self._held, self._ranks
        for worker, holding in self._changed.items():
            was_rank, was_busy, was_long, was_seconds = all_held[worker]
            rank, busy, long, seconds = all_held[worker] = holding.held()
            if rank != was_rank:
                if was_rank is not None:
                    del ranks[bisect_left(ranks, was_rank)]
                if rank is not None:
                    insort(ranks, rank)
            self._busy += busy - was_busy
            self._long += long - was_long
            self._expected_seconds += seconds - was_seconds
        self._ends_changed |= self._changed
        self._changed.clear()


def _finish(waiter: "asyncio.Future[bool]", *, changed: bool) -> None:
    if not waiter.done():
        waiter.set_result(changed)
