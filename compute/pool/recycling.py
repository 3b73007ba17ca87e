"""Recycling: how much memory a worker has taken, and whether the worker is replaced.

    look()  ten times a second:  over the limit, or grown    ──> Shrink ──> Shrunk: still so?  ──> retires, or is due
                                 far over it by a run        ──> the run ends RESOURCE_EXHAUSTED, the worker is killed
                                 has run recycle_calls calls ──> due

The pool lets workers that are due retire, one at a time. A worker that retires is given no more runs, and is killed
when it has no run. No call is lost by that.
"""

from contextlib import suppress
from time import monotonic

from unlatch.compute.ipc.frames import Shrink, Shrunk
from unlatch.compute.ipc.memory_limits import Footprint, MemoryLimits
from unlatch.compute.pool import exits
from unlatch.compute.pool.exits import Exit
from unlatch.compute.pool.process import WorkerProcess
from unlatch.compute.pool.worker_runs import WorkerRuns

# RLIMIT_DATA stops a worker at its limit. A worker that exceeds the limit by this factor has evaded RLIMIT_DATA.
_FAR_OVER = 1.1
# A worker that was refused memory, and still uses more than this part of its limit, may be refused it again and again.
_TOO_MUCH_IN_USE = 0.5
# Shrinking costs the next call page faults, so a worker is not asked more often than this.
_ASKED_EVERY_SECONDS = 2.0


class Recycling:
    """Memory limits and replacement of a worker process that is ready. Raises OSError if it has ended already."""

    def __init__(self, process: WorkerProcess, in_flight: WorkerRuns, limits: MemoryLimits) -> None:
        self._process = process
        self._in_flight = in_flight
        self._limits = limits
        self._footprint = Footprint(process.pid)
        try:
            self._start = self._footprint.read()
        except OSError:
            self._footprint.close()
            raise
        self.since = monotonic()
        # Memory that the worker has taken since it was ready: its own pages in RAM.
        self.taken_bytes = 0
        # Why the worker is to be replaced; None if it is not.
        self.due: Exit | None = None
        self._asked = -_ASKED_EVERY_SECONDS
        # How many calls the worker had ended at the last look, and how much memory it may take before its run is ended.
        self._calls = 0
        self._tolerated_bytes = limits.memory_bytes * _FAR_OVER

    @property
    def retires(self) -> bool:
        """Whether the worker is given no more runs, and is killed once it has none."""
        return not self._in_flight.accepts

    def look(self) -> None:
        """Read how much memory the worker has taken, and act on it."""
        if self._process.ending:
            return
        # The worker's last run may have been taken out before it was sent. No reply follows that.
        self.rested()
        with suppress(OSError):  # the worker has just ended, and its exit follows
            self.taken_bytes = max(0, self._footprint.read().resident - self._start.resident)
        if self._limits.memory_bytes and self.taken_bytes > self._tolerated_bytes and self._in_flight:
            self._far_over()
        elif (self._is_over(self.taken_bytes) or self._has_grown(self.taken_bytes)) and not self.retires:
            self._ask_to_shrink()
        if self._limits.recycle_calls and self._in_flight.calls >= self._limits.recycle_calls:
            self.due = self.due or exits.HAS_RUN
        self._calls = self._in_flight.calls

    def shrunk(self, left: Shrunk) -> None:
        """Decide on the worker after it has freed what it could: `left` is the memory that it still has."""
        if self._process.ending:
            return
        limit = self._limits.memory_bytes
        left_bytes = left.resident_bytes - self._start.resident
        in_use = left.data_bytes - self._start.data
        if self._is_over(left_bytes) or (limit and left.ran_short and in_use > limit * _TOO_MUCH_IN_USE):
            self.due = exits.OVER_LIMIT
            self.retire()
        elif self._has_grown(left_bytes):
            self.due = self.due or exits.GROWN

    def retire(self) -> None:
        """Give the worker no more runs, and kill it once it has none."""
        self._in_flight.accepts = False
        self.rested()

    def rested(self) -> None:
        """End the worker now if it retires, is due and holds no run."""
        if self.retires and self.due and not self._in_flight:
            self._process.end(self.due)

    def close(self) -> None:
        """Close the files of the process, which has exited."""
        self._footprint.close()

    def _far_over(self) -> None:
        if self._in_flight.calls == self._calls:
            limit = self._limits.memory_bytes
            told = f"took {self.taken_bytes} bytes of memory, more than a worker may have: worker_memory_bytes={limit}"
            self._in_flight.refuse(told, exits.OVER_LIMIT)
        else:
            # A run that has ended since the last look may have taken it. The present run is to blame only for more.
            self._tolerated_bytes = self.taken_bytes * _FAR_OVER
            self.due = exits.OVER_LIMIT
            self.retire()

    def _ask_to_shrink(self) -> None:
        if monotonic() - self._asked >= _ASKED_EVERY_SECONDS:
            self._asked = monotonic()
            self._process.send(Shrink())

    def _is_over(self, taken_bytes: int) -> bool:
        return 0 < self._limits.memory_bytes < taken_bytes

    def _has_grown(self, taken_bytes: int) -> bool:
        return 0 < self._limits.recycle_growth_bytes < taken_bytes
