"""The pool: N slots, each filled by a worker process that is replaced when it exits.

Metrics and logs name a worker by its slot's number, which stays when the process is replaced. A worker has two runs at
most: the one that it executes, and one staged behind it. So it finds work even while the event loop is busy.
"""

import asyncio
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import NamedTuple

from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.compute.call import Call
from unlatch.compute.ipc.arena import InputArena
from unlatch.compute.pool.occupancy import Occupancy
from unlatch.compute.pool.recycling import Recycling
from unlatch.compute.pool.slot import Slot
from unlatch.compute.pool.worker_runs import RunListener, WorkerRuns

_SWEEP_SECONDS = 10.0
# Between two looks, a worker can take as much memory as it can write to in this time: some 100 MB.
_LOOK_SECONDS = 0.1
# An idle pool is looked at less often, but not never: threads of its workers may still take or free memory.
_IDLE_LOOK_SECONDS = 1.0
# How much of the inputs of ended calls is overwritten at each look: 40 MiB a second, in 0.4 ms at a time.
_WIPED_BYTES = 4 * 1024 * 1024
# If a worker was given a call that is not long within this time, long calls leave the reserved workers free.
_RESERVED_FOR_SECONDS = 10.0
# Longer than _RESERVED_FOR_SECONDS: in a pool that was idle for this time no call waits for a reserved worker, and the
# workers have given back freed memory.
_IDLE_AFTER_SECONDS = 12.0


class Opening(NamedTuple):
    """The runs in flight of the worker that takes the next run, and whether that run may be a long one."""

    in_flight: WorkerRuns
    takes_long: bool

    def kinds(self, _: Collection[Hashable]) -> set[Hashable]:
        """Return the kinds of calls that find room: whether they are long (`by_length`)."""
        return {False, True} if self.takes_long else {False}

    def takes(self, _: Call) -> WorkerRuns:
        """Return the same worker for every call."""
        return self.in_flight


class Pool:
    """The workers of one replica. `reserved_workers` are those that long calls leave to others."""

    def __init__(
        self,
        slots: Sequence[Slot],
        occupancy: Occupancy,
        arena: InputArena,
        errors: InternalErrors,
        *,
        reserved_workers: int = 0,
    ) -> None:
        self._slots = slots
        self._occupancy = occupancy
        self._arena = arena
        self._errors = errors
        self._reserved_workers = reserved_workers
        self._workers_for_long = occupancy.workers - reserved_workers
        self._last_short = -_RESERVED_FOR_SECONDS
        self._keeping: dict[Slot, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, listener: RunListener) -> None:
        """Fill every slot. Raises StartError, with file and line, when the kernels do not load."""
        loop = asyncio.get_running_loop()
        starts = {slot: loop.create_future() for slot in self._slots}
        self._keeping = {slot: asyncio.create_task(slot.keep(listener, started)) for slot, started in starts.items()}
        # Wait for all starts before a failure is raised: a worker that is still being forked could not be stopped.
        results = await asyncio.gather(*starts.values(), return_exceptions=True)
        for failure in filter(None, results):
            raise failure
        self._tasks = [asyncio.create_task(self._look_after(listener))]

    @property
    def workers(self) -> int:
        """The number of workers, including those that are being replaced."""
        return len(self._slots)

    @property
    def busy_ratio(self) -> float:
        """The share of the workers that have a call now."""
        return self._occupancy.busy / len(self._slots)

    async def until_changed(self, seconds: float) -> bool:
        """Wait until a worker changes (see `Occupancy.changed`), for at most `seconds`. Returns whether one has."""
        return await self._occupancy.until_changed(seconds)

    def keeps_some_free(self, now: float) -> bool:
        """Whether some workers are kept free of long calls: if some are reserved, and short calls came lately."""
        return self._reserved_workers > 0 and now - self._last_short < _RESERVED_FOR_SECONDS

    def opening(self, now: float) -> Opening | None:
        """Return the worker with the least to do among those that can take a run; None if no worker can."""
        while (worker := self._occupancy.first()) is not None:
            in_flight = self._slots[worker].in_flight
            if in_flight is not None and in_flight.has_room(now):
                takes_long = self._occupancy.long < self._workers_for_long or not self.keeps_some_free(now)
                return Opening(in_flight, takes_long)
            # The worker's process is ending, its run has taken long, or no caller waits for that run any more.
            self._occupancy.pass_over(worker)
        return None

    def wait_seconds(self, before: float, now: float, *, short: bool) -> float:
        """Return the seconds until a worker begins a call that has `before` seconds of work before it in the backlog.

        With `short`, only workers without a long call count.
        """
        return self._occupancy.wait_seconds(before, now, short=short)

    def longest_wait_seconds(self, before: float) -> float:
        """Return an upper bound of `wait_seconds` with `short=False`. Most calls need no more, and it costs less."""
        return self._occupancy.longest_wait_seconds(before)

    def run(self, in_flight: WorkerRuns, calls: Sequence[Call], now: float) -> None:
        """Give a worker a call, or several that run as one. Raises ResourceExhausted: no memory for replies."""
        if not calls[0].estimate.long:
            self._last_short = now
        in_flight.run(calls, now)

    def sweep(self, dropped_inputs: Sequence[int]) -> None:
        """Tell all workers to unmap input segments that are gone, and reply segments that were unused for a while."""
        for slot in self._slots:
            with self._errors.guarded("sweep"):
                slot.sweep(dropped_inputs)

    async def stop(self) -> None:
        """Kill every worker, whatever it is doing, and wait until they are gone."""
        for task in self._tasks:
            task.cancel()
        for slot, task in self._keeping.items():
            if not slot.stop():
                task.cancel()
        await asyncio.gather(*self._keeping.values(), return_exceptions=True)

    async def _look_after(self, listener: RunListener) -> None:
        """Keep workers to their limits, and replace those that are due: one at a time, so that the others serve.

        Overwrite the inputs of ended calls.
        """
        idle_seconds = 0.0
        while True:
            if idle_seconds < _IDLE_AFTER_SECONDS:
                await asyncio.sleep(_LOOK_SECONDS)
                idle_seconds = 0.0 if self._occupancy.busy else idle_seconds + _LOOK_SECONDS
            elif await self._occupancy.until_changed(_IDLE_LOOK_SECONDS):
                idle_seconds = 0.0
            for slot in self._slots:
                with self._errors.guarded("look_after"):
                    slot.look()
            # Workers may have been kept free that need not be any more.
            listener.assign()
            with self._errors.guarded("look_after"):
                self._retire_one()
            with self._errors.guarded("look_after"):
                if self._arena.wipe(_WIPED_BYTES):
                    idle_seconds = 0.0

    def _retire_one(self) -> None:
        kept = [slot.recycling for slot in self._slots if slot.recycling is not None and not slot.recycling.retires]
        due = [recycling for recycling in kept if recycling.due]
        if due and len(kept) == len(self._slots):
            min(due, key=_since).retire()


def _since(recycling: Recycling) -> float:
    return recycling.since


async def sweep(arena: InputArena, pools: Callable[[], Iterable[Pool]], errors: InternalErrors) -> None:
    """Give memory back that has not been used for a while, every ten seconds. `pools` are those of all its workers."""
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        dropped: list[int] = []
        with errors.guarded("sweep"):
            dropped = arena.drop_idle()
        for pool in pools():
            pool.sweep(dropped)
