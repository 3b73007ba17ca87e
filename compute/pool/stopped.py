"""The watch that tells a stopped worker from a busy one, by what the system says of its main thread.

A worker that was stopped (SIGSTOP, a terminal, a debugger) can neither answer nor end by itself. Nor can one whose main
thread has ended while others go on: the process's end, which the pidfd would tell, comes with the last of them.
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
    """Look at a process a few times a second, and call `on_stopped` once it has stood still for so many seconds.

    0 seconds is never. Looks in a row count, and not the clock: when the dispatcher itself was stopped no time has
    passed.
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
                return  # it has ended already
            self._schedule()

    def close(self) -> None:
        """Look no more."""
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
            return  # it has just ended
        cause = _STILL.get(state)
        self._looks = self._looks + 1 if cause is not None else 0
        if cause is not None and self._looks == self._most_looks:
            self._on_stopped(cause)
