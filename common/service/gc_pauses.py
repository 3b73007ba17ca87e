"""When the garbage collector looks for cycles.

Python's full collection walks every object that there is: 0.3 s of standing still with 10,000 calls waiting, and it
comes again and again while they become more. What calls leave is freed as it is let go of, without the collector; the
few cycles that there are, mostly of failures, can wait until there is little to walk. So young objects are collected as
ever, and all of them when few calls are live, or after so much growth that waiting longer would be a leak.
"""

import asyncio
import gc
from collections.abc import Callable
from types import TracebackType
from typing import Self

_EVERY_SECONDS = 1.0
# So many calls have some ten thousand objects, which take a few milliseconds.
_FEW_CALLS = 200
# A full collection when so many of the middle generation's have found the heap grown: several million objects.
_MIDDLE_COLLECTIONS = 1000


class Collecting:
    """The collector's times while a `with` block lasts. `live` says how many calls there are."""

    def __init__(self, live: Callable[[], int]) -> None:
        self._live = live
        self._timer: asyncio.TimerHandle | None = None
        self._thresholds = gc.get_threshold()

    def __enter__(self) -> Self:
        # What a process has loaded stays: it is not looked at again.
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
        # Nothing has outlived a middle collection: there is nothing new to find.
        if gc.get_count()[2] and self._live() < _FEW_CALLS:
            gc.collect()
        self._schedule()
