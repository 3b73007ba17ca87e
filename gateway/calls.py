"""The one path of a call, whichever door it came by: admit, give it its time, route it, answer."""

import asyncio
from time import monotonic
from typing import Protocol

from common.errors import NAMES, DeadlineExceeded, NotFound, ResourceExhausted, Unavailable, UnlatchError
from common.lane import Body, Sink
from gateway.fleet import Fleet
from gateway.metrics import GatewayMetrics
from gateway.replica import Replica
from gateway.settings import GatewaySettings
from protos.unlatch_pb2 import Descriptor, Reply

# A caller chooses the kernel's name; until it is known to be one it is not a label.
_UNKNOWN = "unknown"


class Door(Protocol):
    """Where a call came by and its answer goes. It hears of one end, unless it has abandoned the call."""

    def answer(self, reply: Reply, whole: list[memoryview] | None) -> Sink | None:
        """The reply, with its tensors' bytes where they came along; else say where their pieces are to go."""

    def fail(self, error: UnlatchError) -> None:
        """The call failed; or, after `answer`, the rest of its pieces will not come."""


class Calls:
    """Every call that the gateway holds, and the bounds on them."""

    def __init__(self, fleet: Fleet, settings: GatewaySettings, metrics: GatewayMetrics) -> None:
        self.fleet = fleet
        self.metrics = metrics
        self._settings = settings
        self._live: set[Call] = set()
        self._bytes = 0
        self._none_left = asyncio.Event()
        self._draining = False

    def __len__(self) -> int:
        return len(self._live)

    def begin(self, descriptor: Descriptor, body: Body, seconds: float | None, door: Door) -> "Call":
        """Admit a call with `seconds` to live (None: its caller sets no limit) and send it on its way.

        Raises what a call is refused with: NotFound, ResourceExhausted, DeadlineExceeded, Unavailable.
        """
        request = descriptor.request
        try:
            self._admit(body.size)
            self.fleet.kernel(request.kernel, request.version)
        except UnlatchError as error:
            name = _UNKNOWN if isinstance(error, NotFound) else request.kernel
            self.metrics.call_ended(name, NAMES[error.code], 0.0, None)
            raise
        limit = self._settings.default_timeout_seconds if seconds is None else seconds
        call = Call(self, descriptor, body, min(limit, self._settings.max_timeout_seconds), door)
        self._live.add(call)
        self._bytes += body.size
        self.fleet.route(call)
        return call

    def ended(self, call: "Call") -> None:
        """A call is over."""
        self._live.discard(call)
        self._bytes -= call.body.size
        if not self._live:
            self._none_left.set()

    async def drain(self) -> None:
        """Take no new calls, and wait until every one has ended."""
        self._draining = True
        while self._live:
            self._none_left.clear()
            await self._none_left.wait()

    def _admit(self, size: int) -> None:
        settings = self._settings
        if self._draining:
            raise Unavailable("this gateway is draining and takes no new calls")
        if len(self._live) >= settings.max_live_calls:
            raise ResourceExhausted(
                f"the gateway holds max_live_calls={settings.max_live_calls} already", retry_after_milliseconds=100
            )
        if self._bytes + size > settings.max_live_bytes:
            raise ResourceExhausted(
                f"{size} bytes do not fit: calls hold {self._bytes} of max_live_bytes={settings.max_live_bytes}",
                retry_after_milliseconds=100,
            )


class Call:
    """One call, from its admission to its end. It waits for its own reply on a replica's lane."""

    def __init__(self, calls: Calls, descriptor: Descriptor, body: Body, seconds: float, door: Door) -> None:
        self.descriptor = descriptor
        self.body = body
        self._calls = calls
        self._door = door
        self._began = monotonic()
        self._deadline = self._began + seconds
        self._seconds = seconds
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expired)
        self._replica: Replica | None = None
        self._number = 0
        self._over = False

    def remaining_microseconds(self) -> int:
        """What is left of its time; never 0, which would mean no limit."""
        return max(1, round((self._deadline - monotonic()) * 1e6))

    def sent(self, replica: Replica, number: int) -> None:
        """It is on that replica's lane now, under that number."""
        self._replica, self._number = replica, number

    def replied(self, reply: Reply, whole: list[memoryview] | None) -> Sink | None:
        """The replica has answered."""
        code = NAMES.get(reply.failure.code, "UNKNOWN") if reply.HasField("failure") else "OK"
        self._end(code, reply)
        return self._door.answer(reply, whole)

    def lost(self, error: UnlatchError) -> None:
        """The lane broke before the reply was here whole."""
        self._fail(error)

    def unroutable(self, error: UnlatchError) -> None:
        """No replica takes it any more."""
        self._fail(error)

    def abandon(self) -> None:
        """Its caller has left: free what it holds, here and in the replica. Heard after its end it means nothing."""
        if not self._over:
            expired = monotonic() >= self._deadline
            self._drop()
            self._end("DEADLINE_EXCEEDED" if expired else "CANCELLED", None)

    def _expired(self) -> None:
        self._drop()
        kernel = self.descriptor.request.kernel
        self._fail(DeadlineExceeded(f"kernel {kernel} did not answer within {self._seconds:.3g} s"))

    def _drop(self) -> None:
        if self._replica is None:
            self._calls.fleet.withdraw(self)
        else:
            self._replica.cancel(self._number)

    def _fail(self, error: UnlatchError) -> None:
        if not self._over:
            self._end(NAMES[error.code], None)
        self._door.fail(error)

    def _end(self, code: str, reply: Reply | None) -> None:
        if self._over:
            return
        self._over = True
        self._timer.cancel()
        seconds = monotonic() - self._began
        timings = reply.timings if reply is not None else None
        self._calls.metrics.call_ended(self.descriptor.request.kernel, code, seconds, timings)
        self._calls.ended(self)
        if self._replica is not None:
            self._calls.fleet.ended(self, self._replica)
