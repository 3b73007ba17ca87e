"""A gateway's calls and fleet over replicas whose lanes are the test's: what is sent is seen, and answered by hand."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from unlatch.common.errors import Unavailable, UnlatchError
from unlatch.common.lane.body import Body
from unlatch.common.lane.held_bytes import HeldBytes
from unlatch.common.lane.listener import ReplyListener
from unlatch.common.lane.replies import failed, raised
from unlatch.common.security.tls import ChannelSecurity
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.recorder import Recorder
from unlatch.common.telemetry.tracing import Tracing
from unlatch.gateway.calls.call_log import CallLog
from unlatch.gateway.calls.calls import Calls, LiveCall
from unlatch.gateway.calls.record import Records
from unlatch.gateway.fleet.discovery import Discovery
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.fleet.fleets import Fleets
from unlatch.gateway.fleet.hold import HoldLimits
from unlatch.gateway.fleet.replica import Replica, ReplicaEvents
from unlatch.gateway.metrics import GatewayMetrics
from unlatch.gateway.settings import GatewaySettings
from unlatch.gateway.tenants.tenants import Tenants
from unlatch.protos.unlatch_pb2 import Descriptor, Kernel, Load, Reply, Timings, Welcome

KERNELS = [
    Kernel(name="pure", version="1", pure=True),
    Kernel(name="stateful", version="1", pure=False),
]


@dataclass(eq=False)
class SentCall:
    """A call on a replica's lane."""

    lane: "HandLane"
    number: int
    descriptor: Descriptor
    body: Body
    listener: ReplyListener
    begin: Callable[[], bool] | None
    cancelled: bool = False

    def answer(self, *tensors: bytes, run_seconds: float = 0.0) -> None:
        """Send a whole response."""
        self.listener.replied(response(self, tensors, run_seconds), Body([len(one) for one in tensors], list(tensors)))

    def begin_answer(self, *lengths: int) -> Body:
        """Send a response whose bytes the test feeds."""
        body = Body(lengths)
        self.listener.replied(response(self, [bytes(length) for length in lengths], 0.0), body)
        return body

    def fail(self, error: UnlatchError) -> None:
        """Send a failure."""
        reply = failed(error)
        self.listener.failed(raised(reply.failure), reply)

    def lose(self, *, not_begun: bool = False) -> None:
        """Break the lane under this call. With `not_begun`, the replica had said that the lane was at its end."""
        self.listener.failed(Unavailable("the lane to the server broke before the reply was here", not_begun=not_begun))


def response(call: SentCall, tensors: "list[bytes] | tuple[bytes, ...]", run_seconds: float) -> Reply:
    reply = Reply(lengths=[len(one) for one in tensors], timings=Timings(batch=1, run=round(run_seconds * 1e6)))
    reply.response.kernel, reply.response.id = call.descriptor.request.kernel, call.descriptor.request.id
    return reply


class HandLane:
    """A lane that keeps what is sent until the test answers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.welcomed = True
        self.finishing = self.ended = False
        self.calls: list[SentCall] = []

    def call(
        self, descriptor: Descriptor, body: Body, listener: ReplyListener, started: Callable[[], bool] | None = None
    ) -> int:
        kept = Descriptor()
        kept.CopyFrom(descriptor)
        self.calls.append(SentCall(self, len(self.calls), kept, body, listener, started))
        return len(self.calls) - 1

    def cancel(self, number: int) -> None:
        self.calls[number].cancelled = True

    def finish(self) -> None:
        self.finishing = True


class HandReplica(Replica):
    """A replica on such a lane, with room for `window_calls`."""

    window_calls = 64

    async def run(self) -> None:
        self.open()
        await asyncio.Event().wait()

    def open(self) -> None:
        """Have the replica take calls, on a new lane."""
        self.lane = HandLane(self.target)
        self.reported(self.lane, Load(workers=1, least_calls=64, long_calls=64, window_microseconds=10**6))
        self.welcomed(
            self.lane,
            Welcome(server=self.target, kernels=KERNELS, window_calls=self.window_calls, window_bytes=1 << 30),
        )


class CountedMetrics(GatewayMetrics):
    """Metrics that keep the codes that calls ended with, in their order."""

    codes: list[str]

    def call_ended(self, kernel: str, code: str, seconds: float, timings: Timings | None) -> None:
        self.codes.append(code)
        super().call_ended(kernel, code, seconds, timings)


class CountedErrors(InternalErrors):
    """Internal errors that keep the places where they were caught, in their order."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder)
        self.places: list[str] = []

    def caught(self, place: str, error: BaseException):  # type: ignore[no-untyped-def] # noqa: ANN201 (as the base's)
        self.places.append(place)
        return super().caught(place, error)


