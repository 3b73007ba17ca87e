"""The pool: N slots, each filled by a worker process that is replaced when it ends.

A slot's number is what metrics and logs name; processes come and go in it. A worker has two runs in hand at most: the
one it is in and one staged behind it, so that it finds work when the loop that feeds it is busy elsewhere.
"""

import asyncio
import math
from collections.abc import Sequence
from time import monotonic

from unlatch.compute.call import Call
from unlatch.compute.dispatch.queue import Queue
from unlatch.compute.ipc.arena import InputArena
from unlatch.compute.pool.recycling import Upkeep
from unlatch.compute.pool.slot import Slot

_SWEEP_SECONDS = 10.0
# What a worker may take before anybody looks is what it can touch in this time: some 100 MB.
_LOOK_SECONDS = 0.1
# While calls that are not long have come within this time, long ones leave the reserved workers to them.
_RESERVED_FOR_SECONDS = 10.0


class Pool:
    """The workers of one replica. `reserved_workers` are those that long calls leave to others."""

    def __init__(self, slots: Sequence[Slot], arena: InputArena, queue: Queue, reserved_workers: int) -> None:
        self._slots = slots
        self._arena = arena
        self._queue = queue
        self._reserved_workers = reserved_workers
        self._last_short = -_RESERVED_FOR_SECONDS
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Fill every slot. Raises StartError, with file and line, when the kernels do not load."""
        # All have started or failed before any failure ends the start: who is still being forked could not be stopped.
        results = await asyncio.gather(*(slot.start() for slot in self._slots), return_exceptions=True)
        for failure in filter(None, results):
            raise failure
        self._tasks = [asyncio.create_task(self._sweep()), asyncio.create_task(self._look_after())]

    @property
    def workers(self) -> int:
        """How many there are, those included that are being replaced."""
        return len(self._slots)

    @property
    def busy_ratio(self) -> float:
        """What part of them has a call in hand now."""
        return sum(slot.in_hand > 0 for slot in self._slots) / len(self._slots)

    @property
    def keeps_some_free(self) -> bool:
        """Whether some workers are kept free of long calls now: that was asked for, and others have come of late."""
        return self._reserved_workers > 0 and monotonic() - self._last_short < _RESERVED_FOR_SECONDS

    def has_room(self, *, long: bool) -> bool:
        """Whether some worker can take one more call in hand; a long one, where workers are kept free of those."""
        if long and self.keeps_some_free:
            most = len(self._slots) - self._reserved_workers
            return sum(slot.runs_long for slot in self._slots) < most and any(slot.has_room for slot in self._slots)
        return any(slot.has_room for slot in self._slots)

    def wait_seconds(self, before: float, *, short: bool) -> float:
        """How long until a worker begins a call that has so many seconds of work before it in the queue.

        With `short`, of the workers that run no long call.
        """
        now, left, count, idle = monotonic(), before, 0, False
        for slot in self._slots:
            if not (short and slot.runs_long):
                left += slot.seconds_left(now)
                count += 1
                idle = idle or not slot.in_hand
        if not count:
            return math.inf
        return 0.0 if idle and not before else left / count

    def run(self, calls: Sequence[Call]) -> None:
        """Give a call, or several that run as one, to the worker with least in hand."""
        if not calls[0].estimate.long:
            self._last_short = monotonic()
        min((slot for slot in self._slots if slot.has_room), key=_in_hand).run(calls)

    def abandon(self, call: Call) -> None:
        """Nobody waits for a call any more that was given to a worker: its core is wanted back."""
        for slot in self._slots:
            slot.abandon(call)

    async def stop(self) -> None:
        """End every worker, whatever it is doing, and wait until they are gone."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(slot.stop() for slot in self._slots))

    async def _sweep(self) -> None:
        """Give memory back that has not been used for a while."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            dropped = self._arena.drop_idle()
            for slot in self._slots:
                slot.sweep(dropped)

    async def _look_after(self) -> None:
        """Keep workers to their limits, and replace those that are due: one at a time, so that the others serve."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            for slot in self._slots:
                slot.look()
            # Workers may have been kept free that need not be any more.
            self._queue.pump()
            kept = [slot.upkeep for slot in self._slots if slot.upkeep is not None and not slot.upkeep.retires]
            due = [upkeep for upkeep in kept if upkeep.due]
            if due and len(kept) == len(self._slots):
                min(due, key=_since).retire()


def _since(upkeep: Upkeep) -> float:
    return upkeep.since


def _in_hand(slot: Slot) -> tuple[int, int]:
    # Of two workers that both run a call, the next is staged behind the one with less to go through.
    held = slot.in_hand
    return held, slot.bytes_in_hand if held else 0
