"""The interface of a call in the fleet. Its implementation is Execution (gateway/calls/execution.py)."""

from typing import TYPE_CHECKING, Protocol

from unlatch.common.errors import UnlatchError
from unlatch.common.lane.body import Body
from unlatch.common.lane.listener import ReplyListener
from unlatch.common.waiting.demand import Demand, Estimate
from unlatch.protos.unlatch_pb2 import Descriptor

if TYPE_CHECKING:
    from unlatch.gateway.fleet.replica import Lane, Replica


class Routed(ReplyListener, Protocol):
    """A call that needs a replica. The fleet may not import gateway/calls, so it uses this interface."""

    descriptor: Descriptor
    body: Body
    # The expected time of its run on a replica of the fleet's mean speed. The fleet sets it when it routes the call,
    # and does not change it while the call is held or on its way.
    estimate: Estimate

    @property
    def demand(self) -> Demand:
        """The demand of its callers."""

    @property
    def avoids(self) -> "Replica | None":
        """A replica that it must not be sent to for now."""

    def remaining_microseconds(self) -> int:
        """Microseconds until its deadline."""

    def started(self) -> bool:
        """Note that a worker has begun it, or is about to. Returns whether the replica waits for a confirmation."""

    def sent(self, replica: "Replica", lane: "Lane", number: int) -> None:
        """Note that it was sent on this lane to this replica, under this number."""

    def unroutable(self, error: UnlatchError) -> None:
        """Fail its calls: no replica serves it, or none could answer it in time."""
