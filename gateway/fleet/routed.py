"""A call as the fleet sees it: what it demands, what it is expected to take, and what it is told."""

from typing import TYPE_CHECKING, Protocol

from unlatch.common.errors import UnlatchError
from unlatch.common.lane.body import Body
from unlatch.common.lane.listener import ReplyListener
from unlatch.common.waiting.demand import Demand, Estimate
from unlatch.protos.unlatch_pb2 import Descriptor

if TYPE_CHECKING:
    from unlatch.gateway.fleet.replica import Lane, Replica


class Routed(ReplyListener, Protocol):
    """A call that wants a replica. The fleet stands below the calls, and knows them by this."""

    descriptor: Descriptor
    body: Body
    # What its run is expected to take on a replica of the fleet's mean speed. The fleet sets it when it routes the
    # call, and it stays as it is while the call is held or on its way.
    estimate: Estimate

    @property
    def demand(self) -> Demand:
        """The demand of its callers."""

    @property
    def avoids(self) -> "Replica | None":
        """A replica that it is not to be sent to for now."""

    def remaining_microseconds(self) -> int:
        """Microseconds until its deadline."""

    def started(self) -> bool:
        """Note that a worker has begun it, or is about to; returns whether the replica waits to hear of that."""

    def sent(self, replica: "Replica", lane: "Lane", number: int) -> None:
        """Take note that it is on that lane to that replica now, under that number."""

    def unroutable(self, error: UnlatchError) -> None:
        """Fail: no replica takes it, or could answer it in time."""
