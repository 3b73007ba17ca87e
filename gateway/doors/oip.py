"""The Open Inference Protocol's calls: one by one, or on a stream.

They take the one path of a call (gateway/calls/calls.py); their messages are oip_messages.py's.
"""

import asyncio
from contextlib import suppress
from functools import partial
from typing import Any

import grpc.aio

from unlatch.common.errors import ResourceExhausted, UnlatchError
from unlatch.common.lane.body import Body, Cursor
from unlatch.common.lane.listener import Caught
from unlatch.common.overdue import Overdue
from unlatch.common.telemetry.tracing import TRACEPARENT, TRACESTATE
from unlatch.gateway.calls.calls import Calls, LiveCall
from unlatch.gateway.doors.oip_messages import read_request, write_answer, write_failure, write_response
from unlatch.gateway.doors.rpc_guard import RpcGuard
from unlatch.gateway.tenants.quotas import Tenant
from unlatch.protos.unlatch_pb2 import Descriptor, Reply

# Calls of one stream. More are read once the first of them is answered.
_MAX_IN_FLIGHT = 64


class OipCalls:
    """The service's calls, from bytes to bytes."""

    def __init__(
        self, calls: Calls, guard: RpcGuard, unread: Overdue[Any], max_message_bytes: int, caught: Caught
    ) -> None:
        self._calls = calls
        self._guard = guard
        self._unread = unread
        self._max_message_bytes = max_message_bytes
        self._caught = caught

    async def one(self, message: bytes, context: Any, tenant: Tenant) -> bytes:
        """Answer ModelInfer."""
        call = self._begun(message, _trace_context(context), context, tenant)
        # The call holds what is needed of the message; a failure's traceback would hold the whole.
        del message
        # The RPC's task is done when gRPC has sent the answer. Until then the call and the bytes of its answer count.
        # A callback of the context would be a cycle of references, which keeps the RPC until a garbage collection.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(partial(self._done, call, context))
        try:
            answer = call.response(await call.answered)
        finally:
            context.set_trailing_metadata(call.live.record.trailers())
        self._unread.begin(context)
        return answer

    def _done(self, call: "_OipCall", context: Any, _: object = None) -> None:
        self._unread.end(context)
        call.leave()

    async def stream(self, _: Any, context: Any) -> None:
        """Answer ModelStreamInfer: calls run side by side, their answers leave in order."""
        room = asyncio.Semaphore(_MAX_IN_FLIGHT)
        trace = _trace_context(context)
        last: asyncio.Task[None] | None = None
        self._guard.tenant(context)
        async with asyncio.TaskGroup() as group:
            while isinstance(message := await context.read(), bytes):
                await room.acquire()
                call = self._begun_of_stream(message, trace, context)
                # The call holds what is needed of the message, and counts it.
                del message
                last = group.create_task(self._streamed(call, context, last))
                last.add_done_callback(lambda _: room.release())

    def _begun_of_stream(self, message: bytes, trace: tuple[str, str], context: Any) -> "_OipCall":
        """Begin a stream's call. The caller is authenticated each time: a token may end before its stream does."""
        try:
            return self._begun(message, trace, context, self._guard.tenant(context))
        except UnlatchError as error:
            return self._refused(error, trace)
        except Exception as error:  # noqa: BLE001 (the guard: this call fails, and the stream goes on)
            return self._refused(self._caught("oip_stream", error), trace)

    def _begun(self, message: bytes, trace: tuple[str, str], context: Any, tenant: Tenant) -> "_OipCall":
        """Begin a call; one that is refused has been told so."""
        try:
            descriptor, body = read_request(message, self._max_message_bytes)
        except UnlatchError as error:
            return self._refused(error, trace)
        descriptor.traceparent, descriptor.tracestate = trace
        call = _OipCall(self._max_message_bytes)
        call.live = self._calls.begin(descriptor, body, context.time_remaining(), call, tenant)
        return call

    def _refused(self, error: UnlatchError, trace: tuple[str, str]) -> "_OipCall":
        call = _OipCall(self._max_message_bytes)
        call.live = self._calls.refuse(Descriptor(traceparent=trace[0], tracestate=trace[1]), error, call)
        return call

    async def _streamed(self, call: "_OipCall", context: Any, before: asyncio.Task[None] | None) -> None:
        """Write one answer of a stream, a failure too, after the one before. Until it is written, its call counts."""
        try:
            if before is not None:
                await asyncio.wait((before,))
            # In no variable: a failure's traceback would hold it.
            with suppress(grpc.aio.BaseError):
                # A caller who has left is not written to, and that is no error.
                await context.write(await self._answer(call, context))
        finally:
            self._done(call, context)

    async def _answer(self, call: "_OipCall", context: Any) -> bytes:
        """Return the message of one answer of a stream, which gRPC is given next."""
        try:
            return write_answer(call.response(await call.answered))
        except UnlatchError as error:
            return write_failure(call.live.record.descriptor, error)
        except Exception as error:  # noqa: BLE001 (the guard: this call fails, and the stream goes on)
            return write_failure(call.live.record.descriptor, self._caught("oip_stream", error))
        finally:
            self._unread.begin(context)


def _trace_context(context: Any) -> tuple[str, str]:
    """Return `traceparent` and `tracestate` of an RPC's metadata.

    Of two parents neither is the parent; parts of the state add up.
    """
    parents: list[str] = []
    states: list[str] = []
    for key, value in context.invocation_metadata() or ():
        if key == TRACEPARENT:
            parents.append(value)
        elif key == TRACESTATE:
            states.append(value)
    return (parents[0], ",".join(states)) if len(parents) == 1 else ("", "")


class _OipCall:
    """A call whose caller wants the whole answer in one message. `answered` is the reply, once all of it is here."""

    # Set as soon as the call is begun, or refused.
    live: LiveCall

    def __init__(self, max_message_bytes: int) -> None:
        self.answered: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._max_message_bytes = max_message_bytes
        # The bytes of the reply's tensors. The cursor stands at their start, and so keeps all of them here.
        self._body: Body | None = None
        self._cursor: Cursor | None = None

    def replied(self, reply: Reply, body: Body) -> None:
        """Take the reply, or wait until it is here whole. Raises ResourceExhausted where it fits no message."""
        self._close()
        if body.size > self._max_message_bytes:
            raise ResourceExhausted(
                f"the response is {body.size} bytes, more than max_message_bytes={self._max_message_bytes}; "
                "the Python client's lane carries larger ones"
            )
        self._body = body
        if not body.whole:
            self._cursor = body.subscribe(partial(self._more, reply, body))
        self._more(reply, body)

    def failed(self, error: UnlatchError, _: Reply | None = None) -> None:
        """Have the error raised where the answer is awaited."""
        self._close()
        if not self.answered.done():
            # Its traceback would hold its frames, and with them the message, and us.
            self.answered.set_exception(error.with_traceback(None))
            # A stream that ends early looks at none of its answers.
            self.answered.exception()

    def response(self, reply: Reply) -> bytes:
        """Return the ModelInferResponse, and free what it is made of: the call is held until gRPC has sent it."""
        try:
            return write_response(reply, self._body.buffers if self._body is not None else [])
        finally:
            self._close()

    def leave(self) -> None:
        """Free what the call holds: it is answered, or its caller is gone."""
        self._close()
        self.live.leave()

    def _more(self, reply: Reply, body: Body) -> None:
        # A caller who has left in the meantime has cancelled the future.
        if body.complete and not self.answered.done():
            self.answered.set_result(reply)

    def _close(self) -> None:
        self._body = None
        if self._cursor is not None:
            self._cursor.close()
            self._cursor = None
