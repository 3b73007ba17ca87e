"""Waits between tries."""

from unlatch.common.backoff import Backoff


def test_waits_grow_until_something_comes_of_a_try() -> None:
    """Waits double from the first to the longest, and begin anew after a success."""
    backoff = Backoff(first_seconds=0.5, longest_seconds=3.0)
    assert [backoff.failed() for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    backoff.succeeded()
    assert backoff.failed() == 0.5


def test_some_tries_are_free() -> None:
    """The first failures cost no wait, and endless failures never more than the longest."""
    backoff = Backoff(first_seconds=0.5, longest_seconds=3.0, free_tries=2)
    assert [backoff.failed() for _ in range(4)] == [0.0, 0.0, 0.5, 1.0]
    assert {backoff.failed() for _ in range(5000)} == {2.0, 3.0}
