"""What a gateway thinks of a replica between two of its reports."""

from dataclasses import dataclass

import pytest

from unlatch.common.lane.body import Body
from unlatch.gateway.fleet.window import Window
from unlatch.protos.unlatch_pb2 import Load


@dataclass(slots=True)
class Held:
    """A short call of 10 ms."""

    body: Body
    cost_seconds: float = 0.01
    long: bool = False
    together: int = 1


def test_own_calls_since_the_report_count_as_busy_workers() -> None:
    """Else a gateway would send all it has to the replica that was idlest, until that says that it is not any more."""
    window, call = Window(), Held(Body(()))
    load = Load(workers=4, utilization=0.25, least_calls=8)
    window.hear(load)
    seconds = []
    for _ in range(4):
        seconds.append(window.expected_seconds(call))
        window.take(call)
    # Half of a run is before it where all workers are busy: 0.25, 0.5, 0.75 and 1 of them are.
    assert seconds == pytest.approx([0.01 * (1 + busy / 2) for busy in (0.25, 0.5, 0.75, 1.0)])
    # The next report says of them what there is to say.
    window.hear(load)
    window.give_back(call)
    assert window.expected_seconds(call) == pytest.approx(0.01)
