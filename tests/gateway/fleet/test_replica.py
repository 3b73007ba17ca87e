"""The gateway's end of a replica, without a replica."""

from tests.support.replicas import KERNELS, HandLane
from unlatch.common.security.tls import ChannelSecurity
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.recorder import Recorder
from unlatch.gateway.fleet.replica import Replica, ReplicaEvents
from unlatch.protos.unlatch_pb2 import Welcome


async def test_a_drain_is_taken_in_once() -> None:
    """A replica may say several times that it drains, which changes the fleet and the log once for each welcome."""
    changes: list[bool] = []
    events = ReplicaEvents(
        changed=lambda: changes.append(replica.takes_calls), has_room=lambda: None, failed=lambda *_: None
    )
    replica = Replica("a:1", events, ChannelSecurity(), 0.0, InternalErrors(Recorder()))
    lane = HandLane("a")
    for _ in range(2):
        replica.welcomed(lane, Welcome(server="a", kernels=KERNELS))
        for _ in range(3):
            replica.drains(lane)
    assert changes == [True, False, True, False]
