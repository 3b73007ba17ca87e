"""The client's lane: its calls take the same path as any other, and their pieces pass through as they come."""

from common.errors import UnlatchError
from common.failures import failed
from common.lane import Body, Sink
from common.lane_server import LaneServer
from gateway.calls import Call, Calls
from protos.unlatch_pb2 import Descriptor, Reply


class ClientDoor:
    """Takes in what clients' lanes bring: `accept` is what each lane calls for each descriptor."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def accept(self, lane: LaneServer, descriptor: Descriptor, whole: list[memoryview] | None) -> "_ClientCall | None":
        """A client's descriptor begins a call, or is refused at once."""
        # Who calls is for authentication to say, whatever a client writes.
        descriptor.tenant = ""
        body = Body(descriptor.lengths, None if whole is None else list(whole))
        remaining = descriptor.remaining_microseconds
        call = _ClientCall(lane, descriptor.call, body)
        try:
            call.call = self._calls.begin(descriptor, body, remaining / 1e6 if remaining else None, call)
        except UnlatchError as error:
            call.fail(error)
        return None if call.over else call


class _ClientCall:
    """A client's call as its lane holds it: what arrives goes to the call's body, its answer to the lane."""

    def __init__(self, lane: LaneServer, number: int, body: Body) -> None:
        self.call: Call | None = None
        self.over = False
        self._lane = lane
        self._number = number
        self._body = body

    @property
    def complete(self) -> bool:
        return self._body.complete

    def feed(self, piece: memoryview) -> None:
        self._body.feed(piece)

    def abandon(self) -> None:
        self.over = True
        if self.call is not None:
            self.call.abandon()

    def answer(self, reply: Reply, whole: list[memoryview] | None) -> Sink | None:
        if self.over:
            return None
        self.over = True
        body = Body(reply.lengths, None if whole is None else list(whole))
        self._lane.reply(self._number, reply, body)
        return body

    def fail(self, error: UnlatchError) -> None:
        self.over = True
        self._lane.reply(self._number, failed(error), Body((), []))
