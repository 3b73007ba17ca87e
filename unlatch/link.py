"""A client's lane, from its opening to its end, and the calls on it."""

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from itertools import count
from typing import Any

import grpc
import grpc.aio

from unlatch.arrays import Arguments, ArrivingArrays, RequestBuilder, arrays
from unlatch.common.errors import (
    POSSIBLE_EFFECT,
    Aborted,
    DeadlineExceeded,
    Internal,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    UnlatchError,
    error_class,
    near,
    shown,
)
from unlatch.common.kernel.messages import from_message
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.kernel.tensors import Array
from unlatch.common.lane.body import Body
from unlatch.common.lane.caller import LaneCaller
from unlatch.common.lane.frames import METHOD, ProtocolViolation
from unlatch.common.security.tls import ChannelSecurity
from unlatch.protos.unlatch_pb2 import Descriptor, Reply, Welcome
from unlatch.results import Result, result
from unlatch.trace_context import current

# A token, or a function that returns one each time it is called.
Token = str | Callable[[], str | Awaitable[str]]
# A call that is not begun is sent this many times at most.
_MAX_TIMES_SENT = 4
_REFUSALS = (Unauthenticated.code, PermissionDenied.code)


class Link:
    """A lane to a gateway, on a channel of its own. A lane that is `broken` or `draining` stays so.

    Calls beyond the gateway's window wait here, in order, with their bytes. Each is sent as soon as another one ends.
    """

    def __init__(self, channel: grpc.aio.Channel, target: str, token: Token | None = None) -> None:
        self.kernels: dict[str, KernelSpec] = {}
        self.broken = self.draining = False
        self.loop = asyncio.get_running_loop()
        self._target = target
        self._welcome: Welcome | None = None
        self._token = token
        self._why = "the client closed it"
        # The error with which the gateway refused the caller, if that is why the lane ended.
        self._refusal: UnlatchError | None = None
        self._calls = 0
        self._bytes = 0
        self._waiting: OrderedDict[PendingCall, tuple[Descriptor, Body]] = OrderedDict()
        self._successor: Link | None = None
        # Whether the gateway has refused a call because it ends. Nothing more is sent to it.
        self._refuses = False
        # Begins the ids of calls, which appear in the gateway's log and in the errors of failed calls.
        self._identity = secrets.token_hex(4)
        self._identities = count(1)
        # Set once the gateway has sent its kernels, or the lane has ended.
        self._opened = asyncio.Event()
        self._lane = LaneCaller(self._welcomed, self._drains, _caught, self._token_ends)
        self._renewing: asyncio.Task[None] | None = None
        self._running = asyncio.create_task(self._run(channel))

    @property
    def is_open(self) -> bool:
        """Whether the gateway has sent its kernels, and the lane has not ended."""
        return self._welcome is not None and not self.broken

    async def ready(self, seconds: float) -> None:
        """Wait until the gateway has sent its kernels. Raises Unavailable, or the error of a refused caller."""
        try:
            async with asyncio.timeout(seconds):
                await self._opened.wait()
        except TimeoutError:
            raise Unavailable(f"cannot connect to {self._target}: no answer within {seconds:.3g} s") from None
        if self._refusal is not None:
            raise self._refusal
        if self._welcome is None:
            raise Unavailable(f"cannot connect to {self._target}: {self._why}")

    @property
    def has_room(self) -> bool:
        """Whether the gateway's window lets one more call out."""
        window = self._welcome
        if window is None or self._refuses or self._lane.ended:
            return False
        return self._calls < window.window_calls and self._bytes < window.window_bytes

    async def until_another_is_wanted(self, security: ChannelSecurity) -> None:
        """Wait until the lane has ended, or should be replaced."""
        await security.until_another_is_wanted(self._lane.reopen_asked, self._running)

    def finish(self, successor: "Link") -> None:
        """Close the lane as soon as its calls are answered. Those that wait go to the lane that has replaced it."""
        waiting, self._waiting = self._waiting, OrderedDict()
        self._successor = successor
        self._lane.finish()
        for call, (descriptor, body) in waiting.items():
            self.take(call, descriptor, body)

    @property
    def wants_successor(self) -> bool:
        """Whether the lane has not ended, or has left calls that were not begun."""
        return not self.broken or bool(self._waiting)

    def send_elsewhere(self, call: "PendingCall", descriptor: Descriptor, body: Body) -> None:
        """Send a call that the gateway has refused on the lane that replaces this one, as soon as it is there."""
        self._refuses = True
        if self._successor is None:
            self._waiting[call] = descriptor, body
        else:
            self.take(call, descriptor, body)

    def give_up(self) -> None:
        """Fail the calls that wait: no lane replaces this one."""
        for call in list(self._waiting):
            call.failed(self._broke())

    def request(self, name: str, named: Mapping[str, Any], copy: Callable[[Array], Array]) -> RequestBuilder:
        """A builder of calls of one kernel. Raises NotFound with similar names, Unavailable without a replica."""
        spec = self.kernels.get(name) if isinstance(name, str) else None
        if not self.kernels:
            raise Unavailable(f"the gateway at {self._target} has no ready replica")
        if spec is None:
            told = f"{name[:64]!r}{near(name, self.kernels)}" if isinstance(name, str) else shown(name)
            raise NotFound(f"there is no kernel {told}", field="model_name")
        return RequestBuilder(spec, named, copy)

    def begin(
        self,
        request: RequestBuilder,
        given: Arguments,
        seconds: float | None,
        *,
        began: float | None = None,
        item: int | None = None,
    ) -> "PendingCall":
        """Begin a call: take its arguments' bytes, and send them or let them wait. A call that cannot be has failed.

        Its `seconds` are counted from `began`, by the loop's clock, or from now. `item` is its number in a map.
        """
        call = PendingCall(self, request.spec, f"{self._identity}-{next(self._identities)}", item)
        if seconds is not None:
            call.expire(seconds, self.loop.time() if began is None else began)
        try:
            descriptor, body = request.request(given)
        except UnlatchError as error:
            call.failed(error)
            return call
        descriptor.request.id = call.identity
        descriptor.traceparent, descriptor.tracestate = current()
        self.take(call, descriptor, body)
        return call

    def take(self, call: "PendingCall", descriptor: Descriptor, body: Body) -> None:
        """Send a call, or let it wait behind those that wait already. The descriptor is copied."""
        if self._successor is not None:
            call.link = self._successor
            self._successor.take(call, descriptor, body)
        elif self.broken:
            call.failed(self._broke())
        elif self._waiting or not self.has_room:
            kept = Descriptor()
            kept.CopyFrom(descriptor)
            self._waiting[call] = kept, body
        else:
            self._send(call, descriptor, body)

    def ended(self, call: "PendingCall") -> None:
        """Return a call's part of the window, and send calls that wait for it."""
        if call.number:
            self._calls -= 1
            self._bytes -= call.size
            self._send_waiting()
        else:
            self._waiting.pop(call, None)

    def cancel(self, number: int) -> None:
        """Cancel a call that was sent."""
        self._lane.cancel(number)

    async def close(self) -> None:
        """Close the lane. Calls in flight fail."""
        self._running.cancel()
        with suppress(asyncio.CancelledError):
            await self._running

    def _send(self, call: "PendingCall", descriptor: Descriptor, body: Body) -> None:
        descriptor.remaining_microseconds = call.remaining_microseconds
        call.keep(descriptor, body)
        self._calls += 1
        self._bytes += body.size
        call.number = self._lane.call(descriptor, body, call)

    def _send_waiting(self) -> None:
        while self._waiting and self.has_room:
            call, (descriptor, body) = self._waiting.popitem(last=False)
            self._send(call, descriptor, body)

    def _broke(self) -> Unavailable:
        """The error of a call that waits for this lane, or has been refused on it: it was not begun."""
        return Unavailable(f"the lane to {self._target} broke: {self._why}", not_begun=True)

    async def _run(self, channel: grpc.aio.Channel) -> None:
        stream: Any = None
        try:
            stream = channel.stream_stream(METHOD)(metadata=await self._authorization())
            await self._lane.run(stream)
        except grpc.aio.AioRpcError as error:
            self._why = "the gateway stopped" if self.draining else error.details() or error.code().name
            if error.code().value[0] in _REFUSALS:
                self._refusal = error_class(error.code().value[0])(self._why)
        except Unauthenticated as error:
            self._refusal = error
        except ProtocolViolation as violation:
            self._why = str(violation)
        else:
            self._why = "the gateway closed it"
        finally:
            if self._renewing is not None:
                self._renewing.cancel()
            if stream is not None:
                stream.cancel()
            self.broken = True
            self._opened.set()
            if not self._lane.last:
                self.give_up()
            await channel.close()

    async def _authorization(self) -> tuple[tuple[str, str], ...]:
        """The metadata that the lane is opened with. Raises Unauthenticated."""
        return () if self._token is None else (("authorization", f"Bearer {await _given(self._token)}"),)

    def _drains(self) -> None:
        self.draining = True
        self._lane.reopen_asked.set()

    def _token_ends(self) -> None:
        if self._token is not None and (self._renewing is None or self._renewing.done()):
            self._renewing = asyncio.create_task(self._renew(self._token))

    async def _renew(self, token: Token) -> None:
        # Without a new token the gateway closes the lane when the old one expires, and gives the reason.
        with suppress(Unauthenticated):
            self._lane.renew(await _given(token))

    def _welcomed(self, welcome: Welcome) -> None:
        self._welcome = welcome
        self.kernels = {kernel.name: from_message(kernel) for kernel in welcome.kernels}
        self._opened.set()
        self._send_waiting()


