"""Overdue: one timer for many waits of the same length. A timer of its own for each would cost each call 4 µs."""

import asyncio
from collections.abc import Callable, Hashable, Sequence
from time import monotonic
from typing import Generic, TypeVar

Wait = TypeVar("Wait", bound=Hashable)


class Overdue(Generic[Wait]):
    """Waits that may last `seconds` each. `late` is called with those that last longer, which are forgotten then."""

    def __init__(self, seconds: float, late: Callable[[Sequence[Wait]], None]) -> None:
        self._seconds = seconds
        self._late = late
        # When each began, the oldest first.
        self._began: dict[Wait, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, wait: Wait) -> None:
        """Note that a wait begins which is not under way."""
        self._began[wait] = monotonic()
        if self._timer is None:
            self._look_in(self._seconds)

    def end(self, wait: Wait) -> bool:
        """Note that a wait is over; returns whether it was neither late nor over before."""
        return self._began.pop(wait, None) is not None

    def _look_in(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        self._timer = None
        late: list[Wait] = []
        for wait, began in self._began.items():
            if (left := began + self._seconds - monotonic()) > 0:
                self._look_in(left)
                break
            late.append(wait)
        for wait in late:
            del self._began[wait]
        if late:
            self._late(late)
