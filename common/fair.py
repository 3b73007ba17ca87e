"""Long work on one event loop, done in turns, so that everything else on the loop goes on meanwhile.

    Turns      work that comes from many sides at once: each round of the loop takes in as much as fits in 2 ms
    ByTurns    one long piece of work, some steps of it in each round; it may be started again at any time
    by_turns   the same, once, for a task that waits for its end

A loop goes round: it runs what is ready, looks at the sockets, and runs what is ready again. A task that needs several
rounds, as each RPC does, waits in each of them for all that others have to do.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic

# Time limit of one round. One message of 64 calls takes as long; several small ones fit in.
_ROUND_SECONDS = 0.002
_END = object()


class Turns:
    """The turns of one event loop, one object for all work that is to take turns."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], None], asyncio.Future[None]]] = deque()
        # The time until which this round may begin work; None before its first work.
        self._until: float | None = None

    async def take(self, work: Callable[[], None]) -> None:
        """Do `work`: at once where this round has time for it, else when its turn comes. Raises what it raises."""
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
                # The task that waited for it was cancelled.
                continue
            try:
                work()
            except Exception as error:  # noqa: BLE001 (raised where it is waited for)
                done.set_exception(error)
            else:
                done.set_result(None)


class ByTurns:
    """Work in steps that is started again and again. `steps` begins it: an iterator, each of whose items is one step.

    `at_once` steps are done in one round of the loop, the next ones in the next round. When a step raises, `caught` is
    given the exception, and the work goes on with the next step. A generator ends where it raises, so that its next
    step is none; it should catch for itself what concerns one call only.
    """

    def __init__(
        self, steps: Callable[[], Iterator[object]], *, at_once: int, caught: Callable[[Exception], object]
    ) -> None:
        self._begin = steps
        self._steps: Iterator[object] = iter(())
        self._at_once = at_once
        self._caught = caught
        self._goes_on = False

    def start(self) -> None:
        """Begin the work anew: now, or in the next round of the loop where its next turn is due then."""
        self._steps = self._begin()
        if not self._goes_on:
            self._goes_on = True
            self._turn()

    def _turn(self) -> None:
        for _ in range(self._at_once):
            steps = self._steps
            try:
                # A step may start the work again: it goes on with the new steps.
                if next(steps, _END) is _END and steps is self._steps:
                    self._goes_on = False
                    return
            except Exception as error:  # noqa: BLE001 (counted and logged by the owner's guard)
                self._caught(error)
        asyncio.get_running_loop().call_soon(self._turn)


async def by_turns(steps: Iterator[object], at_once: int) -> None:
    """Do every step, `at_once` of them in each round of the loop; all that are left if the task is cancelled."""
    try:
        for done, _ in enumerate(steps, 1):
            if done % at_once == 0:
                await asyncio.sleep(0)
    finally:
        deque(steps, maxlen=0)
