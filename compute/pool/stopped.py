"""The watch that finds a stopped process, a worker or the forkserver, by the state of its main thread in /proc.

A process that was stopped (SIGSTOP, a terminal, a debugger) can neither answer nor end by itself. The same is true of a
process whose main thread has ended while other threads live: its pidfd becomes readable only after the last of them.
"""

import asyncio
import os
from collections.abc import Callable

from unlatch.common.machine.process_states import ENDED, STOPPED, TRACED, state_in
from unlatch.compute.pool import exits
from unlatch.compute.pool.exits import Exit

_LOOK_SECONDS = 0.25
_STILL = {STOPPED: exits.STOPPED, TRACED: exits.STOPPED, ENDED: exits.HALF_GONE}


class StoppedWatch:
    """Look at a process four times a second, and call `on_stopped` once it has been stopped for `seconds`.

    With 0 seconds the process is never looked at. The time is counted in looks, not read from a clock, because
    the time in which the dispatcher itself was stopped must not count.
    """

    def __init__(self, pid: int, seconds: float, on_stopped: Callable[[Exit], None]) -> None:
        self._most_looks = max(1, round(seconds / _LOOK_SECONDS))
        self._on_stopped = on_stopped
        self._looks = 0
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        # A reference to this process, even if another process gets its pid later.
        self._stat = -1
        if seconds:
            try:
                self._stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return  # the process has ended already
            self._schedule()

    def close(self) -> None:
        """Stop looking at the process."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            os.close(self._stat)

    def _schedule(self) -> None:
        # At the same times for all processes, so that an idle loop wakes up once for all of them. The first look comes
        # after 0.5 to 1.5 times the interval.
        looks = round(self._loop.time() / _LOOK_SECONDS) + 1
        self._timer = self._loop.call_at(looks * _LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._schedule()
        state = state_in(self._stat)
        if not state:
            return  # the process has just ended
        cause = _STILL.get(state)
        self._looks = self._looks + 1 if cause is not None else 0
        if cause is not None and self._looks == self._most_looks:
            self._on_stopped(cause)
