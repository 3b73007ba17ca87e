"""Control over the times at which the garbage collector looks for cycles.

Python's full collection walks every object: with 10,000 calls waiting it stops the process for 0.3 s, again and again
while their number grows. What calls leave is freed at once by reference counting, without the collector. The few
cycles, mostly of failures, can wait until there is little to walk. So young objects are collected as usual, and all
objects only while few calls are live, or after so much growth that waiting longer would be a leak.
"""

import asyncio
import gc
from collections.abc import Callable
from types import TracebackType
from typing import Self

_EVERY_SECONDS = 1.0
# The objects of this many calls, some ten thousand, take a few milliseconds.
_FEW_CALLS = 200
# A full collection comes after this many middle ones that found the heap grown: several million objects.
_MIDDLE_COLLECTIONS = 1000


class GcPauses:
    """Times full collections while a `with` block lasts. `live` returns the number of live calls."""

    def __init__(self, live: Callable[[], int]) -> None:
        self._live = live
        self._timer: asyncio.TimerHandle | None = None
        self._thresholds = gc.get_threshold()

    def __enter__(self) -> Self:
        # Objects that exist at the start stay for ever, so no collection looks at them again.
        gc.collect()
        gc.freeze()
        young, middle, _ = self._thresholds
        gc.set_threshold(young, middle, _MIDDLE_COLLECTIONS)
        self._schedule()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        gc.set_threshold(*self._thresholds)
        gc.unfreeze()

    def _schedule(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_EVERY_SECONDS, self._look)

    def _look(self) -> None:
        # Without objects that outlived a middle collection, a full one would find nothing.
        if gc.get_count()[2] and self._live() < _FEW_CALLS:
            gc.collect()
        self._schedule()
