"""The hold: calls wait while no replica takes calls, instead of failing at once.

    a call comes ──> waits ──┬─ a replica takes calls ──> it goes on, in the order in which calls came
                             └─ it has waited for `seconds` ──> refused UNAVAILABLE

The fleet's state is held too, from the loss of the last replica (or the start) on and for as long: health, and calls
that were routed already and have lost their replica (gateway/fleet/members.py, gateway/fleet/fleet.py).
"""

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from unlatch.common.errors import Unavailable
from unlatch.common.fair import ByTurns
from unlatch.common.overdue import Overdue
from unlatch.gateway.totals import MachineTotals

# What goes on with a call: without an error, a replica takes calls.
GoOn = Callable[[Unavailable | None], None]

_RETRY_MILLISECONDS = 1000
# Calls that go on, or are refused, in one round of the event loop. Each takes some 50 µs.
_RELEASED_AT_ONCE = 32


def no_replica(why: str = "") -> Unavailable:
    """Return the error of a call that no replica takes now."""
    return Unavailable(f"no replica takes calls now{why}", retry_after_milliseconds=_RETRY_MILLISECONDS)


@dataclass(frozen=True, slots=True)
class HoldLimits:
    """The longest time that calls wait, how many may wait, and their bytes. 0 seconds holds none."""

    seconds: float = 0.0
    max_calls: int = 0
    max_bytes: int = 0


class Hold:
    """The calls that wait for any replica. `caught` handles unexpected exceptions of what goes on with them."""

    def __init__(
        self, limits: HoldLimits, caught: Callable[[Exception], object], totals: MachineTotals | None = None
    ) -> None:
        self._limits = limits
        self._totals = totals or MachineTotals()
        # The calls with their bytes.
        self._calls: dict[Hashable, tuple[GoOn, int]] = {}
        self._bytes = 0
        self._waits = Overdue[Hashable](limits.seconds, self._have_waited)
        # Calls that have waited for too long, and are still to be refused.
        self._late: deque[Hashable] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._ended = asyncio.Event()
        self._releasing = ByTurns(self._release, at_once=_RELEASED_AT_ONCE, caught=caught)
        self._refusing = ByTurns(self._refuse, at_once=_RELEASED_AT_ONCE, caught=caught)
        # Called when the fleet's state is held no longer, and no replica has come.
        self.on_end: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def on(self) -> bool:
        """Whether calls may wait for a replica at all."""
        return self._limits.seconds > 0

    @property
    def active(self) -> bool:
        """Whether the fleet's state is held now."""
        return self._timer is not None

    def begin(self) -> None:
        """Hold the fleet's state from now on: no replica takes calls."""
        self._ended.clear()
        if self.on and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._limits.seconds, self._expire)

    def end(self) -> None:
        """Let all calls go on, because a replica takes calls."""
        self._stop_timer()
        self._ended.set()
        if self._calls:
            self._releasing.start()

    def close(self) -> None:
        """Hold no more calls: the gateway ends."""
        self._limits = HoldLimits()
        self._stop_timer()

    async def until_ended(self) -> None:
        """Wait until a replica takes calls."""
        await self._ended.wait()

    def check(self, size: int) -> None:
        """Raise Unavailable where one more call of `size` bytes would be too many."""
        limits = self._limits
        if len(self._calls) + self._totals.elsewhere("waiting_calls") >= limits.max_calls:
            raise no_replica(f", and max_held_calls={limits.max_calls} wait for one")
        waiting = self._bytes + self._totals.elsewhere("waiting_bytes")
        if waiting + size > limits.max_bytes:
            raise no_replica(f", and calls of {waiting} of max_held_bytes={limits.max_bytes} bytes wait for one")

    def add(self, call: Hashable, size: int, go_on: GoOn) -> None:
        """Hold a call. `go_on` is called once a replica takes calls, or with the error when the time is over."""
        self._calls[call] = go_on, size
        self._count(1, size)
        self._waits.begin(call)

    def withdraw(self, call: Hashable) -> None:
        """Remove a call whose deadline has passed, or whose caller has left."""
        if call in self._calls:
            self._take(call)

    def _take(self, call: Hashable) -> GoOn:
        go_on, size = self._calls.pop(call)
        self._count(-1, -size)
        self._waits.end(call)
        return go_on

    def _count(self, calls: int, size: int) -> None:
        self._bytes += size
        # Of all fleets of the gateway.
        self._totals.own.waiting_calls += calls
        self._totals.own.waiting_bytes += size

    def _expire(self) -> None:
        self._timer = None
        self.on_end()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _release(self) -> Iterator[None]:
        """Let the calls go on, the oldest first. Yields after each call (a ByTurns step)."""
        while self._calls and self._ended.is_set():
            self._take(next(iter(self._calls)))(None)
            yield

    def _have_waited(self, calls: Sequence[Hashable]) -> None:
        self._late.extend(calls)
        self._refusing.start()

    def _refuse(self) -> Iterator[None]:
        """Refuse the calls that have waited for too long. Yields after each call (a ByTurns step)."""
        while self._late:
            call = self._late.popleft()
            if call in self._calls:
                self._take(call)(no_replica())
                yield
