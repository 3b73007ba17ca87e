"""Pacing: when a lane's next message is due.

A message costs some 200 µs of processor time at its two ends, a call in it a tenth of that. So a lane on which many
calls are outstanding gathers frames: the more calls, the longer the time between two messages. A few calls never wait,
nor does any call on a lane that was quiet. (docs/decisions/0002)
"""

import asyncio
from time import monotonic

# Time between two messages for each outstanding call, and the most however many calls there are.
_SECONDS_A_CALL = 0.0005
_MAX_SECONDS = 0.002
# A reply that took long may be gathered for longer: for this share of its call's time so far, up to this many seconds.
_SHARE_OF_CALL = 1 / 8
_MAX_HELD_SECONDS = 0.016
# The loop's timers tick in milliseconds: what is due within half of one is due now.
_TICK_SECONDS = 0.0005


def gathered(outstanding: int, taken_seconds: float = 0.0) -> float:
    """Return how many seconds after the last message a small frame may leave, with `outstanding` calls unanswered.

    `taken_seconds` is how long the frame's call has taken.
    """
    max_seconds = max(_MAX_SECONDS, min(_MAX_HELD_SECONDS, _SHARE_OF_CALL * taken_seconds))
    return min(max_seconds, _SECONDS_A_CALL * outstanding)


class Pace:
    """Wakes the writer of a lane when the next message is due: as soon as any frame in it is."""

    def __init__(self) -> None:
        self._due = asyncio.Event()
        self._last = float("-inf")
        self._when = float("inf")
        self._timer: asyncio.TimerHandle | None = None

    def send_within(self, seconds: float) -> None:
        """Have the next message leave at most `seconds` after the last one."""
        when = self._last + seconds
        if when >= self._when or self._due.is_set():
            return
        self._stop()
        self._when = when
        left = when - monotonic()
        if left > _TICK_SECONDS:
            self._timer = asyncio.get_running_loop().call_later(left, self._due.set)
        else:
            self._due.set()

    async def next(self) -> None:
        """Wait until a message is due."""
        await self._due.wait()

    def sent(self) -> None:
        """Pace the next message from now on: everything so far has been sent."""
        self._last = monotonic()
        self._stop()
        self._when = float("inf")
        self._due.clear()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
