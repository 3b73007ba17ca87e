"""How long runs take, learned from them."""

import pytest

from unlatch.common.waiting.forecast import Forecast


def learned(*seconds: float) -> Forecast:
    times = Forecast()
    for run in seconds:
        times.learn("k", 1000, run)
    return times


def test_nothing_is_expected_of_what_was_never_run() -> None:
    """A kernel that nobody has run is expected to take nothing, so that nothing is held against it."""
    assert learned(1.0).expected("other", 1000) == 0.0


def test_recent_runs_count_most() -> None:
    """The forecast follows the runs, and has forgotten old ones after some dozens."""
    assert learned(*[0.01] * 10, *[0.02] * 30).expected("k", 1000) == pytest.approx(0.02, rel=0.01)


def test_nearest_size_stands_for_one_never_seen() -> None:
    """Sizes are told apart by powers of two; one without a run takes what its neighbour takes."""
    times = learned(0.01)
    times.learn("k", 1_000_000, 3.0)
    assert times.expected("k", 600) == 0.01
    assert times.expected("k", 3000) == 0.01
    assert times.expected("k", 900_000) == 3.0


def test_one_stall_is_not_held_against_the_next_calls() -> None:
    """A run of half a minute among runs of ten milliseconds changes little; as many as those change everything."""
    assert learned(*[0.01] * 10, 30.0).expected("k", 1000) < 0.02
    assert learned(*[0.01] * 10, *[30.0] * 60).expected("k", 1000) == pytest.approx(30.0, rel=0.1)


def test_run_that_was_ended_tells_the_least_that_it_takes() -> None:
    """A run that was cut short counts if it took longer than expected, and teaches nothing if it did not."""
    times = learned(0.01)
    times.learn_at_least("k", 1000, 0.001)
    assert times.expected("k", 1000) == 0.01
    times.learn_at_least("k", 1000, 0.03)
    assert times.expected("k", 1000) == pytest.approx(0.02)


def test_refusals_make_what_they_are_for_less_certain() -> None:
    """After some dozens of them a call is expected to take half, so that one is tried again at last."""
    times = learned(10.0)
    for _ in range(35):
        times.doubt("k", 1000)
        times.doubt("never run", 1000)
    assert times.expected("k", 1000) == pytest.approx(5.0, rel=0.05)
