"""The order of waiting: who is next when there is room. The front applies it to its queue, the gateway to its calls.

First come, first served. Priorities, tenants' shares, deadlines and batches will change this module and no other.
"""

from typing import Generic, Protocol, TypeVar

Waiting = TypeVar("Waiting")


class Policy(Protocol[Waiting]):
    """An order over calls that wait."""

    def add(self, call: Waiting) -> None:
        """A call begins to wait."""

    def remove(self, call: Waiting) -> bool:
        """A call waits no more, if it did: its caller has left."""

    def peek(self) -> Waiting | None:
        """The call whose turn it is; None when nobody waits."""

    def next(self) -> Waiting | None:
        """The call whose turn it is, which then waits no more; None when nobody waits."""

    def __len__(self) -> int:
        """How many wait."""


class FirstComeFirstServed(Generic[Waiting]):
    """Arrival decides, and nothing else."""

    def __init__(self) -> None:
        # Insertion order is the queue; a caller who leaves is found without a search.
        self._calls: dict[int, Waiting] = {}

    def add(self, call: Waiting) -> None:
        self._calls[id(call)] = call

    def remove(self, call: Waiting) -> bool:
        return self._calls.pop(id(call), None) is not None

    def peek(self) -> Waiting | None:
        return next(iter(self._calls.values()), None)

    def next(self) -> Waiting | None:
        return self._calls.pop(next(iter(self._calls))) if self._calls else None

    def __len__(self) -> int:
        return len(self._calls)
