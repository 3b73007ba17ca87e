"""The pool of async workers, which takes calls of `async def` kernels: many at once in each worker."""

from collections.abc import Collection, Hashable, Sequence
from typing import NamedTuple

from unlatch.compute.call import Call
from unlatch.compute.pool.pool import Pool
from unlatch.compute.pool.side_by_side import SideBySide


class AsyncOpening(NamedTuple):
    """The async workers that take runs. Whether one has room for a call depends on the call's kernel."""

    workers: Sequence[SideBySide]
    takes_long: bool = True

    def kinds(self, waiting: Collection[Hashable]) -> set[Hashable]:
        """Return the kinds of calls that may find room, of those that wait."""
        return set(waiting)

    def takes(self, call: Call) -> SideBySide | None:
        """Return the worker with the fewest runs that has room for a call; None if none has."""
        return min((worker for worker in self.workers if worker.takes(call)), key=len, default=None)


class AsyncPool(Pool):
    """The async workers of one replica. They are few, so each question looks at all of them."""

    def opening(self, now: float) -> AsyncOpening | None:  # type: ignore[override]
        """Return the workers that take runs; None if there is none."""
        runs = (slot.in_flight for slot in self._slots)
        taking = [each for each in runs if isinstance(each, SideBySide) and each.has_room(now)]
        return AsyncOpening(taking) if taking else None

    def wait_seconds(self, before: float, now: float, *, short: bool) -> float:  # noqa: ARG002 (Pool's own)
        """Return the seconds until a worker begins a call that has `before` seconds of work before it.

        A worker with all its places taken has the next one free after the share of a run.
        """
        return before / len(self._slots)

    def longest_wait_seconds(self, before: float) -> float:
        """Return the same."""
        return self.wait_seconds(before, 0.0, short=False)


def by_kernel(call: Call) -> Hashable:
    """Return a call's kind among those for async workers: its kernel, and the company that it runs in."""
    return call.spec.name, call.company
