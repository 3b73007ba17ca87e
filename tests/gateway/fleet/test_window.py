"""A gateway's estimate of a replica's load between two of its reports."""

import pytest

from unlatch.common.waiting.demand import Estimate
from unlatch.gateway.fleet.window import Window
from unlatch.protos.unlatch_pb2 import Load

SHORT = Estimate(0.01)


def test_own_calls_since_the_report_count_as_busy_workers() -> None:
    """Else a gateway would send all it has to the replica that was idlest, until that says that it is not any more."""
    window = Window()
    load = Load(workers=4, utilization=0.25, least_calls=8)
    window.hear(load)
    seconds = []
    for _ in range(4):
        seconds.append(window.expected_seconds(SHORT))
        window.take(0, SHORT)
    # Half of a run is before it where all workers are busy: 0.25, 0.5, 0.75 and 1 of them are.
    assert seconds == pytest.approx([0.01 * (1 + busy / 2) for busy in (0.25, 0.5, 0.75, 1.0)])
    # The next report says of them what there is to say.
    window.hear(load)
    window.give_back(0, SHORT)
    assert window.expected_seconds(SHORT) == pytest.approx(0.01)
