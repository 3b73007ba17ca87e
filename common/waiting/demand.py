"""Demand and estimate of a call: two values, each replaced whole and never written to.

Both are named tuples: making one takes half the time of a frozen dataclass, and every call makes one of each.
"""

from collections.abc import Hashable
from typing import NamedTuple


class Demand(NamedTuple):
    """A caller's demand. The order of waiting, the room at a worker and the admission go by it."""

    kernel: str
    # Bytes of the call's tensors.
    size: int
    tenant: str
    # The rank of the priority: 0 is served first.
    priority: int
    # By the monotonic clock; infinite for a call without a deadline.
    deadline: float
    # Calls that have the same key may run as one; None for a call that runs alone.
    batch: Hashable | None = None

    def until(self, deadline: float) -> "Demand":
        """The same with another deadline."""
        return Demand(self.kernel, self.size, self.tenant, self.priority, deadline, self.batch)


class Beside(NamedTuple):
    """The most runs of an `async def` kernel that one worker executes at once."""

    kernel: str
    runs: int


class Estimate(NamedTuple):
    """An estimate of what a run takes, learned from the runs before it."""

    # Seconds of a worker; 0 where nothing is known of the kernel. Runs that are executed at once share a worker's time.
    seconds: float = 0.0
    # Whether some workers are kept free of calls of that length.
    long: bool = False
    # The most calls of the kernel that may run as one.
    together: int = 1
    # None for a run that has its worker alone.
    beside: Beside | None = None

    @property
    def run_seconds(self) -> float:
        """Seconds of the run by the clock."""
        return self.seconds if self.beside is None else self.seconds * self.beside.runs


UNKNOWN = Estimate()