async def _given(token: Token) -> str:
    """The token itself. Raises Unauthenticated if the function that returns it fails, or if it fits no header."""
    try:
        given = token if isinstance(token, str) else token()
        text: object = given if isinstance(given, str) else await given
    except Unauthenticated:
        raise
    except Exception as error:
        # The error's own text may contain secrets.
        raise Unauthenticated(f"no token: the function that returns it raised {type(error).__name__}") from error
    if not isinstance(text, str):
        raise Unauthenticated(f"no token: the function that returns it returned a {type(text).__name__}")
    if not (text.isascii() and text.isprintable()):
        raise Unauthenticated("the token has a line break, or another character that is not printable ASCII")
    return text


def _caught(place: str, error: BaseException) -> UnlatchError:
    """Return the error of a call that met an unexpected exception. Its text may say all: it stays in this process."""
    told = Internal(f"an internal error of the client in {place}: {error!r}")
    told.__cause__ = error
    return told


class PendingCall:
    """A call that is not answered yet. `result` is a future of the kernel's result."""

    def __init__(self, link: Link, spec: KernelSpec, identity: str, item: int | None = None) -> None:
        # Of the call on its lane; 0 until it is sent.
        self.number = self.size = 0
        self.link = link
        self.identity = identity
        self.result: asyncio.Future[Result] = link.loop.create_future()
        self._item = item
        self._timer: asyncio.TimerHandle | None = None
        self._spec = spec
        self._over = False
        self._arriving: ArrivingArrays | None = None
        # The call itself, if it may have to be sent again: only of small calls, since this takes memory.
        self._kept: tuple[Descriptor, Body] | None = None
        self._times_sent = 0

    def keep(self, descriptor: Descriptor, body: Body) -> None:
        """Keep the call while it is sent, in case it is not begun."""
        self.size = body.size
        self._times_sent += 1
        if body.whole and self._times_sent < _MAX_TIMES_SENT:
            kept = Descriptor()
            kept.CopyFrom(descriptor)
            self._kept = kept, body

    def expire(self, seconds: float, since: float) -> None:
        """End the call when its time is over. The gateway enforces the deadline too, but it may have stopped."""
        self._timer = self.link.loop.call_at(since + seconds, self._expired, seconds)

    @property
    def remaining_microseconds(self) -> int:
        """The time that is left, as a lane carries it: 0 for a call without a deadline."""
        return 0 if self._timer is None else max(1, round((self._timer.when() - self.link.loop.time()) * 1e6))

    def replied(self, reply: Reply, body: Body) -> None:
        """Take the reply's arrays, which may still be arriving. It takes the place of a reply that broke off."""
        if self._arriving is not None:
            self._arriving.close()
        outputs = self._spec.outputs
        if body.complete:
            self._give(lambda: arrays(reply.response.tensors, [bytearray(piece) for piece in body.buffers], outputs))
        else:
            self._arriving = arriving = ArrivingArrays(reply, body, outputs)
            body.when_complete(lambda: self._give(arriving.arrays))

    def _give(self, outputs: Callable[[], list[Any]]) -> None:
        """Read the kernel's outputs and end the call with them."""
        try:
            given = result(self._spec.name, [output.name for output in self._spec.outputs], outputs())
        except (UnlatchError, LookupError, TypeError, ValueError) as error:
            # This is the first place where a malformed reply can be noticed. It fails its call, but not the lane.
            self.failed(Internal(f"kernel {self._spec.name} sent a reply that cannot be read: {error}"))
            return
        self._end()
        if not self.result.done():
            self.result.set_result(given)

    def failed(self, error: UnlatchError, reply: Reply | None = None) -> None:
        """End the call with an error. A call that a gateway refuses because it ends is sent on another lane instead.

        Without a reply the lane broke, or the error is the client's own.
        """
        if isinstance(error, Unavailable) and error.not_begun and self._sent_elsewhere():
            return
        self._end()
        if isinstance(error, Unavailable) and reply is None and not error.not_begun and not self._spec.pure:
            error = Aborted(f"{error.message}; {POSSIBLE_EFFECT}")
        if not self.result.done():
            if self._item is not None:
                error.item = self._item
                error.add_note(f"item {self._item} of the map")
            if self.number:
                error.add_note(f"request {self.identity}")
            self.result.set_exception(error)
            # Mark the error as retrieved: a map that ended with an earlier failure never looks at this one.
            self.result.exception()

    def _sent_elsewhere(self) -> bool:
        """Send the call, which was not begun, on another lane, if this one's gateway ends and the call was kept."""
        if not self.link.draining or self._kept is None or self._over:
            return False
        (descriptor, body), self._kept = self._kept, None
        self.link.ended(self)
        self.number = 0
        self.link.send_elsewhere(self, descriptor, body)
        return True

    def abandon(self) -> None:
        """Cancel the call, unless it has ended."""
        if not self._over:
            self._end()
            if self.number:
                self.link.cancel(self.number)

    def _expired(self, seconds: float) -> None:
        self.abandon()
        self.failed(DeadlineExceeded(f"kernel {self._spec.name} did not answer within {seconds:.3g} s"))

    def _end(self) -> None:
        if not self._over:
            self._over = True
            if self._timer is not None:
                self._timer.cancel()
            if self._arriving is not None:
                self._arriving.close()
            self.link.ended(self)
