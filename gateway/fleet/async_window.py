"""The window of a replica's async workers: how many calls of each kernel a gateway may have unanswered there.

An async worker runs many calls of a kernel at once. So no seconds are counted, as they are for other workers
(gateway/fleet/window.py), but calls: as many as run at once, and a few more, so that the next one is there when a call
ends.
"""

import math
from collections import Counter

from unlatch.common.waiting.demand import Beside
from unlatch.protos.unlatch_pb2 import Load

# One call more for each of so many that run at once, and one more at least.
_RUNS_A_CALL_AHEAD = 8


class AsyncWindow:
    """The window of the async workers of one replica."""

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()
        self.workers = 0.0
        # As the replica has reported it last.
        self.wait_seconds = 0.0

    def hear(self, load: Load) -> None:
        """Take in a report."""
        self.workers = load.async_workers
        self.wait_seconds = load.async_wait_microseconds / 1e6

    def has_room(self, beside: Beside) -> bool:
        """Whether one call more of a kernel may be sent."""
        runs = math.ceil(beside.runs * self.workers)
        return self._calls[beside.kernel] < runs + 1 + runs // _RUNS_A_CALL_AHEAD

    def taken_ratio(self, beside: Beside) -> float:
        """The share of the places for a kernel's calls that this gateway's calls take, as far as it knows."""
        places = beside.runs * self.workers
        return min(1.0, self._calls[beside.kernel] / places) if places else 1.0

    def count(self, sign: int, beside: Beside) -> None:
        """Count a call that is sent (1), or that has ended (-1)."""
        self._calls[beside.kernel] += sign
