"""Lane messages: what an Outbox packs is what unpack gives, in bounded messages, each body's pieces by turns."""

import asyncio
import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.guards import unexpected
from tests.support.watching import until
from unlatch.common.errors import Unavailable, UnlatchError
from unlatch.common.lane.body import WHOLE_BYTES, Body
from unlatch.common.lane.frames import MAX_MESSAGE_BYTES, ProtocolViolation, unpack
from unlatch.common.lane.lanes import Lanes
from unlatch.common.lane.listener import CallGuard
from unlatch.common.lane.outbox import MESSAGE_BYTES, PIECE_BYTES, Outbox
from unlatch.common.lane.server import LaneServer
from unlatch.common.net.unread import unread_answers
from unlatch.protos.unlatch_pb2 import Descriptor, Failure, Frames, LaneMessage, Load, Reply, Welcome

KIBIBYTE = 1024


class Peer:
    """The other end: takes an Outbox's messages in, and puts calls and bodies together again."""

    def __init__(self, within_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.messages: list[tuple[Frames, list[bytes]]] = []
        self.bodies: dict[int, list[bytes]] = {}
        self._lengths: dict[int, list[int]] = {}
        self._within_bytes = within_bytes

    async def take(self, message: bytes) -> None:
        assert len(message) <= self._within_bytes
        arrived = unpack(message)
        frames = arrived.frames
        self.messages.append((frames, [bytes(entry) for entry in arrived.payload]))
        for call, lengths, whole in arrived.bodied(frames.calls):
            self._bodied(call.call, lengths, whole)
        for reply, lengths, whole in arrived.bodied(frames.replies):
            self._bodied(reply.call, lengths, whole)
        for number, entry in arrived.pieces():
            body, lengths = self.bodies[number], self._lengths[number]
            tensor = next(i for i, length in enumerate(lengths) if len(body[i]) < length)
            body[tensor] += entry
            assert len(body[tensor]) <= lengths[tensor], "a piece crosses from one tensor into the next"
            assert 0 < len(entry) <= PIECE_BYTES

    def _bodied(self, number: int, lengths: list[int], whole: Sequence[memoryview] | None) -> None:
        self._lengths[number] = lengths
        self.bodies[number] = [b"" for _ in lengths] if whole is None else [bytes(entry) for entry in whole]

    @property
    def order(self) -> list[int]:
        """The calls whose pieces came, in order."""
        return [piece.call for frames, _ in self.messages for piece in frames.pieces]


def no_calls() -> int:
    """How many calls are outstanding: with none an outbox sends at once."""
    return 0


def an_outbox() -> Outbox:
    """An outbox of a lane without calls, on which nothing unexpected may happen."""

    def lost(call: int, error: UnlatchError) -> None:
        raise AssertionError(f"call {call} could not be sent") from error

    return Outbox(no_calls, CallGuard(unexpected, lost))


async def delivered(outbox: Outbox, peer: Peer) -> None:
    """Send all that is due."""
    running = asyncio.ensure_future(outbox.run(peer.take))
    async with asyncio.timeout(10):
        await outbox.flushed()
    running.cancel()
    await asyncio.wait([running])


def body(*tensors: bytes) -> Body:
    return Body([len(tensor) for tensor in tensors], list(tensors))


def pattern(call: int, size: int) -> bytes:
    return bytes([call % 251 + 1]) * size


sizes = st.one_of(st.integers(0, 100), st.integers(WHOLE_BYTES - 2, WHOLE_BYTES + 2), st.integers(0, 3 * PIECE_BYTES))
bodies = st.lists(st.lists(sizes, max_size=3), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(bodies=bodies, replies=st.booleans())
def test_calls_and_replies_arrive_as_they_were_sent(*, bodies: list[list[int]], replies: bool) -> None:
    """Bodies of any sizes, small ones whole and large ones in pieces, are the same at the other end."""
    peer, sent = Peer(), {}

    async def send() -> None:
        outbox = an_outbox()
        outbox.frames().welcome.server = "s"
        for call, lengths in enumerate(bodies):
            sent[call] = [pattern(call + i, length) for i, length in enumerate(lengths)]
            if replies:
                outbox.reply(call, Reply(), body(*sent[call]))
            else:
                outbox.call(call, Descriptor(), body(*sent[call]))
        outbox.frames().draining = True
        await delivered(outbox, peer)

    asyncio.run(send())
    assert peer.bodies == sent
    assert peer.messages[0][0].welcome.server == "s" or len(peer.messages) > 1
    assert any(frames.draining for frames, _ in peer.messages)


async def test_frames_without_bodies_hold_up_a_caller_who_reads_nothing() -> None:
    """Refusals weigh what they take: a server reads no more of a caller who takes none of them."""
    outbox = an_outbox()
    for number in range(1, 1001):
        outbox.reply(number, Reply(failure=Failure(code=3, message="m" * 500)), body())
    waiting = asyncio.ensure_future(outbox.relieved(100_000))
    done, _ = await asyncio.wait((waiting,), timeout=0.02)
    assert not done
    await delivered(outbox, Peer())
    await asyncio.wait_for(waiting, 1.0)


async def test_dropping_the_last_body_lets_go_of_who_waits() -> None:
    """A task that waits until all is sent does not wait for a body that was dropped."""
    outbox, peer = an_outbox(), Peer()
    outbox.reply(1, Reply(), Body([100_000]))
    running = asyncio.ensure_future(outbox.run(peer.take))
    try:
        waiting = asyncio.ensure_future(outbox.flushed())
        done, _ = await asyncio.wait((waiting,), timeout=0.02)
        assert peer.messages
        assert not done
        outbox.drop(1)
        await asyncio.wait_for(waiting, 1.0)
    finally:
        running.cancel()


async def test_pieces_take_turns() -> None:
    """Two large bodies advance together; a small call meanwhile waits for neither, and makes their pieces smaller."""
    outbox, peer = an_outbox(), Peer()
    large = 16 * PIECE_BYTES
    small_after: list[int] = []

    async def take(message: bytes) -> None:
        await peer.take(message)
        if len(peer.messages) == 2:
            outbox.call(3, Descriptor(), body(b"small"))
        if 3 in peer.bodies and not small_after:
            small_after.append(len(peer.messages))

    for call in (1, 2):
        outbox.call(call, Descriptor(), body(pattern(call, large)))
    running = asyncio.ensure_future(outbox.run(take))
    async with asyncio.timeout(10):
        await outbox.flushed()
    running.cancel()
    ones = [index for index, call in enumerate(peer.order) if call == 1]
    twos = [index for index, call in enumerate(peer.order) if call == 2]
    assert min(len(ones), len(twos)) > 16
    assert abs(len(ones) - len(twos)) <= 1
    assert all(abs(one - two) <= 2 for one, two in zip(ones, twos, strict=False))
    assert small_after == [3]
    assert peer.bodies == {1: [pattern(1, large)], 2: [pattern(2, large)], 3: [b"small"]}


@pytest.mark.parametrize("size", [0, 1, KIBIBYTE, WHOLE_BYTES, WHOLE_BYTES + 1, 700 * KIBIBYTE])
async def test_messages_are_bounded(size: int) -> None:
    """However much is due at once, no message carries more than its bound and one last entry."""
    outbox = an_outbox()
    peer = Peer(within_bytes=MESSAGE_BYTES + PIECE_BYTES + 64 * KIBIBYTE)
    for call in range(300 if size <= WHOLE_BYTES else 12):
        outbox.call(call, Descriptor(), body(pattern(call, size)))
    await delivered(outbox, peer)
    assert all(tensors == [pattern(call, size)] for call, tensors in peer.bodies.items())


async def test_many_frames_are_bounded_too() -> None:
    """Descriptors that are large by themselves (long parameters) fill messages as bodies do."""
    outbox, peer = an_outbox(), Peer(within_bytes=MESSAGE_BYTES + 300 * KIBIBYTE)
    for call in range(30):
        descriptor = Descriptor(call=call)
        descriptor.request.parameters["label"].string_param = "x" * 200 * KIBIBYTE
        outbox.call(descriptor.call, descriptor, body())
    await delivered(outbox, peer)
    assert len(peer.bodies) == 30


@pytest.mark.parametrize(("said", "draining"), [("draining, welcome", False), ("welcome, draining", True)])
async def test_welcome_takes_back_that_no_calls_are_wanted(said: str, *, draining: bool) -> None:
    """The last of the two holds, though both go out as one message, in which `draining` is applied last."""
    server, peer = LaneServer(lambda *_: None, unexpected), Peer()
    for word in said.split(", "):
        if word == "draining":
            server.draining()
        else:
            server.welcome(Welcome(server="one"))
    await delivered(server._outbox, peer)
    ((frames, _),) = peer.messages
    assert frames.welcome.server == "one"
    assert frames.draining is draining


async def test_body_that_still_arrives_is_passed_on() -> None:
    """Pieces leave as they come in, and the last of them ends the body."""
    outbox, peer = an_outbox(), Peer()
    arriving = Body([5, 0, 3])
    outbox.call(1, Descriptor(), arriving)
    running = asyncio.ensure_future(outbox.run(peer.take))
    for piece in (b"ab", b"cde", b"f", b"gh"):
        assert not arriving.complete
        arriving.feed(memoryview(piece))
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await outbox.flushed()
    running.cancel()
    assert arriving.complete
    assert peer.bodies == {1: [b"abcde", b"", b"fgh"]}


async def test_dropped_body_is_let_go_of() -> None:
    """After a cancel no more of a call's body is sent; after a drop of a reply its buffers are given back, once."""
    outbox, peer = an_outbox(), Peer()
    given_back: list[int] = []
    outbox.call(1, Descriptor(), body(pattern(1, 4 * PIECE_BYTES)))
    outbox.cancel(1)
    outbox.reply(2, Reply(), body(pattern(2, 4 * PIECE_BYTES)), lambda: given_back.append(2))
    outbox.drop(2)
    outbox.drop(2)
    outbox.reply(3, Reply(), body(pattern(3, 4 * PIECE_BYTES)), lambda: given_back.append(3))
    await delivered(outbox, peer)
    assert given_back == [2, 3]
    assert set(peer.order) == {3}
    assert [list(frames.cancels) for frames, _ in peer.messages if frames.cancels] == [[1]]


async def test_closed_outbox_gives_every_buffer_back() -> None:
    """A lane that is gone holds no reply's memory."""
    outbox = an_outbox()
    given_back: list[int] = []
    for call in (1, 2):
        outbox.reply(call, Reply(), body(bytes(2 * WHOLE_BYTES)), lambda call=call: given_back.append(call))  # type: ignore[misc]
    outbox.close()
    assert given_back == [1, 2]


LATE: dict[str, Callable[[LaneServer], None]] = {
    "draining": lambda server: server.draining(),
    "reopen": lambda server: server.reopen(),
    "load": lambda server: server.load(Load()),
    "welcome": lambda server: server.welcome(Welcome(server="s")),
    "started": lambda server: server.started(1, lambda: None),
    "cancel": lambda server: server._outbox.cancel(1),
    "authorization": lambda server: server.ask_for_token(),
    "reply": lambda server: server.reply(1, Reply(), body(b"late")),
    "reply in pieces": lambda server: server.reply(1, Reply(), body(bytes(2 * WHOLE_BYTES))),
}


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
async def test_flush_of_a_closed_outbox_does_not_wait(late: Callable[[LaneServer], None]) -> None:
    """A frame that is added after the lane has ended is never sent, and a drain does not wait for it."""
    server = LaneServer(lambda *_: None, unexpected)
    server._outbox.close()
    late(server)
    await asyncio.wait_for(server._outbox.flushed(), 1.0)


class Caller:
    """The RPC of a lane whose caller sends these messages, reads everything, and leaves when it is told to."""

    def __init__(self, *messages: bytes) -> None:
        self.leaves: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.heard = Peer()
        self._messages = [*messages]

    async def read(self) -> object:
        return self._messages.pop(0) if self._messages else await self.leaves

    async def write(self, message: bytes) -> None:
        await self.heard.take(message)


def carried(lanes: Lanes, caller: Caller) -> asyncio.Task[None]:
    """Open a lane that takes no call."""
    return asyncio.create_task(lanes.carry(LaneServer(lambda *_: None, unexpected), caller))  # type: ignore[arg-type]


@pytest.mark.parametrize("rounds", range(8))
async def test_drain_does_not_wait_for_a_lane_that_ends_at_that_moment(rounds: int) -> None:
    """The drain begins in any round of the loop in which the end of a lane is under way, and it ends."""
    lanes, caller = Lanes(lambda _: Welcome(), unexpected, unread_answers(60.0)), Caller()
    lane = carried(lanes, caller)
    await asyncio.sleep(0.02)
    caller.leaves.set_result(None)
    for _ in range(rounds):
        await asyncio.sleep(0)
    await asyncio.wait_for(lanes.drain(), 1.0)
    await lane


async def test_lane_that_is_opened_at_the_end_hears_that_none_of_its_calls_is_begun() -> None:
    """The service has told its other lanes already. A caller sends what waits as soon as it is greeted."""
    lanes = Lanes(lambda _: Welcome(server="s", window_calls=1), unexpected, unread_answers(60.0))
    await lanes.end(Unavailable("the service ends"))
    frames = Frames(calls=[Descriptor(call=7)])
    caller = Caller(LaneMessage(frames=frames).SerializeToString())
    lane = carried(lanes, caller)
    await until(lambda: any(frames.replies for frames, _ in caller.heard.messages), "the call is answered")
    greeting, *_ = (frames for frames, _ in caller.heard.messages)
    assert greeting.welcome.server == "s"
    assert greeting.draining
    assert greeting.last
    (reply,) = (reply for frames, _ in caller.heard.messages for reply in frames.replies)
    assert (reply.call, reply.failure.message, reply.failure.not_begun) == (7, "the service ends", True)
    caller.leaves.set_result(None)
    await lane


@pytest.mark.parametrize("rounds", range(8))
async def test_end_that_begins_while_lanes_are_greeted_reaches_each_of_them(rounds: int) -> None:
    """The service may begin to end in any round of the loop. Lanes that are opened at once are greeted in turns."""

    def welcome(_: str) -> Welcome:
        # No other lane is greeted in this round.
        time.sleep(0.003)
        return Welcome(server="s", window_calls=1)

    lanes, callers = Lanes(welcome, unexpected, unread_answers(60.0)), [Caller() for _ in range(3)]
    opened = [carried(lanes, caller) for caller in callers]
    for _ in range(rounds):
        await asyncio.sleep(0)
    await asyncio.wait_for(lanes.end(Unavailable("the service ends")), 1.0)
    for caller in callers:
        await until(lambda: any(frames.last for frames, _ in caller.heard.messages), "it is told")  # noqa: B023 (awaited)
        caller.leaves.set_result(None)
    await asyncio.gather(*opened)


def fed(lengths: Sequence[int], *pieces: bytes) -> Callable[[], None]:
    def feed() -> None:
        arriving = Body(lengths)
        for piece in pieces:
            arriving.feed(memoryview(piece))

    return feed


@pytest.mark.parametrize(
    "feed",
    [
        fed([3], b"abcd"),
        fed([3, 3], b"abcd"),
        fed([3], b""),
        fed([3], b"abc", b"d"),
        fed([], b"a"),
        fed([0, 0], b"a"),
        fed([2**63], b"a", b""),
    ],
)
def test_piece_that_does_not_fit_is_a_violation(feed: Callable[[], None]) -> None:
    """A piece is refused that crosses a tensor's end, carries nothing, or comes after the end."""
    with pytest.raises(ProtocolViolation):
        feed()


@given(st.binary(max_size=100))
def test_any_bytes_are_a_message_or_a_violation(message: bytes) -> None:
    """Nothing else is raised."""
    try:
        arrived = unpack(message)
    except ProtocolViolation:
        return
    assert LaneMessage(frames=arrived.frames, payload=map(bytes, arrived.payload)).ByteSize() >= 0
