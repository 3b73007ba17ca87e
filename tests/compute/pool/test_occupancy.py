"""Occupancy on its own: its answers equal a search through all workers, whatever they hold and in whatever order."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlatch.compute.pool.occupancy import Held, Occupancy

WORKERS = 5


@dataclass
class Runs:
    """The runs of a worker, as a test wants them: their number, seconds, beginning and bytes."""

    worker: int
    count: int = 0
    seconds: float = 0.0
    begun: float = 0.0
    size: int = 0
    long: bool = False

    @property
    def expected_end(self) -> float:
        return self.begun + self.seconds

    def held(self) -> Held:
        rank = (self.count, self.size, self.worker) if self.count < 2 else None
        return rank, self.count > 0, self.long, self.seconds

    def __len__(self) -> int:
        return self.count


CHANGES = st.tuples(
    st.integers(0, WORKERS - 1),
    st.integers(0, 2),
    st.floats(0.0, 10.0),
    st.integers(0, 3),
    st.booleans(),
    st.floats(0.0, 2.0),
)


@given(changes=st.lists(CHANGES, max_size=60), short=st.booleans())
def test_answers_equal_a_search(changes: list[tuple[int, int, float, int, bool, float]], *, short: bool) -> None:
    """Workers change, time passes, and each answer is the one that a look at every worker gives."""
    occupancy, workers, now = Occupancy(WORKERS), [Runs(number) for number in range(WORKERS)], 0.0
    for runs in workers:
        occupancy.changed(runs)
    for worker, count, seconds, size, long, passing in changes:
        runs = workers[worker] = Runs(worker, count, seconds, now, size, long) if count else Runs(worker)
        occupancy.changed(runs)
        now += passing
        assert occupancy.first() == min((rank for each in workers if (rank := each.held()[0])), default=(0, 0, None))[2]
        busy = [each for each in workers if each.count]
        counted = [each for each in busy if not (short and each.long)]
        left = 1.0 + sum(max(0.0, each.expected_end - now) for each in counted)
        count_all = WORKERS - (len(busy) - len(counted))
        assert (occupancy.busy, occupancy.long) == (len(busy), sum(each.long for each in busy))
        expected = left / count_all if count_all else math.inf
        assert occupancy.wait_seconds(1.0, now, short=short) == pytest.approx(expected, abs=1e-5)
        assert occupancy.longest_wait_seconds(1.0) >= occupancy.wait_seconds(1.0, now, short=False) - 1e-5


def test_ends_that_do_not_come_take_no_memory() -> None:
    """A worker whose runs end long before they are expected to leaves no entry for each of them."""
    occupancy = Occupancy(1)
    for number in range(10_000):
        occupancy.changed(Runs(0, 1, 3600.0 + number))
        occupancy.wait_seconds(1.0, 0.0, short=False)
    assert len(occupancy._ends._heap) < 2_000
    assert occupancy.wait_seconds(0.0, 0.0, short=False) == pytest.approx(3600.0 + 9_999)
