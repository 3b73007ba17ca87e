"""A lane within one process: when each end hears of the other, and how long bytes are kept."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from tests.support.guards import unexpected
from unlatch.common.errors import InvalidArgument, Unavailable, UnlatchError
from unlatch.common.lane.body import Body
from unlatch.common.lane.lanes import Lanes
from unlatch.common.lane.local import LocalLane
from unlatch.common.lane.replies import failed
from unlatch.common.net.unread import unread_answers
from unlatch.protos.unlatch_pb2 import Descriptor, Load, Reply, Welcome

MEBIBYTE = 1024 * 1024


@dataclass(eq=False)
class Accepted:
    """A call at the serving end, which the test answers by hand."""

    lane: LocalLane
    descriptor: Descriptor
    whole: list[memoryview] | None
    pieces: list[memoryview] = field(default_factory=list)
    abandoned: int = 0

    def feed(self, piece: memoryview) -> None:
        self.pieces.append(piece)

    def abandon(self) -> None:
        self.abandoned += 1

    def answer(self, body: Body, sent: Callable[[], None] | None = None) -> None:
        self.lane.reply(self.descriptor.call, Reply(), body, sent)


@dataclass(eq=False)
class Caller:
    """A listener that keeps what it hears."""

    bodies: list[Body] = field(default_factory=list)
    errors: list[UnlatchError] = field(default_factory=list)

    def replied(self, _: Reply, body: Body) -> None:
        self.bodies.append(body)

    def failed(self, error: UnlatchError, _: Reply | None = None) -> None:
        self.errors.append(error)


class Ends:
    """A lane, the calls that its serving end has accepted, and what its calling end has heard of the other."""

    def __init__(self) -> None:
        self.calls: list[Accepted] = []
        self.heard: list[str] = []
        self.refusal: UnlatchError | None = None
        self.lane = LocalLane(
            self.accept,
            lambda welcome: self.heard.append(f"welcome {welcome.server}"),
            lambda: self.heard.append("draining"),
            lambda load: self.heard.append(f"load {load.workers}"),
            unexpected,
        )

    def accept(self, lane: LocalLane, descriptor: Descriptor, whole: list[memoryview] | None) -> Accepted | None:
        if self.refusal is not None:
            lane.reply(descriptor.call, failed(self.refusal), Body((), []))
            return None
        self.calls.append(Accepted(lane, descriptor, whole))
        return self.calls[-1]

    def call(self, body: Body, descriptor: Descriptor | None = None) -> tuple[int, Caller]:
        caller = Caller()
        return self.lane.call(descriptor or Descriptor(), body, caller), caller


def whole(size: int) -> Body:
    return Body([size], [bytes(size)])


async def rounds(count: int = 1) -> None:
    """Let the loop go round."""
    for _ in range(count):
        await asyncio.sleep(0)


@asynccontextmanager
async def opened() -> AsyncIterator[Ends]:
    ends = Ends()
    running = asyncio.ensure_future(ends.lane.run())
    await rounds()
    try:
        yield ends
    finally:
        running.cancel()
        await asyncio.wait((running,))


async def test_refusal_is_heard_after_the_call_is_made() -> None:
    """A refusal and a reply that come within `call` reach the listener in the next round of the loop."""
    async with opened() as ends:
        ends.refusal = InvalidArgument("no")
        _, caller = ends.call(whole(10))
        assert caller.errors == []
        assert ends.lane.busy
        await rounds(2)
        assert [str(error) for error in caller.errors] == ["no"]
        assert not ends.lane.busy


async def test_descriptor_is_the_callers_own() -> None:
    """Later changes of a descriptor by its owner do not reach the call, and `call` writes nothing to it."""
    async with opened() as ends:
        descriptor = Descriptor(call=77, remaining_microseconds=5)
        descriptor.request.id = "mine"
        ends.call(whole(3), descriptor)
        descriptor.remaining_microseconds, descriptor.request.id = 9, "another's"
        (call,) = ends.calls
        assert (call.descriptor.remaining_microseconds, call.descriptor.request.id) == (5, "mine")
        assert call.descriptor.lengths == [3]
        assert (descriptor.call, len(descriptor.lengths)) == (77, 0)


async def test_large_body_is_fed_by_turns() -> None:
    """A body of more than 1 MiB is fed in pieces, between which the loop does other work. A smaller one comes whole."""
    async with opened() as ends:
        ends.call(whole(MEBIBYTE))
        ends.call(whole(16 * MEBIBYTE))
        small, large = ends.calls
        assert small.whole is not None
        assert [len(piece) for piece in small.whole] == [MEBIBYTE]
        fed = []
        while sum(map(len, large.pieces)) < 16 * MEBIBYTE:
            fed.append(len(large.pieces))
            await rounds()
        assert large.whole is None
        assert len(fed) >= 16
        assert max(after - before for before, after in pairwise(fed)) == 1


async def test_body_that_arrives_is_fed_as_it_comes() -> None:
    """Pieces go to the serving end when they come. After an answer no more of them do."""
    async with opened() as ends:
        body = Body([6])
        ends.call(body)
        (call,) = ends.calls
        body.feed(memoryview(b"abc"))
        await rounds(2)
        assert b"".join(call.pieces) == b"abc"
        call.answer(whole(1))
        body.feed(memoryview(b"def"))
        await rounds(3)
        assert b"".join(call.pieces) == b"abc"


async def test_cancel_reaches_the_call_once() -> None:
    """A cancelled call is abandoned at once, and its late reply is dropped. An answered call is not abandoned."""
    async with opened() as ends:
        (number, caller), (other, _) = ends.call(whole(1)), ends.call(whole(1))
        first, second = ends.calls
        ends.lane.cancel(number)
        ends.lane.cancel(number)
        assert first.abandoned == 1
        freed: list[int] = []
        first.answer(whole(1), lambda: freed.append(1))
        second.answer(whole(1), lambda: freed.append(2))
        ends.lane.cancel(other)
        await rounds(2)
        assert (caller.bodies, second.abandoned, freed) == ([], 0, [1, 2])
        assert not ends.lane.busy


async def test_memory_of_a_reply_is_kept_for_its_readers() -> None:
    """`sent` is called when the listener has been told; if it reads later, by a cursor, when that is closed."""
    async with opened() as ends:
        freed: list[str] = []
        ends.call(whole(1))
        ends.calls[0].answer(whole(100_000), lambda: freed.append("read at once"))
        await rounds(2)
        assert freed == ["read at once"]

        cursors = []

        class Reader(Caller):
            def replied(self, _: Reply, body: Body) -> None:
                cursors.append(body.subscribe(lambda: None))

        ends.lane.call(Descriptor(), whole(1), Reader())
        ends.calls[1].answer(Body([4], [memoryview(b"late")]), lambda: freed.append("read later"))
        await rounds(2)
        (cursor,) = cursors
        assert freed == ["read at once"]
        piece = cursor.next(10)
        assert piece is not None
        assert (bytes(piece), cursor.finished) == (b"late", True)
        assert freed == ["read at once"]
        cursor.close()
        assert freed == ["read at once", "read later"]


async def test_lane_that_is_closed_loses_its_calls() -> None:
    """Replies that were given are heard first. The other calls are abandoned, and their listeners told."""
    async with opened() as ends:
        callers = [ends.call(whole(1))[1] for _ in range(100)]
        ends.calls[0].answer(whole(1))
        ends.lane.close()
        await rounds(10)
        assert len(callers[0].bodies) == 1
        assert all(isinstance(error, Unavailable) for caller in callers[1:] for error in caller.errors)
        assert [len(caller.errors) for caller in callers] == [0] + [1] * 99
        assert [call.abandoned for call in ends.calls] == [0] + [1] * 99
        assert ends.lane.ended


async def test_finished_lane_ends_with_its_last_call() -> None:
    """The lane ends when what was sent is answered."""
    ends = Ends()
    running = asyncio.ensure_future(ends.lane.run())
    await rounds()
    ends.call(whole(1))
    ends.lane.finish()
    await rounds(3)
    assert not running.done()
    ends.calls[0].answer(whole(1))
    await asyncio.wait_for(running, 5)
    assert ends.lane.ended


async def test_lane_is_told_what_all_lanes_are_told() -> None:
    """A report comes before the welcome: the window that it grants holds for what waits. A drain waits for calls."""
    unread = unread_answers(60.0)
    lanes = Lanes(lambda _: Welcome(server="here"), unexpected, unread, lambda count: Load(workers=count))
    async with opened() as ends:
        lanes.greet(ends.lane)
        await rounds(2)
        assert ends.heard == ["load 1", "welcome here"]
        lanes.report()
        lanes.rest()
        lanes.greet_again()
        await rounds(2)
        assert ends.heard[2:] == ["load 1", "draining", "welcome here"]
        ends.call(whole(1))
        draining = asyncio.ensure_future(lanes.drain())
        await rounds(3)
        assert ends.heard[-1] == "draining"
        assert not draining.done()
        ends.calls[0].answer(whole(1))
        await asyncio.wait_for(draining, 5)
        lanes.forget(ends.lane)
        lanes.report()
        await rounds(2)
        assert ends.heard[-1] == "draining"


async def test_end_refuses_what_comes_after_it_as_not_begun() -> None:
    """The calls that were taken are answered. One that comes during the end is refused, and may go elsewhere."""
    lanes = Lanes(lambda _: Welcome(server="here"), unexpected, unread_answers(60.0))
    async with opened() as ends:
        lanes.greet(ends.lane)
        _, taken = ends.call(whole(1))
        ending = asyncio.ensure_future(lanes.end(Unavailable("the service ends")))
        await rounds(2)
        _, late = ends.call(whole(1))
        await rounds(2)
        assert [(str(error), error.not_begun) for error in late.errors] == [("the service ends", True)]
        assert not ending.done()
        (call,) = ends.calls
        call.answer(whole(1))
        await asyncio.wait_for(ending, 5)
        assert (len(taken.bodies), taken.errors, call.abandoned) == (1, [], 0)
        _, last = ends.call(whole(1))
        ends.lane.close()
        await rounds(3)
        assert [error.not_begun for error in last.errors] == [True]
