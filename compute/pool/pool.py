"""The pool: N slots, each filled by a worker process that is replaced when it exits.

A slot's number is what metrics and logs name; processes come and go in it. A worker has two runs at most: the one that
it is in and one staged behind it, so that it finds work when the loop that feeds it is busy elsewhere.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import NamedTuple

from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.compute.call import Call
from unlatch.compute.ipc.arena import InputArena
from unlatch.compute.pool.in_flight import RunListener
from unlatch.compute.pool.recycling import Recycling
from unlatch.compute.pool.slot import Slot

_SWEEP_SECONDS = 10.0
# What a worker may take between two looks is what it can touch in this time: some 100 MB.
_LOOK_SECONDS = 0.1
# While calls that are not long have come within this time, long ones leave the reserved workers to them.
_RESERVED_FOR_SECONDS = 10.0


class Opening(NamedTuple):
    """A slot whose worker can take one run more, and whether that may be a long one."""

    slot: Slot
    takes_long: bool

    def takes(self, _: Call) -> Slot:
        """The slot for a call: it is the same for each."""
        return self.slot


class Pool:
    """The workers of one replica. `reserved_workers` are those that long calls leave to others."""

    def __init__(
        self,
        slots: Sequence[Slot],
        arena: InputArena,
        errors: InternalErrors,
        *,
        reserved_workers: int = 0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._slots = slots
        self._arena = arena
        self._errors = errors
        self._reserved_workers = reserved_workers
        self._clock = clock
        self._last_short = -_RESERVED_FOR_SECONDS
        self._keeping: dict[Slot, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, listener: RunListener) -> None:
        """Fill every slot. Raises StartError, with file and line, when the kernels do not load."""
        loop = asyncio.get_running_loop()
        starts = {slot: loop.create_future() for slot in self._slots}
        self._keeping = {slot: asyncio.create_task(slot.keep(listener, started)) for slot, started in starts.items()}
        # All have started or failed before any failure ends the start: who is still being forked could not be stopped.
        results = await asyncio.gather(*starts.values(), return_exceptions=True)
        for failure in filter(None, results):
            raise failure
        self._tasks = [asyncio.create_task(self._sweep()), asyncio.create_task(self._look_after(listener))]

    @property
    def workers(self) -> int:
        """How many there are, those included that are being replaced."""
        return len(self._slots)

    @property
    def busy_ratio(self) -> float:
        """The share of the workers that have a call now."""
        return sum(slot.runs > 0 for slot in self._slots) / len(self._slots)

    def keeps_some_free(self, now: float) -> bool:
        """Whether some workers are kept free of long calls now: that was asked for, and others have come of late."""
        return self._reserved_workers > 0 and now - self._last_short < _RESERVED_FOR_SECONDS

    def opening(self, now: float) -> Opening | None:
        """The slot with least to do of those that can take one run more; None where none can."""
        roomy = [slot for slot in self._slots if slot.has_room(now)]
        if not roomy:
            return None
        takes_long = not self.keeps_some_free(now) or (
            sum(slot.runs_long for slot in self._slots) < len(self._slots) - self._reserved_workers
        )
        return Opening(roomy[0] if len(roomy) == 1 else min(roomy, key=_load), takes_long)

    def wait_seconds(self, before: float, now: float, *, short: bool) -> float:
        """How long until a worker begins a call that has so many seconds of work before it in the backlog.

        With `short`, of the workers that run no long call.
        """
        left, count, idle = before, 0, False
        for slot in self._slots:
            if not (short and slot.runs_long):
                left += slot.seconds_left(now)
                count += 1
                idle = idle or not slot.runs
        if not count:
            return math.inf
        return 0.0 if idle and not before else left / count

    def run(self, slot: Slot, calls: Sequence[Call], now: float) -> None:
        """Give a slot's worker a call, or several that run as one. Raises ResourceExhausted: no memory for replies."""
        if not calls[0].estimate.long:
            self._last_short = now
        slot.run(calls, now)

    async def stop(self) -> None:
        """Kill every worker, whatever it is doing, and wait until they are gone."""
        for task in self._tasks:
            task.cancel()
        for slot, task in self._keeping.items():
            if not slot.stop():
                task.cancel()
        await asyncio.gather(*self._keeping.values(), return_exceptions=True)

    async def _sweep(self) -> None:
        """Give memory back that has not been used for a while."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            try:
                dropped = self._arena.drop_idle()
            except Exception as error:  # noqa: BLE001 (an entry point's guard: the loop goes on)
                self._errors.caught("sweep", error)
                continue
            for slot in self._slots:
                self._guarded("sweep", partial(slot.sweep, dropped))

    async def _look_after(self, listener: RunListener) -> None:
        """Keep workers to their limits, and replace those that are due: one at a time, so that the others serve."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            for slot in self._slots:
                self._guarded("look_after", slot.look)
            # Workers may have been kept free that need not be any more.
            listener.assign()
            self._guarded("look_after", self._retire_one)

    def _retire_one(self) -> None:
        kept = [slot.recycling for slot in self._slots if slot.recycling is not None and not slot.recycling.retires]
        due = [recycling for recycling in kept if recycling.due]
        if due and len(kept) == len(self._slots):
            min(due, key=_since).retire()

    def _guarded(self, place: str, step: Callable[[], object]) -> None:
        """Do a step of a loop, which goes on whatever comes of the step."""
        try:
            step()
        except Exception as error:  # noqa: BLE001 (an entry point's guard)
            self._errors.caught(place, error)


def _since(recycling: Recycling) -> float:
    return recycling.since


def _load(slot: Slot) -> tuple[int, int]:
    # Of two workers that both run a call, the next is staged behind the one with less to go through.
    held = slot.runs
    return held, slot.bytes if held else 0
