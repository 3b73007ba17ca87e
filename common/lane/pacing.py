"""When a lane's next message is due.

A message costs some 200 µs of processor at its two ends, a call in it a tenth. So a lane on which many calls are
outstanding gathers: messages leave some time apart, the more the more calls are outstanding. A few calls never wait,
nor does any on a lane that was quiet. (docs/decisions/0002)
"""

import asyncio
from time import monotonic

# Between messages, for each outstanding call; at most so much, however many they are.
_SECONDS_A_CALL = 0.0005
_LONGEST_SECONDS = 0.002
# A reply that was long in coming may be gathered for longer: for this share of the time its call has taken, up to this.
_SHARE_OF_CALL = 1 / 8
_LONGEST_HELD_SECONDS = 0.016
# The loop's timers tick in milliseconds: half of one is none.
_TICK_SECONDS = 0.0005


def gathered(outstanding: int, taken_seconds: float = 0.0) -> float:
    """How long after the last message a small frame may leave: one of so many calls, which has taken so long."""
    longest = max(_LONGEST_SECONDS, min(_LONGEST_HELD_SECONDS, _SHARE_OF_CALL * taken_seconds))
    return min(longest, _SECONDS_A_CALL * outstanding)


class Pace:
    """Wakes the one who writes messages when the next one is due: as soon as anything in it is."""

    def __init__(self) -> None:
        self._due = asyncio.Event()
        self._last = float("-inf")
        self._when = float("inf")
        self._timer: asyncio.TimerHandle | None = None

    def send_within(self, seconds: float) -> None:
        """The next message leaves at most so long after the last one."""
        when = self._last + seconds
        if when >= self._when or self._due.is_set():
            return
        self._when = when
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        left = when - monotonic()
        if left > _TICK_SECONDS:
            self._timer = asyncio.get_running_loop().call_later(left, self._due.set)
        else:
            self._due.set()

    async def next(self) -> None:
        """Wait until a message is due."""
        await self._due.wait()

    def sent(self) -> None:
        """All has been said that there was to say: from now on the next message is paced."""
        self._last = monotonic()
        self._when = float("inf")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._due.clear()
