"""The client's lane: its calls take the same path as any other, and their pieces pass through as they come."""

import asyncio
from functools import partial

from common.errors import InvalidArgument, UnlatchError
from common.failures import failed
from common.lane import MOST_DESCRIPTOR_BYTES, Body, Sink
from common.lane_server import LaneServer
from gateway.calls import Call, Calls, too_much_said
from protos.unlatch_pb2 import Descriptor, Reply


class ClientDoor:
    """Takes in what clients' lanes bring: `accept` is what each lane calls for each descriptor."""

    def __init__(self, calls: Calls, stalled_call_seconds: float) -> None:
        self._calls = calls
        self._stalled_call_seconds = stalled_call_seconds

    def accept(self, lane: LaneServer, descriptor: Descriptor, whole: list[memoryview] | None) -> "_ClientCall | None":
        """A client's descriptor begins a call, or is refused at once."""
        # Who calls is for authentication to say, whatever a client writes.
        descriptor.tenant = ""
        descriptor.attempt = 0
        body = Body(descriptor.lengths, None if whole is None else list(whole))
        remaining = descriptor.remaining_microseconds
        call = _ClientCall(lane, descriptor.call, body)
        record = self._calls.records.begin(descriptor)
        try:
            if descriptor.ByteSize() > MOST_DESCRIPTOR_BYTES:
                error = too_much_said(descriptor.request.SerializeToString())
                record.refused(error, known=False)
                raise error
            call.call = self._calls.begin(record, body, remaining / 1e6 if remaining else None, call)
        except UnlatchError as error:
            call.fail(error)
        if call.answered:
            return None
        call.wait_for_bytes(self._stalled_call_seconds)
        return call


class _ClientCall:
    """A client's call as its lane holds it: what arrives goes to the call's body, its answer to the lane."""

    def __init__(self, lane: LaneServer, number: int, body: Body) -> None:
        self.call: Call | None = None
        self.answered = False
        self._lane = lane
        self._number = number
        self._body = body
        # The one that is on its way.
        self._answer: Body | None = None
        self._has_fed = False
        self._waiting: asyncio.TimerHandle | None = None

    @property
    def complete(self) -> bool:
        return self._body.complete

    def feed(self, piece: memoryview) -> None:
        self._has_fed = True
        self._body.feed(piece)

    def wait_for_bytes(self, seconds: float) -> None:
        """See to it that more of its bytes come within the time, as long as there are more."""
        if not self._body.complete:
            self._has_fed = False
            self._waiting = asyncio.get_running_loop().call_later(seconds, self._waited, seconds)

    def abandon(self) -> None:
        self.answered = True
        self._leave()

    def answer(self, reply: Reply, tensors: list[memoryview] | None) -> Sink | None:
        self.answered = True
        body = Body(reply.lengths, None if tensors is None else list(tensors))
        if body.whole:
            self._lane.reply(self._number, reply, body)
            return None
        self._answer = body
        self._lane.reply(self._number, reply, body, partial(self._sent, body))
        return body

    def _sent(self, body: Body) -> None:
        # Another answer may have taken its place.
        if body is self._answer:
            self._leave()

    def fail(self, error: UnlatchError) -> None:
        self.answered = True
        self._lane.reply(self._number, failed(error), Body((), []))

    def _waited(self, seconds: float) -> None:
        if self._has_fed:
            self.wait_for_bytes(seconds)
        elif not self.answered:
            self._leave()
            self.fail(InvalidArgument(f"nothing of the call's bytes came for stalled_call_seconds={seconds:g}"))

    def _leave(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        if self.call is not None:
            self.call.leave()
