"""A client's lane, from its opening to its end, and the calls on it."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import grpc
import grpc.aio

from unlatch.arrays import ArrivingArrays, RequestBuilder, arrays
from unlatch.common.errors import (
    DeadlineExceeded,
    Internal,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    UnlatchError,
    from_code,
    near,
)
from unlatch.common.kernel.messages import from_message
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.lane.body import Body
from unlatch.common.lane.caller import LaneCaller
from unlatch.common.lane.frames import METHOD, ProtocolViolation
from unlatch.common.security.tls import ChannelSecurity
from unlatch.protos.unlatch_pb2 import Reply, Welcome
from unlatch.results import Result, result
from unlatch.trace_context import current

# A token, or a function that returns one each time it is called.
Token = str | Callable[[], str | Awaitable[str]]
_REFUSALS = (Unauthenticated.code, PermissionDenied.code)


class Link:
    """A lane to a gateway, on a channel of its own. A lane that is `broken` or `finishing` stays so."""

    def __init__(self, channel: grpc.aio.Channel, target: str, token: Token | None = None) -> None:
        self.kernels: dict[str, KernelSpec] = {}
        self.broken = self.finishing = False
        self._target = target
        self._welcome: Welcome | None = None
        self._token = token
        self._why = "the gateway did not answer"
        # The error with which the gateway refused the caller, if that is why the lane ended.
        self._refusal: UnlatchError | None = None
        self._calls = 0
        self._bytes = 0
        # Begins the ids of calls, which appear in the gateway's log and in the errors of failed calls.
        self._identity = secrets.token_hex(4)
        self._identities = count(1)
        # Set whenever something changes that a task may wait for.
        self._changed = asyncio.Event()
        self._lane = LaneCaller(self._welcomed, lambda: None, _caught, self._token_ends)
        self._renewing: asyncio.Task[None] | None = None
        self._running = asyncio.create_task(self._run(channel))

    async def ready(self, seconds: float) -> None:
        """Wait until the gateway has sent its kernels. Raises Unavailable, or the error of a refused caller."""
        try:
            async with asyncio.timeout(seconds):
                while self._welcome is None and not self.broken:
                    await self._change()
        except TimeoutError:
            pass
        if self._refusal is not None:
            raise self._refusal
        if self._welcome is None:
            raise Unavailable(f"no lane to {self._target}: {self._why}")

    @property
    def has_room(self) -> bool:
        """Whether the gateway's window lets one more call out."""
        window = self._welcome
        return window is not None and self._calls < window.window_calls and self._bytes < window.window_bytes

    async def room(self) -> None:
        """Wait until the window lets one more call out, or until this lane takes no more calls."""
        while not self.has_room and not self.broken and not self.finishing:
            await self._change()

    async def until_another_is_wanted(self, security: ChannelSecurity) -> None:
        """Wait until the lane has ended, or should be replaced."""
        await security.until_another_is_wanted(self._lane.reopen_asked, self._running)

    def finish(self) -> None:
        """Close the lane as soon as its calls are answered, since another lane has replaced it."""
        self.finishing = True
        self._lane.finish()
        self._tell()

    def request(self, name: str, named: Mapping[str, Any]) -> RequestBuilder:
        """A builder of calls of one kernel. Raises NotFound with similar names, Unavailable without a replica."""
        spec = self.kernels.get(name)
        if not self.kernels:
            raise Unavailable(f"the gateway at {self._target} has no ready replica")
        if spec is None:
            raise NotFound(f"there is no kernel {name[:64]!r}{near(name, self.kernels)}", field="model_name")
        return RequestBuilder(spec, named)

    def begin(self, request: RequestBuilder, given: Sequence[Any], seconds: float | None) -> "PendingCall":
        """Send a call. Raises InvalidArgument for arrays that cannot travel, Unavailable when the lane has broken."""
        if self.broken:
            raise Unavailable(f"the lane to {self._target} broke: {self._why}")
        descriptor, body = request.request(given)
        descriptor.remaining_microseconds = 0 if seconds is None else max(1, round(seconds * 1e6))
        descriptor.request.id = f"{self._identity}-{next(self._identities)}"
        descriptor.traceparent, descriptor.tracestate = current()
        call = PendingCall(self, request.spec, descriptor.request.id, body.size, seconds)
        self._calls += 1
        self._bytes += body.size
        call.number = self._lane.call(descriptor, body, call)
        return call

    def ended(self, size: int) -> None:
        """Return a finished call's part of the window."""
        self._calls -= 1
        self._bytes -= size
        self._tell()

    def cancel(self, number: int) -> None:
        """Cancel a call."""
        self._lane.cancel(number)

    async def close(self) -> None:
        """Close the lane. Calls in flight fail."""
        self._running.cancel()
        with suppress(asyncio.CancelledError):
            await self._running

    async def _run(self, channel: grpc.aio.Channel) -> None:
        stream: Any = None
        try:
            stream = channel.stream_stream(METHOD)(metadata=await self._authorization())
            await self._lane.run(stream)
        except grpc.aio.AioRpcError as error:
            self._why = error.details() or error.code().name
            if error.code().value[0] in _REFUSALS:
                self._refusal = from_code(error.code().value[0], self._why)
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
            self._tell()
            await channel.close()

    async def _authorization(self) -> tuple[tuple[str, str], ...]:
        """The metadata that the lane is opened with. Raises Unauthenticated."""
        return () if self._token is None else (("authorization", f"Bearer {await _given(self._token)}"),)

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
        self._tell()

    def _tell(self) -> None:
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