@dataclass(eq=False)
class Answer:
    """A caller at a door that counts the ends of its call."""

    replies: list[Reply] = field(default_factory=list)
    bodies: list[Body] = field(default_factory=list)
    errors: list[UnlatchError] = field(default_factory=list)

    def replied(self, reply: Reply, body: Body) -> None:
        self.replies.append(reply)
        self.bodies.append(body)

    def failed(self, error: UnlatchError, _: Reply | None = None) -> None:
        self.errors.append(error)


class HandGateway:
    """Calls over a fleet of such replicas."""

    def __init__(self, replicas: int, **settings: object) -> None:
        names = tuple(f"127.0.0.1:{port}" for port in range(1, replicas + 1))
        self.settings = GatewaySettings.model_validate(
            {"replicas": names or ("unknown:1",), "hold_seconds": 0.0, **settings}
        )
        self.errors = CountedErrors(Recorder())
        self.replicas: list[HandReplica] = []
        self.fleets = Fleets(names, self._fleet)
        self.fleet = self.fleets.of("")
        self.metrics = CountedMetrics(Recorder(), self.errors, lambda: len(self.calls), self.fleets, dict)
        self.metrics.codes = []
        self.calls = Calls(self.fleets, self.settings, Records(self.metrics, Tracing(), CallLog(0, 0)))
        self.live_bytes = HeldBytes("max_live_bytes", self.settings.max_live_bytes)
        self.tenant = Tenants("", self.live_bytes).of("")

    def _fleet(self, targets: tuple[str, ...]) -> Fleet:
        discovery = Discovery(targets, 3600.0, 16, name="gateway", bound=False)
        settings = self.settings
        limits = HoldLimits(settings.hold_seconds, settings.max_held_calls, settings.max_held_bytes)
        return Fleet(discovery, {}, lambda: None, self._joined, self.errors, limits)

    def _joined(self, target: str, events: ReplicaEvents) -> HandReplica:
        replica = HandReplica(target, events, ChannelSecurity(), 0.0, self.errors)
        self.replicas.append(replica)
        return replica

    @property
    def sent(self) -> list[SentCall]:
        """Every call on every lane that was not answered by cancelling, the oldest first on each lane."""
        return [call for replica in self.replicas for call in replica.lane.calls]

    def begin(
        self, kernel: str = "pure", body: bytes | Body = b"body", *, seconds: float = 5.0, name: str = "call"
    ) -> tuple[LiveCall, Answer]:
        """Begin a call, and return it with its caller."""
        descriptor = Descriptor()
        descriptor.request.kernel, descriptor.request.id = kernel, name
        answer = Answer()
        body = body if isinstance(body, Body) else Body([len(body)], [body])
        return self.calls.begin(descriptor, body, seconds, answer, self.tenant), answer

    def at_rest(self) -> bool:
        """Whether nothing is held for any call."""
        held = self.live_bytes.held, self.tenant.in_flight, self.fleet.held, len(self.calls)
        return held == (0, 0, 0, 0) and not any(replica.window.calls for replica in self.replicas)


@asynccontextmanager
async def hand_gateway(replicas: int = 2, **settings: object) -> AsyncIterator[HandGateway]:
    """Such a gateway, whose replicas take calls."""
    gateway = HandGateway(replicas, **settings)
    gateway.fleet.members.start()
    for _ in range(6):
        await asyncio.sleep(0)
    assert all(replica.takes_calls for replica in gateway.replicas)
    try:
        yield gateway
    finally:
        await gateway.fleet.members.close()
