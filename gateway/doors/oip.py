"""The Open Inference Protocol's door: where its calls come in, one by one or on a stream.

They take the one path of a call (gateway/calls/calls.py); their messages are oip_messages.py's.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc.aio

from unlatch.common.errors import ResourceExhausted, UnlatchError
from unlatch.common.lane.body import Body, Buffer, Sink
from unlatch.common.telemetry.tracing import TRACEPARENT, TRACESTATE
from unlatch.gateway.calls.calls import Call, Calls
from unlatch.gateway.calls.record import Record
from unlatch.gateway.doors.oip_messages import read_request, write_answer, write_failure, write_response
from unlatch.gateway.doors.rpc_guard import Entrance
from unlatch.gateway.tenants.quotas import Tenant
from unlatch.protos.unlatch_pb2 import Descriptor, Reply

SERVICE = "inference.GRPCInferenceService"

# Of one stream: more are read once the first of them is answered.
_MOST_IN_FLIGHT = 64


class Infer:
    """The service's calls, from bytes to bytes."""

    def __init__(self, calls: Calls, entrance: Entrance, max_message_bytes: int) -> None:
        self._calls = calls
        self._entrance = entrance
        self._max_message_bytes = max_message_bytes

    async def one(self, message: bytes, context: Any, tenant: Tenant) -> bytes:
        """ModelInfer."""
        begun = self._begun(message, _trace_context(context), context, tenant)
        # What is held of it from here on the call holds: a failure's traceback would hold the whole.
        del message
        try:
            return write_response(*await begun.caller.answered)
        finally:
            begun.leave()
            context.set_trailing_metadata(begun.record.trailers())

    async def stream(self, _: Any, context: Any) -> None:
        """ModelStreamInfer: calls run side by side, their answers leave in order."""
        room = asyncio.Semaphore(_MOST_IN_FLIGHT)
        trace = _trace_context(context)
        last: asyncio.Task[None] | None = None
        self._entrance.tenant(context)
        async with asyncio.TaskGroup() as group:
            while isinstance(message := await context.read(), bytes):
                await room.acquire()
                begun = self._looked_at(message, trace, context)
                # What is held of it from here on the call holds, and is counted.
                del message
                last = group.create_task(_streamed(begun, context, last))
                last.add_done_callback(lambda _: room.release())

    def _looked_at(self, message: bytes, trace: tuple[str, str], context: Any) -> "_Begun":
        """The same of a stream, whose caller is looked at each time: a token may end before its stream does."""
        try:
            tenant = self._entrance.tenant(context)
        except UnlatchError as error:
            return self._refused(error, trace)
        return self._begun(message, trace, context, tenant)

    def _begun(self, message: bytes, trace: tuple[str, str], context: Any, tenant: Tenant) -> "_Begun":
        """A call that is under way; or one whose caller has been told already why it is not."""
        try:
            descriptor, body = read_request(message, self._max_message_bytes)
        except UnlatchError as error:
            return self._refused(error, trace)
        caller = _Caller(self._max_message_bytes)
        record = self._record(descriptor, trace)
        try:
            call = self._calls.begin(record, body, context.time_remaining(), caller, tenant)
        except UnlatchError as error:
            caller.fail(error)
            return _Begun(caller, record, None)
        return _Begun(caller, record, call)

    def _refused(self, error: UnlatchError, trace: tuple[str, str]) -> "_Begun":
        caller, record = _Caller(self._max_message_bytes), self._record(Descriptor(), trace)
        record.refused(error, known=False)
        caller.fail(error)
        return _Begun(caller, record, None)

    def _record(self, descriptor: Descriptor, trace: tuple[str, str]) -> Record:
        descriptor.traceparent, descriptor.tracestate = trace
        return self._calls.records.begin(descriptor)


@dataclass(frozen=True, slots=True)
class _Begun:
    """A call that came by this door, if it was let in, and who waits for its answer."""

    caller: "_Caller"
    record: Record
    call: Call | None

    def leave(self) -> None:
        """Nobody waits for it any more."""
        if self.call is not None:
            self.call.leave()


def _trace_context(context: Any) -> tuple[str, str]:
    """`traceparent` and `tracestate` of an RPC's metadata. Of two parents neither is it; parts of the state add up."""
    parents: list[str] = []
    states: list[str] = []
    for key, value in context.invocation_metadata() or ():
        if key == TRACEPARENT:
            parents.append(value)
        elif key == TRACESTATE:
            states.append(value)
    return (parents[0], ",".join(states)) if len(parents) == 1 else ("", "")


async def _streamed(begun: "_Begun", context: Any, before: asyncio.Task[None] | None) -> None:
    """One answer of a stream, a failure too. What it holds is held until it has been written."""
    try:
        try:
            reply, tensors = await begun.caller.answered
        except UnlatchError as error:
            answer = write_failure(begun.record.descriptor, error)
            await _ended(before)
        else:
            await _ended(before)
            answer = write_answer(write_response(reply, tensors))
        # A caller who has left is not written to, and that is no error.
        with suppress(grpc.aio.BaseError):
            await context.write(answer)
    finally:
        begun.leave()


async def _ended(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        await asyncio.wait((task,))


class _Caller:
    """A caller who wants the whole answer in one message."""

    def __init__(self, max_message_bytes: int) -> None:
        self.answered: asyncio.Future[tuple[Reply, list[Buffer]]] = asyncio.get_running_loop().create_future()
        self._max_message_bytes = max_message_bytes

    def answer(self, reply: Reply, tensors: list[memoryview] | None) -> Sink | None:
        size = sum(reply.lengths)
        if size > self._max_message_bytes:
            raise ResourceExhausted(
                f"the response is {size} bytes, more than max_message_bytes={self._max_message_bytes}; "
                "the Python client's lane carries larger ones"
            )
        if tensors is not None:
            self._done(reply, list(tensors))
            return None
        body = Body(reply.lengths)

        def more() -> None:
            if body.complete:
                # The body holds this function, and this function the body.
                body.on_more = None
                self._done(reply, body.buffers)

        body.on_more = more
        more()
        return body

    def _done(self, reply: Reply, buffers: list[Buffer]) -> None:
        # The caller may have left in the meantime, which cancels the future.
        if not self.answered.done():
            self.answered.set_result((reply, buffers))

    def fail(self, error: UnlatchError) -> None:
        if not self.answered.done():
            # Its traceback would hold whoever caught it, and with that the message, and us.
            self.answered.set_exception(error.with_traceback(None))
            # A stream that ends early looks at none of its answers.
            self.answered.exception()
