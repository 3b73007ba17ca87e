"""A gateway's estimate of a replica's load between two of its reports."""

import pytest

from tests.gateway.fleet.conftest import Clock
from unlatch.common.waiting.demand import Estimate
from unlatch.gateway.fleet.window import Window
from unlatch.protos.unlatch_pb2 import Load

pytestmark = pytest.mark.usefixtures("clock")

SHORT = Estimate(0.01)


def test_own_calls_since_the_report_count_as_busy_workers() -> None:
    """Else a gateway would send all it has to the replica that was idlest, until that says that it is not any more."""
    window = Window()
    load = Load(workers=4, utilization=0.25, least_calls=8)
    window.hear(load)
    seconds = []
    for _ in range(4):
        seconds.append(window.expected_seconds(SHORT, has_room=True))
        window.take(0, SHORT)
    # Half of a run is before it where all workers are busy: 0.25, 0.5, 0.75 and 1 of them are.
    assert seconds == pytest.approx([0.01 * (1 + busy / 2) for busy in (0.25, 0.5, 0.75, 1.0)])
    # The next report says of them what there is to say.
    window.hear(load)
    window.give_back(0, SHORT)
    assert window.expected_seconds(SHORT, has_room=True) == pytest.approx(0.01)


@pytest.mark.parametrize(("expected_seconds", "is_overdue"), [(0.0, True), (10.0, False)])
def test_overdue_runs_count_as_a_wait(clock: Clock, expected_seconds: float, *, is_overdue: bool) -> None:
    """A worker that has not answered in time has all further calls wait. One with a run that takes long has time."""
    window = Window()
    window.hear(Load(workers=1, least_calls=8))
    window.take(0, Estimate(expected_seconds))
    # The replica says that no call waits: a run that takes longer than expected may end at any moment.
    window.hear(Load(workers=1, least_calls=8))
    clock.now += 0.1
    assert (window.expected_seconds(Estimate(0.0), has_room=True) > 0.05) == is_overdue
