"""The window: what a replica lets this gateway have unanswered, and what it reports of itself.

Where calls go is decided by both. A call that waits at a replica can go nowhere else. So the window is counted in
calls, in bytes, and in predicted run time: as much as keeps the workers busy. Calls are of three kinds there, and no
kind takes another's room:

    short       the least that keeps every worker busy, or else so many seconds of work, whichever is more calls
    long        a few more than can run, since nothing is staged behind one
    batched     of which several run as one: the same, where the least are full batches

Calls for async workers have a window of their own (gateway/fleet/async_window.py).
"""

from time import monotonic

from unlatch.common.rates import MovingMean
from unlatch.common.waiting.demand import Estimate
from unlatch.gateway.fleet.async_window import AsyncWindow
from unlatch.protos.unlatch_pb2 import Load, Welcome

# Until the first report on a lane: a replica of a version that makes none has no window but its welcome's.
_UNREPORTED = Load(workers=1, least_calls=2**32 - 1, long_calls=2**32 - 1)
# The weight of one run in how fast a replica is thought to be; it counts for at most this many times the expectation.
_WEIGHT, _MAX_TIMES = 0.05, 10.0
# Where all workers are busy, and nothing waits, a run has half of itself before it.
_RESIDUAL = 0.5
# Runs are overdue when they have taken this many times the expected time, and as much longer as an event loop is late
# on a busy machine.
_MAX_RUNS, _LATE_SECONDS = 2.0, 0.025


class Window:
    """The window of one replica. `calls` are this gateway's calls that it has not answered.

    Those of them that are for async workers count in bytes and in `of_async`, and in nothing else here.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.of_async = AsyncWindow()
        self._worker_calls = 0
        # Seconds since its last message, where reports are missing: its report is older by as much.
        self.silent_seconds = 0.0
        # When a call of it last ended, or one was sent while it had none.
        self._progress_at = 0.0
        self._slowness = MovingMean(_WEIGHT, start=1.0)
        self._granted = Welcome()
        self._short_calls = self._long_calls = self._batched_calls = self._bytes = 0
        # Expected seconds of its short calls, of its batched ones, and of all; and of all when it last reported.
        self._short_seconds = self._batched_seconds = self._seconds = self._seconds_reported = 0.0
        self.hear(None)

    @property
    def slowness(self) -> float:
        """The run time on this replica, divided by the mean run time of the fleet."""
        return self._slowness.value

    def grant(self, welcome: Welcome) -> None:
        """Take the calls and bytes that it grants from now on."""
        self._granted = welcome

    def hear(self, load: Load | None) -> None:
        """Take in a report, in the form that is read for every call; None where a new lane has made none yet."""
        load = _UNREPORTED if load is None else load
        self.silent_seconds = 0.0
        self.workers = max(1, load.workers)
        self.utilization = load.utilization
        self.long_seconds = load.long_microseconds / 1e6 or float("inf")
        # 0 where it does not say when the next report comes.
        self.interval_seconds = load.interval_milliseconds / 1e3
        self._wait_seconds = load.wait_microseconds / 1e6
        self._short_wait_seconds = load.short_wait_microseconds / 1e6
        self._least_calls, self._most_long_calls = load.least_calls, load.long_calls
        self._most_seconds = load.window_microseconds / 1e6
        self._seconds_reported, self._calls_reported = self._seconds, self._worker_calls
        self.of_async.hear(load)

    def has_room(self, size: int, estimate: Estimate) -> bool:
        """Whether a call of `size` bytes fits. A call that is larger than the whole window goes alone."""
        granted = self._granted
        if self.calls >= granted.window_calls or (self.calls and self._bytes + size > granted.window_bytes):
            return False
        if estimate.beside is not None:
            return self.of_async.has_room(estimate.beside)
        if estimate.together > 1:
            least, calls, seconds = self._least_calls * estimate.together, self._batched_calls, self._batched_seconds
        elif estimate.long:
            return self._long_calls < self._most_long_calls
        else:
            least, calls, seconds = self._least_calls, self._short_calls, self._short_seconds
        return calls < least or seconds * self._slowness.value < self._most_seconds

    def wait_seconds(self, *, long: bool = False) -> float:
        """Seconds that a new call would wait there: as reported, and by what has been sent and answered since."""
        reported = self._wait_seconds if long else self._short_wait_seconds
        if not reported and self._worker_calls < self.workers:
            return 0.0
        return max(0.0, reported + (self._seconds - self._seconds_reported) * self._slowness.value / self.workers)

    def wait_seconds_of(self, estimate: Estimate) -> float:
        """Seconds that a new call with this estimate would wait there."""
        return self.of_async.wait_seconds if estimate.beside is not None else self.wait_seconds(long=estimate.long)

    def slowness_of(self, estimate: Estimate) -> float:
        """How many times longer such a run takes here than elsewhere. How long a function waits, no replica decides."""
        return 1.0 if estimate.beside is not None else self._slowness.value

    def expected_seconds(self, estimate: Estimate, *, has_room: bool) -> float:
        """Seconds until a call that is sent there, now or when there is room, would be done, to compare replicas."""
        if estimate.beside is not None:
            taken = self.of_async.taken_ratio(estimate.beside)
            return self.wait_seconds_of(estimate) + self.silent_seconds + estimate.run_seconds * (1 + taken)
        run = estimate.seconds * self._slowness.value
        # Without its own calls since then, a gateway would send all that it has until the next report to one replica.
        busy = self.utilization + (self._worker_calls - self._calls_reported) / self.workers
        wait = self.wait_seconds(long=estimate.long) + self.silent_seconds
        if not has_room or self._worker_calls >= self.workers:
            wait += self._overdue_seconds(estimate)
        return wait + run * (1 + _RESIDUAL * min(max(busy, 0.0), 1.0))

    def take(self, size: int, estimate: Estimate) -> None:
        """Count a call of `size` bytes that is sent."""
        if not self._worker_calls and estimate.beside is None:
            self._progress_at = monotonic()
        self._count(1, size, estimate)

    def give_back(self, size: int, estimate: Estimate) -> None:
        """Count a call that was sent as ended. Size and estimate are those that it was counted with."""
        if estimate.beside is None:
            self._progress_at = monotonic()
        self._count(-1, size, estimate)
        if not self._worker_calls:
            # Sums of fractions drift.
            self._seconds = self._short_seconds = self._batched_seconds = 0.0

    def ran(self, expected_seconds: float, seconds: float) -> None:
        """Learn from a run that took `seconds`, and was expected to take others by what the whole fleet's runs take."""
        times = min(_MAX_TIMES, max(1 / _MAX_TIMES, seconds / expected_seconds))
        self._slowness.add(times)

    def _overdue_seconds(self, estimate: Estimate) -> float:
        """Seconds for which no call has ended there, beyond twice the expected time of what runs there.

        A run that takes longer than all before it is expected to end at any moment, so the reports do not show it.
        """
        expected = max(estimate.seconds, self._seconds / self.workers) * self._slowness.value
        return max(0.0, monotonic() - self._progress_at - _MAX_RUNS * expected - _LATE_SECONDS)

    def _count(self, sign: int, size: int, estimate: Estimate) -> None:
        seconds, long, together, beside = estimate
        self.calls += sign
        self._bytes += sign * size
        if beside is not None:
            self.of_async.count(sign, beside)
            return
        self._worker_calls += sign
        self._seconds += sign * seconds
        if together > 1:
            self._batched_calls += sign
            self._batched_seconds += sign * seconds
        elif long:
            self._long_calls += sign
        else:
            self._short_calls += sign
            self._short_seconds += sign * seconds
