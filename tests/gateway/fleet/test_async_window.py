"""The window of a replica's async workers: places of each kernel, and nothing of other workers' time."""

import pytest

from tests.gateway.fleet.conftest import Clock
from unlatch.common.waiting.demand import Beside, Estimate
from unlatch.gateway.fleet.window import Window
from unlatch.protos.unlatch_pb2 import Load, Welcome

FETCHES = Estimate(0.001, beside=Beside("fetches", 16))
LOOKS = Estimate(0.001, beside=Beside("looks", 1))
PLAIN = Estimate(0.01)


@pytest.fixture
def window() -> Window:
    """The window of a replica with two workers and two async workers, which one lane uses."""
    window = Window()
    window.grant(Welcome(window_calls=1000, window_bytes=1 << 30))
    window.hear(Load(workers=2, least_calls=4, async_workers=2.0, long_calls=3))
    return window


def places(window: Window, estimate: Estimate) -> int:
    """Take places of a kernel as long as there are some, and return how many there were."""
    count = 0
    while window.has_room(0, estimate):
        window.take(0, estimate)
        count += 1
    return count


def test_a_kernel_has_as_many_places_as_run_at_once_and_a_few_more(window: Window) -> None:
    """Each kernel has its own: 16 in each of two workers and an eighth more, or one in each and one more."""
    assert places(window, FETCHES) == 32 + 1 + 4
    assert places(window, LOOKS) == 2 + 1
    window.give_back(0, FETCHES)
    assert places(window, FETCHES) == 1


def test_calls_for_async_workers_occupy_no_other_worker(clock: Clock, window: Window) -> None:
    """A plain call finds idle workers, however many calls wait in async workers, and for however long."""
    before = window.expected_seconds(PLAIN, has_room=True)
    places(window, FETCHES)
    clock.now += 60.0
    assert window.wait_seconds() == 0.0
    assert window.expected_seconds(PLAIN, has_room=True) == before
    assert places(window, PLAIN) == 4
    assert window.calls == 37 + 4


def test_a_replica_with_fewer_calls_of_a_kernel_is_done_first(window: Window) -> None:
    """Of two replicas the one with more free places comes first, and one that is silent comes last."""
    free = window.expected_seconds(FETCHES, has_room=True)
    window.take(0, FETCHES)
    taken = window.expected_seconds(FETCHES, has_room=True)
    window.silent_seconds = 1.0
    assert free < taken < window.expected_seconds(FETCHES, has_room=True)


def test_bytes_of_all_calls_count_together(window: Window) -> None:
    """The bound in bytes is the lane's, so calls for async workers count in it."""
    window.take(1 << 30, FETCHES)
    assert not window.has_room(1, PLAIN)
    assert not window.has_room(1, LOOKS)


def test_a_replica_that_has_not_reported_gets_one_call() -> None:
    """Before its first report nothing is known of its async workers."""
    window = Window()
    window.grant(Welcome(window_calls=1000, window_bytes=1 << 30))
    assert places(window, FETCHES) == 1
