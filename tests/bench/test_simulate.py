"""The simulated fleet loses no call and adds none, and the same seed gives the same figures."""

from dataclasses import replace

import pytest

from bench.simulation.__main__ import WAYS, World, arrivals, kernels, run, table

SMALL = World(replicas=8, workers=4, gateways=3, seconds=1.5, warm_seconds=0.25)


@pytest.mark.parametrize("way", WAYS)
def test_every_call_is_run_once_and_answered_once(way: str) -> None:
    """Workers do the work that came and no more. Calls in the system, over time, equal the sum of their latencies."""
    found = run(replace(SMALL, way=way))
    assert found.calls == found.answered > 200
    assert found.busy_seconds == pytest.approx(found.work_seconds)
    if way != "one":
        assert found.in_system_seconds == pytest.approx(found.latency_seconds)
        assert 0.0 <= found.imbalance < 1.0
    assert found.p50_seconds <= found.p95_seconds <= found.p99_seconds
    assert found.wait_p95_seconds > -1e-9


def test_same_seed_gives_the_same_figures() -> None:
    """The seed alone decides, whatever else uses random numbers. Another seed gives other figures."""
    first, again, other = run(SMALL), run(SMALL), run(replace(SMALL, seed=2))
    assert first == again
    assert other.latency_seconds != first.latency_seconds


def test_calls_are_the_same_whatever_the_way() -> None:
    """Ways of routing are compared on the same calls, as many as the load says, of every measured kernel."""
    worlds = [replace(SMALL, way=way, load=0.8, seconds=20.0) for way in WAYS]
    coming = [[(one.at, one.gateway, one.kernel, one.seconds) for one in arrivals(world)] for world in worlds]
    assert all(calls == coming[0] for calls in coming)
    assert {kernel for _, _, kernel, _ in coming[0]} == set(kernels())
    assert {gateway for _, gateway, _, _ in coming[0]} == {0, 1, 2}
    workers = SMALL.replicas * SMALL.workers
    assert sum(seconds for *_, seconds in coming[0]) / (20.0 * workers) == pytest.approx(0.8, abs=0.15)


def test_fleets_choice_is_worth_something_where_replicas_differ() -> None:
    """With a quarter of the replicas half as fast, calls wait less than half as long as with round robin."""
    world = replace(SMALL, load=0.8, slow=0.25, seconds=4.0)
    ours, turns = run(world), run(replace(world, way="robin"))
    assert ours.wait_p95_seconds < turns.wait_p95_seconds / 2
    assert "| 80% | round robin |" in table([ours, turns], [])
