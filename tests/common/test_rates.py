"""Moving means and token buckets."""

import pytest

from unlatch.common.rates import MovingMean, TokenBucket


def test_first_values_of_a_mean_are_averaged() -> None:
    """Until one value's share is its weight; from then on each new value has that."""
    mean = MovingMean(0.2)
    found = []
    for value in (10.0, 20.0, 30.0, 40.0, 50.0, 30.0, 80.0):
        mean.add(value)
        found.append(mean.value)
    assert found == pytest.approx([10.0, 15.0, 20.0, 25.0, 30.0, 30.0, 40.0])


def test_mean_with_a_start_moves_from_there() -> None:
    """By its weight at each value, from the first on."""
    mean = MovingMean(0.05, start=1.0)
    mean.add(3.0)
    assert mean.value == pytest.approx(1.1)
    mean.add(1.1)
    assert mean.value == pytest.approx(1.1)
    zero = MovingMean(0.05, start=0.0)
    zero.add(1.0)
    assert zero.value == pytest.approx(0.05)


def test_bucket_fills_up_to_its_capacity() -> None:
    """At its rate, from full, however long nothing is taken."""
    bucket = TokenBucket(2.0, 4.0, now=100.0)
    assert [bucket.take_one(100.0) for _ in range(5)] == [True] * 4 + [False]
    assert bucket.seconds_until(1.0, 100.0) == 0.5
    assert not bucket.take_one(100.4)
    assert bucket.take_one(100.5)
    assert bucket.left(1000.0) == 4.0


def test_bucket_may_be_overdrawn() -> None:
    """An overdraft is repaid before anything else can be taken."""
    bucket = TokenBucket(1.0, 2.0, now=0.0)
    bucket.take(5.0, 0.0)
    assert bucket.left(0.0) == -3.0
    assert bucket.seconds_until(1.0, 1.0) == 3.0
    assert not bucket.take_one(3.5)
    assert bucket.take_one(4.0)


def test_bucket_without_rate_and_capacity_gives_nothing() -> None:
    """However long it is waited for."""
    bucket = TokenBucket(0.0, 0.0, now=0.0)
    assert not bucket.take_one(1e9)
