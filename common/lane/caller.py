"""The calling end of a lane: numbers calls, sends them, gives each reply to whoever waits for it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import count, islice
from typing import Protocol

from unlatch.common.errors import Unavailable, UnlatchError
from unlatch.common.lane.body import Body, Sink
from unlatch.common.lane.frames import check_pieces, check_whole, unpack
from unlatch.common.lane.outbox import Outbox
from unlatch.protos.unlatch_pb2 import Descriptor, Frames, Load, Reply, Welcome

# One that is told may be sent elsewhere at once: that takes some 50 µs.
_TOLD_AT_ONCE = 32


class Waiter(Protocol):
    """Whoever waits for a call's reply."""

    def started(self) -> bool:
        """A worker has begun it, or is about to; whether the server is to hear that this is known."""

    def replied(self, reply: Reply, whole: list[memoryview] | None) -> Sink | None:
        """The reply's frame, with its tensors where they came along; else answer where their pieces are to go."""

    def lost(self, error: UnlatchError) -> None:
        """There will be no reply, or no more of it."""


class Stream(Protocol):
    """A lane's stream as grpc.aio gives it to the side that opens it."""

    def write(self, message: bytes, /) -> Awaitable[None]: ...
    def read(self) -> Awaitable[object]: ...
    def done_writing(self) -> Awaitable[None]: ...


class LaneCaller:
    """One lane, from its opening to its end. Not used again afterwards."""

    def __init__(
        self,
        on_welcome: Callable[[Welcome], None],
        on_draining: Callable[[], None],
        on_token_ends: Callable[[], None] = lambda: None,
        on_load: Callable[[Load], None] | None = None,
    ) -> None:
        self._on_welcome = on_welcome
        self._on_draining = on_draining
        self._on_token_ends = on_token_ends
        self._on_load = on_load
        # Messages that have come: while they do the server lives.
        self.heard = 0
        # Nothing that is sent from now on arrives, and nobody would be told.
        self.ended = False
        self._numbers = count(1)
        self._waiting: dict[int, Waiter] = {}
        self._arriving: dict[int, Sink] = {}
        self._outbox = Outbox(lambda: len(self._waiting))
        # Set when the server wants another lane in this one's place.
        self.reopen_asked = asyncio.Event()
        self._stream: Stream | None = None
        self.welcomed = self.finishing = False
        self._closing: asyncio.Task[None] | None = None

    def call(self, descriptor: Descriptor, body: Body, waiter: Waiter) -> int:
        """Send a call and give it its number. The waiter hears exactly one end, unless the call is cancelled."""
        number = next(self._numbers)
        self._waiting[number] = waiter
        self._outbox.call(number, descriptor, body)
        return number

    def cancel(self, number: int) -> None:
        """Nobody waits for this call any more: tell the server, and ignore what it still says about it."""
        if number in self._waiting:
            self._outbox.cancel(number)
            self._over(number)

    def finish(self) -> None:
        """Nothing more is sent here: close the lane as soon as what was sent is answered."""
        self.finishing = True
        self._close_if_finished()

    def renew(self, token: str) -> None:
        """Be let in by this token from now on."""
        self._outbox.authorization(token)

    async def run(self, stream: Stream) -> None:
        """Carry calls until the stream ends, then tell every waiter. Raises what ended the lane, if anything did."""
        self._stream = stream
        writer = asyncio.ensure_future(self._outbox.run(stream.write))
        try:
            while isinstance(message := await stream.read(), bytes):
                self._receive(message)
        finally:
            # Before the waiters hear of it: one that is told may make room for the next call at once.
            self.ended = True
            if self._closing is not None:
                self._closing.cancel()
            writer.cancel()
            # A lane that breaks breaks for its writer too; the reader's reason is the one to tell.
            with suppress(BaseException):
                await writer
            self._outbox.close()
            await self._lose_all()

    async def _lose_all(self) -> None:
        """Tell every waiter. By turns, since there may be many, and each may go elsewhere at once."""
        try:
            while len(self._waiting) > _TOLD_AT_ONCE:
                self._lose(_TOLD_AT_ONCE)
                await asyncio.sleep(0)
        finally:
            self._lose(len(self._waiting))

    def _lose(self, most: int) -> None:
        for number in list(islice(self._waiting, most)):
            # One that is told may have others cancelled.
            if (waiter := self._waiting.pop(number, None)) is not None:
                waiter.lost(Unavailable("the lane to the server broke before the reply was here"))

    def _receive(self, message: bytes) -> None:
        self.heard += 1
        frames, payload = unpack(message)
        self._hear(frames)
        for number in frames.started:
            waiter = self._waiting.get(number)
            if waiter is not None and waiter.started():
                self._outbox.started(number, 0.0)
        at = 0
        for reply in frames.replies:
            whole: list[memoryview] | None = None
            if reply.whole:
                lengths = reply.lengths[:]
                whole = payload[at : at + len(lengths)]
                at += len(lengths)
                check_whole(lengths, whole)
            self._replied(reply, whole)
        check_pieces(frames, payload, at)
        for piece in frames.pieces:
            self._feed(piece.call, payload[at])
            at += 1
        if frames.draining:
            self._on_draining()

    def _hear(self, frames: Frames) -> None:
        """What the server says of itself, and of this lane."""
        if self._on_load is not None and frames.HasField("load"):
            self._on_load(frames.load)
        if frames.HasField("welcome"):
            self.welcomed = True
            self._on_welcome(frames.welcome)
        if frames.HasField("authorization"):
            self._on_token_ends()
        if frames.reopen:
            self.reopen_asked.set()

    def _replied(self, reply: Reply, whole: list[memoryview] | None) -> None:
        waiter = self._waiting.get(reply.call)
        if waiter is None:
            return
        # The server may answer before it has the whole call: what is left of the call is not wanted.
        self._outbox.drop(reply.call)
        sink = waiter.replied(reply, whole)
        if sink is None or sink.complete:
            self._over(reply.call)
        else:
            self._arriving[reply.call] = sink

    def _feed(self, number: int, piece: memoryview) -> None:
        sink = self._arriving.get(number)
        if sink is None:
            return
        sink.feed(piece)
        if sink.complete:
            self._over(number)

    def _over(self, number: int) -> None:
        """A call has had its end."""
        self._waiting.pop(number, None)
        self._arriving.pop(number, None)
        if self.finishing:
            self._close_if_finished()

    def _close_if_finished(self) -> None:
        if self.finishing and not self._waiting and not self.ended and self._closing is None:
            self._closing = asyncio.create_task(self._close())

    async def _close(self) -> None:
        """Say that nothing more comes: the server, which has answered everything, ends the stream."""
        await self._outbox.flushed()
        assert self._stream is not None
        await self._stream.done_writing()