async def _given(token: Token) -> str:
    """The token itself. Raises Unauthenticated if the function that returns it fails."""
    if isinstance(token, str):
        return token
    try:
        given = token()
        return given if isinstance(given, str) else await given
    except Unauthenticated:
        raise
    except Exception as error:
        # The error's own text may contain secrets.
        raise Unauthenticated(f"no token: the function that returns it raised {type(error).__name__}") from error


def _caught(place: str, error: BaseException) -> UnlatchError:
    """Return the error of a call that met an unexpected exception. Its text may say all: it stays in this process."""
    told = Internal(f"an internal error of the client in {place}: {error!r}")
    told.__cause__ = error
    return told


class PendingCall:
    """A call in flight. `result` is a future of the kernel's result."""

    def __init__(self, link: Link, spec: KernelSpec, identity: str, size: int, seconds: float | None) -> None:
        self.number = 0
        self.identity = identity
        loop = asyncio.get_running_loop()
        self.result: asyncio.Future[Result] = loop.create_future()
        self._seconds = seconds
        # The gateway enforces the deadline too, but it may have stopped.
        self._timer = None if seconds is None else loop.call_later(seconds, self._expired)
        self._link = link
        self._spec = spec
        self._size = size
        self._over = False
        self._arriving: ArrivingArrays | None = None

    def replied(self, reply: Reply, body: Body) -> None:
        """Take the reply's arrays, which may still be arriving."""
        if body.complete:
            self._give(lambda: arrays(reply.response.tensors, [bytearray(piece) for piece in body.buffers]))
        else:
            self._arriving = arriving = ArrivingArrays(reply, body)
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

    def failed(self, error: UnlatchError, _: Reply | None = None) -> None:
        """End the call with an error."""
        self._end()
        if not self.result.done():
            error.add_note(f"request {self.identity}")
            self.result.set_exception(error)
            # Mark the error as retrieved: a map that ended with an earlier failure never looks at this one.
            self.result.exception()

    def abandon(self) -> None:
        """Cancel the call, unless it has ended."""
        if not self._over:
            self._end()
            self._link.cancel(self.number)

    def _expired(self) -> None:
        self.abandon()
        self.failed(DeadlineExceeded(f"kernel {self._spec.name} did not answer within {self._seconds:.3g} s"))

    def _end(self) -> None:
        if not self._over:
            self._over = True
            if self._timer is not None:
                self._timer.cancel()
            if self._arriving is not None:
                self._arriving.close()
            self._link.ended(self._size)
