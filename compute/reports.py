"""Reports of a replica's load on every lane: how long calls would wait, and how many may be sent ahead.

A gateway that knew nothing of the backlog here would send all it has, and a call that waits here can go nowhere else.
So a lane's window is no larger than keeps the workers busy: what each has in flight (one run, one staged), or else so
many seconds of work as pass between a reply and the call that takes its place. Lanes that have calls share it.

The reports are a replica's heartbeat, too: each says when the next one comes at the latest.
"""

import asyncio
import math

from unlatch.common.lane.lanes import Lanes
from unlatch.common.rates import MovingMean
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.compute.dispatch.dispatcher import Dispatcher
from unlatch.compute.pool.pool import Pool
from unlatch.compute.settings import ComputeSettings
from unlatch.protos.unlatch_pb2 import Load

# How often it is looked at, and by how much a wait is another that is told before its time.
_LOOK_SECONDS = 0.025
_CHANGED_SECONDS = 0.02
_CHANGED_TIMES = 1.5
# A worker has one call that it runs and one staged. Behind a long one none is staged: of those one more than run, and
# one for every so many workers, is on its way.
_IN_HAND = 2
_WORKERS_A_LONG_CALL_AHEAD = 16
# How much a look counts in what was busy of late.
_WEIGHT = 0.05
# What is told of a wait that has no end.
_LONGEST_WAIT_SECONDS = 3600.0


class Reports:
    """How the pool stands, for the callers of its lanes."""

    def __init__(self, pool: Pool, dispatcher: Dispatcher, settings: ComputeSettings, errors: InternalErrors) -> None:
        self._pool = pool
        self._errors = errors
        self._dispatcher = dispatcher
        self._settings = settings
        self._utilization = MovingMean(_WEIGHT, start=0.0)
        self._told = self._wait_seconds
        # In the time of a report, and since the last one.
        self._looks = max(1, math.floor(settings.report_seconds / _LOOK_SECONDS))
        self._looked = 0

    def load(self, lanes: int) -> Load:
        """The report, for each of so many lanes that have calls."""
        settings, workers = self._settings, self._pool.workers
        long_workers = workers - settings.workers_reserved
        long_calls = long_workers + 1 + long_workers // _WORKERS_A_LONG_CALL_AHEAD
        return Load(
            wait_microseconds=_microseconds(self._wait_seconds),
            short_wait_microseconds=_microseconds(self._dispatcher.wait_seconds(short=True)),
            waiting=len(self._dispatcher),
            workers=workers,
            utilization=self._utilization.value,
            least_calls=_share(_IN_HAND * workers, lanes),
            window_microseconds=_microseconds(settings.ahead_seconds * workers / lanes),
            long_microseconds=_microseconds(settings.long_call_seconds),
            long_calls=_share(long_calls, lanes),
            interval_milliseconds=round(settings.report_seconds * 1e3),
        )

    @property
    def look_seconds(self) -> float:
        """How long until the next look."""
        return self._settings.report_seconds / self._looks

    def is_due(self) -> bool:
        """Look at the pool: whether a report is to be made now."""
        self._utilization.add(self._pool.busy_ratio)
        self._looked += 1
        if self._looked < self._looks and not self._has_changed():
            return False
        self._looked, self._told = 0, self._wait_seconds
        return True

    async def run(self, lanes: Lanes) -> None:
        """Report on every lane, for ever: every so often, and sooner when waiting has become another matter."""
        while True:
            await asyncio.sleep(self.look_seconds)
            try:
                if self.is_due():
                    lanes.report()
            except Exception as error:  # noqa: BLE001 (an entry point's guard: the loop goes on)
                self._errors.caught("report", error)

    @property
    def _wait_seconds(self) -> float:
        return self._dispatcher.wait_seconds(short=False)

    def _has_changed(self) -> bool:
        low, high = sorted((self._told, self._wait_seconds))
        return high - low > _CHANGED_SECONDS and high > _CHANGED_TIMES * low


def _share(calls: int, lanes: int) -> int:
    """Return the share of `calls` of each lane: at least one."""
    return max(1, math.ceil(calls / lanes))


def _microseconds(seconds: float) -> int:
    return round(min(seconds, _LONGEST_WAIT_SECONDS) * 1e6)
