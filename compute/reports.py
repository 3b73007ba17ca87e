"""Reports of a replica's load on every lane: how long calls would wait, and how many may be sent ahead.

Without reports a gateway would send all its calls, and a call that waits here cannot go to another replica. So all
lanes together have a window that just keeps the workers busy: two calls for each worker (one running, one staged), or
as many seconds of work as pass between a reply and the next call. Lanes that have calls share it.

The reports are also the replica's heartbeat: each says when the next one comes at the latest.
"""

import asyncio
import math
from collections.abc import Callable

from unlatch.common.lane.lanes import Lanes
from unlatch.common.rates import MovingMean
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.compute.dispatch.dispatcher import Dispatcher
from unlatch.compute.pool.pool import Pool
from unlatch.compute.settings import ComputeSettings
from unlatch.protos.unlatch_pb2 import Load

# How often the pool is looked at, and by how much a wait must change to be reported before its time.
_LOOK_SECONDS = 0.025
_CHANGED_SECONDS = 0.02
_CHANGED_TIMES = 1.5
# A worker has one call that it runs and one staged. No call is staged behind a long one: of long calls, one more than
# there are workers may be sent, and one more for each of so many workers.
_IN_HAND = 2
_WORKERS_A_LONG_CALL_AHEAD = 16
# The weight of one look in the utilisation, and a utilisation that counts as none.
_WEIGHT = 0.05
_NO_UTILIZATION = 0.005
# Reported for a wait without an end.
_LONGEST_WAIT_SECONDS = 3600.0


class Reports:
    """Makes reports of the pool's load for the callers of its lanes.

    `of_async` returns the number of async workers, and how many seconds a new call would wait for one.
    """

    def __init__(
        self,
        pool: Pool,
        dispatcher: Dispatcher,
        settings: ComputeSettings,
        errors: InternalErrors,
        of_async: Callable[[], tuple[int, float]] = lambda: (0, 0.0),
    ) -> None:
        self._pool = pool
        self._errors = errors
        self._dispatcher = dispatcher
        self._settings = settings
        self._of_async = of_async
        self._utilization = MovingMean(_WEIGHT, start=0.0)
        self._told = self._wait_seconds
        # Looks between two reports, and since the last report.
        self._looks = max(1, math.floor(settings.report_seconds / _LOOK_SECONDS))
        self._looked = 0

    def load(self, lanes: int) -> Load:
        """Make a report for each of `lanes` lanes that have calls."""
        settings, workers = self._settings, self._pool.workers
        long_workers = workers - settings.workers_reserved
        long_calls = long_workers + 1 + long_workers // _WORKERS_A_LONG_CALL_AHEAD
        async_workers, async_wait_seconds = self._of_async()
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
            async_workers=async_workers / lanes,
            async_wait_microseconds=_microseconds(async_wait_seconds),
        )

    @property
    def look_seconds(self) -> float:
        """The seconds until the next look."""
        return self._settings.report_seconds / self._looks

    def is_due(self) -> bool:
        """Look at the pool. Returns whether a report is due."""
        self._utilization.add(self._pool.busy_ratio)
        self._looked += 1
        if self._looked < self._looks and not self._has_changed():
            return False
        self._looked, self._told = 0, self._wait_seconds
        return True

    async def run(self, lanes: Lanes) -> None:
        """Report on every lane, for ever: at the set interval, and sooner if the wait has changed much."""
        while True:
            await self._next_look()
            try:
                if self.is_due():
                    lanes.report()
            except Exception as error:  # noqa: BLE001 (an entry point's guard: the loop goes on)
                self._errors.caught("report", error)

    async def _next_look(self) -> None:
        """Wait until the next look is due. In an idle pool that is the time of a report, or of the next run."""
        if len(self._dispatcher) or self._pool.busy_ratio or self._utilization.value > _NO_UTILIZATION:
            await asyncio.sleep(self.look_seconds)
        else:
            time = asyncio.get_running_loop().time
            began = time()
            await self._pool.until_changed((self._looks - self._looked) * self.look_seconds)
            # The look that follows counts as one.
            self._looked += max(0, round((time() - began) / self.look_seconds) - 1)

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
