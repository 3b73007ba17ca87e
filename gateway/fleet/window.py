"""What a replica lets this gateway have unanswered, and what it says of itself: where calls go is decided by them.

A call that waits at a replica can go nowhere else. So its window is counted in calls, in bytes, and in predicted run
time: as much as keeps its workers busy. Calls are of three kinds there, and none takes another's room:

    short       the least that keeps every worker busy, or else so many seconds of work, whichever is more calls
    long        a few more than can run, since nothing is staged behind one
    batched     of which several run as one: the same, where the least are full batches
"""

from typing import Protocol

from unlatch.common.lane.body import Body
from unlatch.protos.unlatch_pb2 import Load, Welcome

# Until the first report on a lane: a replica of a version that makes none has no window but its welcome's.
_UNREPORTED = Load(workers=1, least_calls=2**32 - 1, long_calls=2**32 - 1)
# A run counts for so much of how fast a replica is thought to be, and for no more than so many times what was expected.
_NEWS, _MOST_TIMES = 0.05, 10.0
# Where all workers are busy, and nothing waits, a run has half of itself before it.
_RESIDUAL = 0.5


class Held(Protocol):
    """A call that takes room."""

    body: Body
    # What it is expected to take on a replica of the fleet's mean speed, whether that is long, and how many calls of
    # its kernel may run as one. They stay as they are while it is on its way.
    cost_seconds: float
    long: bool
    together: int


class Window:
    """Of one replica; `calls` are this gateway's that it has not answered."""

    def __init__(self) -> None:
        self.calls = 0
        # How long runs take there, over what they take on the mean of the fleet.
        self.slowness = 1.0
        self._granted = Welcome()
        self._short_calls = self._long_calls = self._batched_calls = self._bytes = 0
        # Expected of its short calls, of its batched ones, and of all; and of all when it last reported.
        self._short_seconds = self._batched_seconds = self._seconds = self._seconds_reported = 0.0
        self.hear(None)

    def grant(self, welcome: Welcome) -> None:
        """What it grants from now on."""
        self._granted = welcome

    def hear(self, load: Load | None) -> None:
        """Take a report in, kept as what is asked for every call; None where a new lane has made none yet."""
        load = _UNREPORTED if load is None else load
        self.workers = max(1, load.workers)
        self.utilization = load.utilization
        self.long_seconds = load.long_microseconds / 1e6 or float("inf")
        # 0 where it does not say when the next report comes.
        self.interval_seconds = load.interval_milliseconds / 1e3
        self._wait_seconds = load.wait_microseconds / 1e6
        self._short_wait_seconds = load.short_wait_microseconds / 1e6
        self._least_calls, self._most_long_calls = load.least_calls, load.long_calls
        self._most_seconds = load.window_microseconds / 1e6
        self._seconds_reported, self._calls_reported = self._seconds, self.calls

    def has_room(self, size: int, *, long: bool, together: int) -> bool:
        """Whether a call of `size` bytes fits. One that is larger than the whole window goes alone."""
        granted = self._granted
        if self.calls >= granted.window_calls or (self.calls and self._bytes + size > granted.window_bytes):
            return False
        if together > 1:
            least, calls, seconds = self._least_calls * together, self._batched_calls, self._batched_seconds
        elif long:
            return self._long_calls < self._most_long_calls
        else:
            least, calls, seconds = self._least_calls, self._short_calls, self._short_seconds
        return calls < least or seconds * self.slowness < self._most_seconds

    def wait_seconds(self, *, long: bool = False) -> float:
        """How long a new call would wait there: as reported, and by what has been sent and answered since."""
        reported = self._wait_seconds if long else self._short_wait_seconds
        if not reported and self.calls < self.workers:
            return 0.0
        return max(0.0, reported + (self._seconds - self._seconds_reported) * self.slowness / self.workers)

    def expected_seconds(self, call: Held) -> float:
        """How long until a call that is sent there now is done, by which replicas are compared."""
        run = call.cost_seconds * self.slowness
        # Without its own calls since then, a gateway would send all that it has until the next report to one replica.
        busy = self.utilization + (self.calls - self._calls_reported) / self.workers
        return self.wait_seconds(long=call.long) + run * (1 + _RESIDUAL * min(max(busy, 0.0), 1.0))

    def take(self, call: Held) -> None:
        """A call is sent."""
        self._count(call, 1)

    def give_back(self, call: Held) -> None:
        """A call that was sent has ended."""
        self._count(call, -1)
        if not self.calls:
            # Sums of fractions drift.
            self._seconds = self._short_seconds = self._batched_seconds = 0.0

    def ran(self, expected_seconds: float, seconds: float) -> None:
        """A run took so long, and was expected to take so long by what the whole fleet's runs take."""
        times = min(_MOST_TIMES, max(1 / _MOST_TIMES, seconds / expected_seconds))
        self.slowness += (times - self.slowness) * _NEWS

    def _count(self, call: Held, sign: int) -> None:
        self.calls += sign
        self._bytes += sign * call.body.size
        self._seconds += sign * call.cost_seconds
        if call.together > 1:
            self._batched_calls += sign
            self._batched_seconds += sign * call.cost_seconds
        elif call.long:
            self._long_calls += sign
        else:
            self._short_calls += sign
            self._short_seconds += sign * call.cost_seconds
