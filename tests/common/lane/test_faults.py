"""Unexpected exceptions at every entry point of a lane: each costs one call at most, and the lane goes on.

A lane of a stream, whose two ends exchange messages, and a lane within one process, whose ends call each other.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from tests.support.guards import Caught
from tests.support.watching import until
from unlatch.common.errors import Internal, InvalidArgument, Unavailable, UnlatchError
from unlatch.common.lane.body import WHOLE_BYTES, Body, Cursor
from unlatch.common.lane.caller import LaneCaller
from unlatch.common.lane.listener import CallGuard
from unlatch.common.lane.local import LocalLane
from unlatch.common.lane.outbox import Outbox, _Draft
from unlatch.common.lane.replies import failed
from unlatch.common.lane.server import LaneServer, ServingEnd
from unlatch.protos.unlatch_pb2 import Descriptor, Load, Reply, Welcome

LARGE = 3 * WHOLE_BYTES
# Larger than what a local lane takes at once.
HUGE = 40 * WHOLE_BYTES


class Fault(Exception):
    """An exception that no code expects."""


def once(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Raise at the first call, and do what `inner` does from then on."""
    calls = 0

    def raising(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise Fault
        return inner(*arguments, **named)

    return raising


@dataclass(eq=False)
class Listener:
    """A caller that counts the ends of its call, and reads the reply's body by a cursor."""

    ends: list[UnlatchError | bytes] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    begun: int = 0

    def started(self) -> bool:
        self.begun += 1
        return True

    def replied(self, _: Reply, body: Body) -> None:
        self.body = body
        if body.complete:
            self._done()
        else:
            self.cursor = body.subscribe(self.woken)
            body.when_complete(self._done)

    def woken(self) -> None:
        """More has come."""

    def failed(self, error: UnlatchError, _: Reply | None = None) -> None:
        self._end(error)

    def _done(self) -> None:
        self._end(b"".join(self.body.buffers))

    def _end(self, end: UnlatchError | bytes) -> None:
        self.ends.append(end)
        self.ended.set()


class Echo:
    """A call at the serving end: answers with its own bytes once they are here."""

    def __init__(self, ends: "Ends", number: int, body: Body) -> None:
        self.ends = ends
        self.number = number
        self.body = body
        self.abandoned = 0
        if body.complete:
            self.answer()

    def feed(self, piece: memoryview) -> None:
        self.body.feed(piece)
        if self.body.complete:
            self.answer()

    def answer(self) -> None:
        if self.ends.announced:
            self.ends.server.started(self.number, self.heard)
        elif not self.ends.silent:
            self.reply()

    def heard(self) -> None:
        self.reply()

    def reply(self) -> None:
        if self.ends.refuses:
            self.ends.server.reply(self.number, failed(InvalidArgument("refused")), Body((), []))
            return
        given = [bytes(b"".join(self.body.buffers))]
        self.ends.server.reply(self.number, Reply(), Body([len(given[0])], list(given)), self.ends.sent)

    def abandon(self) -> None:
        self.abandoned += 1


class Turns:
    """Takes work at once."""

    async def take(self, work: Callable[[], None]) -> None:
        work()


class Pipe:
    """A direction of a stream."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[object] = asyncio.Queue()

    async def write(self, message: bytes) -> None:
        self._messages.put_nowait(message)

    async def read(self) -> object:
        return await self._messages.get()

    async def done_writing(self) -> None:
        self._messages.put_nowait(None)


class Stream:
    """The calling end of two pipes."""

    def __init__(self, out: Pipe, into: Pipe) -> None:
        self.write, self.read, self.done_writing = out.write, into.read, out.done_writing


class Ends:
    """Both ends of one lane. What each does may be replaced by the test."""

    caller: LaneCaller | LocalLane
    server: ServingEnd

    def __init__(self) -> None:
        self.caught = Caught()
        self.calls: dict[int, Echo] = {}
        self.announced = self.silent = self.refuses = False
        self.heard: list[str] = []
        self.out, self.into = Pipe(), Pipe()

    async def run(self) -> None:
        """Carry calls until the lane breaks."""
        raise NotImplementedError

    async def break_off(self) -> None:
        """Have the calling end see that the lane has broken."""
        raise NotImplementedError

    def now(self, name: str) -> Callable[..., None]:
        """Call the method of this name as it is then: a test may have replaced it."""

        def call(*arguments: object) -> None:
            getattr(self, name)(*arguments)

        return call

    def accept(self, _: ServingEnd, descriptor: Descriptor, whole: list[memoryview] | None) -> Echo | None:
        call = self.taken(descriptor, whole)
        self.calls[descriptor.call] = call
        return call

    def taken(self, descriptor: Descriptor, whole: list[memoryview] | None) -> Echo:
        body = Body(descriptor.lengths[:], None if whole is None else list(whole))
        return Echo(self, descriptor.call, body)

    def welcomed(self, welcome: Welcome) -> None:
        self.heard.append(welcome.server)

    def drains(self) -> None:
        self.heard.append("drains")

    def loaded(self, load: Load) -> None:
        self.heard.append(f"load {load.workers}")

    def renewed(self, token: str) -> None:
        self.heard.append(token)

    def sent(self) -> None:
        """Take the reply's buffers back."""

    def call(self, size: int = 10, listener: Listener | None = None) -> Listener:
        listener = listener or Listener()
        self.caller.call(Descriptor(), Body([size], [bytes(size)]), listener, listener.started)
        return listener

    async def served(self, size: int = 10) -> None:
        """Make one more call, which has its answer."""
        self.announced = self.silent = self.refuses = False
        listener = self.call(size)
        await ended(listener)
        assert listener.ends == [bytes(size)]


class StreamEnds(Ends):
    """The ends of a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.caller = LaneCaller(self.now("welcomed"), self.now("drains"), self.caught, on_load=self.now("loaded"))
        self.server = LaneServer(self.accept, self.caught, self.now("renewed"))

    async def run(self) -> None:
        serving = asyncio.ensure_future(self.server.run(self.out.read, self.into.write, Turns()))  # type: ignore[attr-defined]
        try:
            await self.caller.run(Stream(self.out, self.into))  # type: ignore[call-arg]
        finally:
            serving.cancel()
            await asyncio.wait((serving,))

    async def break_off(self) -> None:
        await self.into.done_writing()


class LocalEnds(Ends):
    """The ends within one process, which are one object."""

    def __init__(self) -> None:
        super().__init__()
        lane = LocalLane(self.accept, self.now("welcomed"), self.now("drains"), self.now("loaded"), self.caught)
        self.caller = self.server = lane

    async def run(self) -> None:
        await self.caller.run()  # type: ignore[call-arg]

    async def break_off(self) -> None:
        self.caller.close()  # type: ignore[union-attr]


async def ended(*listeners: Listener) -> None:
    """Wait until each has an end, and see that it is the only one."""
    async with asyncio.timeout(5):
        for listener in listeners:
            await listener.ended.wait()
    await asyncio.sleep(0.01)
    assert [len(listener.ends) for listener in listeners] == [1] * len(listeners)


OpenLane = Callable[[], AbstractAsyncContextManager[Ends]]


@asynccontextmanager
async def opened(kind: type[Ends]) -> AsyncIterator[Ends]:
    """Both ends, running. The calling end has been greeted."""
    ends = kind()
    ends.server.welcome(Welcome(server="echo", window_calls=64, window_bytes=1 << 30))
    running = asyncio.ensure_future(ends.run())
    try:
        await until(lambda: ends.heard == ["echo"], "it is greeted")
        yield ends
    finally:
        running.cancel()
        await asyncio.wait((running,))


@pytest.fixture(params=[StreamEnds, LocalEnds], ids=["stream", "local"])
def lane(request: pytest.FixtureRequest) -> OpenLane:
    """Opens a lane of either kind."""
    return partial(opened, request.param)


Break = Callable[[Ends, Listener, pytest.MonkeyPatch], None]


def _replied(_: Ends, listener: Listener, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(listener, "replied", once(listener.replied))


def _piece(_: Ends, listener: Listener, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(listener, "woken", once(listener.woken))


def _started(ends: Ends, listener: Listener, patch: pytest.MonkeyPatch) -> None:
    ends.announced = True
    patch.setattr(listener, "started", once(listener.started))


def _accept(ends: Ends, _: Listener, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ends, "taken", once(ends.taken))


def _fed(_: Ends, __: Listener, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Echo, "feed", once(Echo.feed))


def _heard(ends: Ends, _: Listener, patch: pytest.MonkeyPatch) -> None:
    ends.announced = True
    patch.setattr(Echo, "heard", once(Echo.heard))


def _packed(_: Ends, __: Listener, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_Draft, "packed", once(_Draft.packed))


def _next(_: Ends, __: Listener, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cursor, "next", once(Cursor.next))


@pytest.mark.parametrize(
    ("kind", "break_", "size", "place"),
    [
        (StreamEnds, _replied, 10, "lane_reply"),
        (StreamEnds, _replied, LARGE, "lane_reply"),
        (StreamEnds, _piece, LARGE, "lane_piece"),
        (StreamEnds, _started, 10, "lane_started"),
        (StreamEnds, _accept, 10, "lane_call"),
        (StreamEnds, _accept, LARGE, "lane_call"),
        (StreamEnds, _fed, LARGE, "lane_piece"),
        (StreamEnds, _heard, 10, "lane_started"),
        (StreamEnds, _packed, 10, "lane_writer"),
        (StreamEnds, _packed, LARGE, "lane_writer"),
        (StreamEnds, _next, LARGE, "lane_writer"),
        (LocalEnds, _replied, 10, "lane_reply"),
        (LocalEnds, _replied, HUGE, "lane_reply"),
        (LocalEnds, _started, 10, "lane_started"),
        (LocalEnds, _accept, 10, "lane_call"),
        (LocalEnds, _accept, HUGE, "lane_call"),
        (LocalEnds, _fed, HUGE, "lane_piece"),
        (LocalEnds, _heard, 10, "lane_started"),
        (LocalEnds, _next, HUGE, "lane_piece"),
    ],
)
async def test_fault_costs_its_call_alone(
    kind: type[Ends], break_: Break, size: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call ends once, with INTERNAL and an id; calls of later messages and the lane know nothing of it."""
    async with opened(kind) as ends:
        listener = Listener()
        break_(ends, listener, monkeypatch)
        ends.call(size, listener)
        await ended(listener)
        assert isinstance(listener.ends[0], Internal)
        assert f"an internal error in {place}" in str(listener.ends[0])
        assert ends.caught.places == [place]
        await until(lambda: not ends.server.busy, "the serving end has forgotten it")
        await ends.served()
        await ends.served(LARGE)
        await ends.served(HUGE)


async def test_fault_in_a_message_costs_one_of_its_calls(lane: OpenLane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several calls that one message brings, and whose replies another message brings, the others are answered."""
    for name in ("taken", "replied"):
        async with lane() as ends:
            listeners = [Listener() for _ in range(8)]
            target = ends if name == "taken" else listeners[0]
            monkeypatch.setattr(target, name, once(getattr(target, name)))
            for listener in listeners:
                ends.call(10, listener)
            await ended(*listeners)
            assert [isinstance(listener.ends[0], Internal) for listener in listeners] == [True] + [False] * 7
            assert len(ends.caught.places) == 1


async def test_failure_that_cannot_be_told_is_told_again(lane: OpenLane, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener that raises when its call has failed hears INTERNAL instead."""
    async with lane() as ends:
        ends.refuses = True
        listener = Listener()
        monkeypatch.setattr(listener, "failed", once(listener.failed))
        ends.call(10, listener)
        await ended(listener)
        assert isinstance(listener.ends[0], Internal)
        assert ends.caught.places == ["lane_reply"]
        await ends.served()


async def test_lane_that_breaks_tells_the_others(lane: OpenLane, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener that raises when the lane breaks is counted, and the listeners after it are told."""
    async with lane() as ends:
        ends.silent = True
        listeners = [ends.call() for _ in range(100)]
        await until(lambda: ends.calls, "calls have come")
        monkeypatch.setattr(listeners[0], "failed", once(listeners[0].failed))
        await ends.break_off()
        await ended(*listeners[1:])
        assert all(isinstance(listener.ends[0], Unavailable) for listener in listeners[1:])
        assert ends.caught.places == ["lane_failure"]


async def test_fault_as_a_call_is_cancelled(lane: OpenLane, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that raises when it is abandoned is forgotten, and so are those cancelled with it."""
    async with lane() as ends:
        ends.silent = True
        for _ in range(3):
            ends.call()
        await until(lambda: len(ends.calls) == 3, "all calls have come")
        monkeypatch.setattr(Echo, "abandon", once(Echo.abandon))
        for number in list(ends.calls):
            ends.caller.cancel(number)
        await until(lambda: not ends.server.busy, "all are cancelled")
        assert sorted(call.abandoned for call in ends.calls.values()) == [0, 1, 1]
        assert ends.caught.places == ["lane_cancel"]
        await ends.served()


async def test_fault_as_a_lane_ends(lane: OpenLane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other call of a lane that has ended is abandoned."""
    async with lane() as ends:
        ends.silent = True
        for _ in range(3):
            ends.call()
        await until(lambda: len(ends.calls) == 3, "all calls have come")
        monkeypatch.setattr(Echo, "abandon", once(Echo.abandon))
    assert sorted(call.abandoned for call in ends.calls.values()) == [0, 1, 1]
    assert "lane_cancel" in ends.caught.places


@pytest.mark.parametrize(
    ("name", "say", "place"),
    [
        ("loaded", lambda ends: ends.server.load(Load(workers=3)), "lane_frame"),
        ("welcomed", lambda ends: ends.server.welcome(Welcome(server="again")), "lane_frame"),
        ("drains", lambda ends: ends.server.draining(), "lane_frame"),
    ],
)
async def test_fault_of_a_frame_about_the_lane(
    lane: OpenLane, name: str, say: Callable[[Ends], None], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls in the same message and after it are served, and the next frame of the kind is taken."""
    async with lane() as ends:
        monkeypatch.setattr(ends, name, once(getattr(ends, name)))
        say(ends)
        await ends.served()
        assert ends.caught.places == [place]
        heard = len(ends.heard)
        say(ends)
        await ends.served()
        assert len(ends.heard) > heard


async def test_fault_of_a_report_does_not_cost_the_welcome_beside_it(
    lane: OpenLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames about the lane that come in one message are taken one by one."""
    async with lane() as ends:
        monkeypatch.setattr(ends, "loaded", once(ends.loaded))
        ends.server.load(Load(workers=3))
        ends.server.welcome(Welcome(server="again"))
        await ends.served()
        assert ends.heard == ["echo", "again"]
        assert ends.caught.places == ["lane_frame"]


async def test_fault_as_buffers_are_given_back(lane: OpenLane, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reply has been sent all the same, and the next one is."""
    async with lane() as ends:
        monkeypatch.setattr(ends, "sent", once(ends.sent))
        listener = ends.call(LARGE)
        await ended(listener)
        assert listener.ends == [bytes(LARGE)]
        assert ends.caught.places == ["lane_sent"]
        await ends.served(LARGE)


async def test_outbox_whose_messages_never_pack_comes_to_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that stays loses each call once; the writer does not turn round for ever."""
    lost: list[int] = []
    outbox = Outbox(lambda: 0, CallGuard(Caught(), lambda call, _: lost.append(call)))

    def never(_: _Draft) -> bytes:
        raise Fault

    monkeypatch.setattr(_Draft, "packed", never)
    for number in (1, 2):
        outbox.call(number, Descriptor(), Body((), []))
    running = asyncio.ensure_future(outbox.run(Pipe().write))
    async with asyncio.timeout(5):
        await outbox.flushed()
    running.cancel()
    assert sorted(lost) == [1, 2]


async def test_fault_of_a_new_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token before stays valid: calls in the same message and after it are served, and the next token is taken."""
    async with opened(StreamEnds) as ends:
        assert isinstance(ends.caller, LaneCaller)
        monkeypatch.setattr(ends, "renewed", once(ends.renewed))
        ends.caller.renew("token")
        await ends.served()
        assert ends.caught.places == ["lane_token"]
        ends.caller.renew("token")
        await ends.served()
        assert ends.heard == ["echo", "token"]
