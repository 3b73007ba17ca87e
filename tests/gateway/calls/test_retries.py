"""The budget of retries: a tenth of the calls of late, and a reserve of what the loss of all replicas may cost."""

import random

import pytest

from unlatch.gateway.calls.retries import RetryBudget


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def taken(budget: RetryBudget) -> int:
    """How many retries it has; it has none afterwards."""
    count = 0
    while budget.take():
        count += 1
    return count


def test_nothing_was_called(clock: Clock) -> None:
    """A gateway without calls has no retries."""
    assert not RetryBudget(clock).take()


def test_reserve_is_worth_what_was_at_stake(clock: Clock) -> None:
    """As many retries as replicas have had at a time, even where there were no more calls than these."""
    budget = RetryBudget(clock)
    for at_stake in range(1, 65):
        budget.called(at_stake)
    assert taken(budget) == 64 + 6


def test_a_tenth_of_the_calls(clock: Clock) -> None:
    """Once the reserve is spent each tenth call adds a retry."""
    budget = RetryBudget(clock)
    budget.called(1)
    taken(budget)
    for _ in range(1000):
        budget.called(1)
    assert taken(budget) == pytest.approx(100, abs=1)


def test_calls_of_long_ago_count_for_nothing(clock: Clock) -> None:
    """The tokens that a busy day has earned are not there for the night's outage; the reserve is."""
    budget = RetryBudget(clock)
    for _ in range(10_000):
        budget.called(8)
    assert budget.left > 900
    clock.now += 120.0
    assert budget.left == pytest.approx(8.0, abs=0.1)
    assert taken(budget) == 8


@pytest.mark.parametrize("seed", range(5))
def test_a_storm_is_no_more_than_a_tenth_and_the_reserve(clock: Clock, seed: int) -> None:
    """Whenever replicas are lost, and however many runs are lost with them, retries keep to their share."""
    dice = random.Random(seed)
    budget = RetryBudget(clock)
    calls = retries = most_at_stake = 0
    for _ in range(2000):
        clock.now += dice.expovariate(100.0)
        at_stake = dice.randint(1, 40)
        most_at_stake = max(most_at_stake, at_stake)
        budget.called(at_stake)
        calls += 1
        if dice.random() < 0.05:
            retries += sum(budget.take() for _ in range(at_stake))
    assert retries <= 0.1 * calls + most_at_stake
    assert retries > 0.05 * calls
