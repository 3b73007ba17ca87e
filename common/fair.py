"""Fair turns for work that arrives at one event loop from many sides at once.

A loop runs in rounds: it runs what is ready, polls the sockets, and runs what is ready again. An RPC needs several
rounds, and in each it waits for all other work. So when many lanes bring a message of calls in the same round, only
some are handled in it, up to a time limit, and the others in the following rounds.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from time import monotonic

# Time limit of one round. One message of 64 calls takes as long; several small ones fit in.
_ROUND_SECONDS = 0.002


class Turns:
    """The turns of everything that shares one event loop. Use it on that loop only."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], None], asyncio.Future[None]]] = deque()
        # The time until which this round may begin work; None before its first work.
        self._until: float | None = None

    async def take(self, work: Callable[[], None]) -> None:
        """Do the work: at once if this round has time for it, else in a later round. Raises what the work raises."""
        if not self._waiting and self._has_time():
            work()
            return
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((work, done))
        await done

    def _has_time(self) -> bool:
        if self._until is None:
            self._until = monotonic() + _ROUND_SECONDS
            asyncio.get_running_loop().call_soon(self._next_round)
            return True
        return monotonic() < self._until

    def _next_round(self) -> None:
        self._until = None
        while self._waiting and self._has_time():
            work, done = self._waiting.popleft()
            if done.done():
                # The task that wanted this work has been cancelled.
                continue
            try:
                work()
            except Exception as error:  # noqa: BLE001 (raised in the task that wanted this work)
                done.set_exception(error)
            else:
                done.set_result(None)
