"""The soak's look at counters: what only grows may not fall, in whatever form a service exports it."""

import pytest

from bench.scrape import Scrape, fallen


def scraped(name: str, value: float) -> Scrape:
    """A scrape with one series."""
    return {(name, frozenset({("stage", "reply")})): value}


@pytest.mark.parametrize("name", ["x_calls_total", "x_seconds_count", "x_seconds_bucket", "x_seconds_sum"])
@pytest.mark.parametrize(("before", "after", "falls"), [(2.0, 1.5, True), (2.0, 2.0, False), (0.0, -0.1, True)])
def test_what_only_grows_has_fallen(name: str, before: float, after: float, *, falls: bool) -> None:
    """Counters and every part of a histogram are watched, its sum too: rate() takes a fall for a restart."""
    assert bool(fallen(scraped(name, before), scraped(name, after))) is falls
    assert fallen(scraped(name, before), {})


def test_gauge_may_fall() -> None:
    """A gauge is not watched."""
    assert not fallen(scraped("x_queue_depth", 2.0), scraped("x_queue_depth", 1.0))
