"""Work that comes to one event loop from many sides at once, done by turns.

A loop goes round: it runs what is ready, looks at the sockets, and runs what is ready again. Whoever needs several
rounds, as each RPC does, waits in each of them for all that others have to do. So many lanes that each bring a message
of calls in the same round are taken in for a while, and the rest of them in the rounds that follow.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from time import monotonic

# In one round. A message of 64 calls takes as long; several that are small fit in it.
_ROUND_SECONDS = 0.002


class Turns:
    """One for all that is to take turns. To be used on the event loop."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], None], asyncio.Future[None]]] = deque()
        # Until when work is begun in this round; None where none was yet.
        self._until: float | None = None

    async def take(self, work: Callable[[], None]) -> None:
        """Do it: at once where this round has time for it, else when it is its turn. Raises what it raises."""
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
                # Whoever wanted it is gone.
                continue
            try:
                work()
            except Exception as error:  # noqa: BLE001 (whoever wanted it hears of it)
                done.set_exception(error)
            else:
                done.set_result(None)
