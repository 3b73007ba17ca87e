"""The calling end of a lane: numbers calls, sends them, and gives each reply to its listener.

Each frame that comes is handled under a guard of its own: an exception there ends the one call that the frame is
about, is counted and logged, and the next frame is handled. Only ProtocolViolation ends the lane.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from typing import Any

from unlatch.common.errors import Unavailable, UnlatchError
from unlatch.common.fair import by_turns
from unlatch.common.lane.body import Body
from unlatch.common.lane.frames import unpack
from unlatch.common.lane.listener import CallGuard, Caught, ReplyListener
from unlatch.common.lane.outbox import Outbox
from unlatch.common.lane.replies import raised
from unlatch.protos.unlatch_pb2 import Descriptor, Frames, Load, Reply, Welcome

# Listeners that are told at once that the lane broke. Each may send its call elsewhere, which takes some 50 µs.
_TOLD_AT_ONCE = 32


class LaneCaller:
    """The calling end of one lane, from its opening to its end. Not used again afterwards.

    `caught` settles exceptions that no code expected (common/lane/listener.py).
    """

    def __init__(
        self,
        on_welcome: Callable[[Welcome], None],
        on_draining: Callable[[], None],
        caught: Caught,
        on_token_ends: Callable[[], None] = lambda: None,
        on_load: Callable[[Load], None] | None = None,
    ) -> None:
        self._on_welcome = on_welcome
        self._on_draining = on_draining
        self._guard = CallGuard(caught, self._fail)
        self._on_token_ends = on_token_ends
        self._on_load = on_load
        # Messages that have come: while they do the server lives.
        self.heard = 0
        # From now on nothing that is sent arrives, and no listener would be told.
        self.ended = False
        # Whether the server has said that calls without an answer were not begun.
        self.last = False
        self._numbers = count(1)
        # With what to call when it begins. Unanswered, or its reply's body is not complete.
        self._calls: dict[int, tuple[ReplyListener, Callable[[], bool] | None]] = {}
        # The reply's bodies that are not complete.
        self._arriving: dict[int, Body] = {}
        self._outbox = Outbox(lambda: len(self._calls), self._guard)
        # Set when the server wants another lane in this one's place.
        self.reopen_asked = asyncio.Event()
        self._stream: Any = None
        self.welcomed = self.finishing = False
        self._closing: asyncio.Task[None] | None = None

    def call(
        self, descriptor: Descriptor, body: Body, listener: ReplyListener, started: Callable[[], bool] | None = None
    ) -> int:
        """Send a call and return its number. The listener hears exactly one end, unless the call is cancelled.

        `started` is called when a worker has begun the call, or is about to. Its result says whether the server waits
        to hear that this is known.
        """
        number = next(self._numbers)
        self._calls[number] = listener, started
        self._outbox.call(number, descriptor, body)
        return number

    def cancel(self, number: int) -> None:
        """Give a call up: tell the server, and ignore what the server still says about the call."""
        if number in self._calls:
            self._outbox.cancel(number)
            self._over(number)

    def finish(self) -> None:
        """Close the lane as soon as what was sent is answered. Nothing more is sent on it."""
        self.finishing = True
        self._close_if_finished()

    def renew(self, token: str) -> None:
        """Authenticate by this token from now on."""
        self._outbox.frames(0.0).authorization = token

    async def run(self, stream: Any) -> None:
        """Carry calls until grpc.aio's `stream` ends, then tell every listener. Raises what ended the lane, if any."""
        self._stream = stream
        writer = asyncio.ensure_future(self._outbox.run(stream.write))
        try:
            while isinstance(message := await stream.read(), bytes):
                self._receive(message)
        finally:
            # Before the listeners hear of it: one that is told may make room for the next call at once.
            self.ended = True
            if self._closing is not None:
                self._closing.cancel()
            writer.cancel()
            # A lane that breaks breaks for its writer too; the reader's reason is the one to tell.
            with suppress(BaseException):
                await writer
            self._outbox.close()
            # The stream keeps its connection open, and this object may be garbage for long before it is collected.
            self._stream = None
            await by_turns(self._losses(), _TOLD_AT_ONCE)

    def _losses(self) -> Iterator[None]:
        """Tell every listener, one after another, that the lane broke."""
        for number in list(self._calls):
            # A listener that is told may cancel others.
            if (call := self._calls.pop(number, None)) is not None:
                broke = "the lane to the server broke before the reply was here"
                self._tell(call[0], Unavailable(broke, not_begun=self.last))
                yield

    def _receive(self, message: bytes) -> None:
        self.heard += 1
        arrived = unpack(message)
        self._hear(arrived.frames)
        for number in arrived.frames.started:
            self._guard("lane_started", number, self._begun, number)
        for reply, lengths, whole in arrived.bodied(arrived.frames.replies):
            try:
                self._replied(reply, lengths, whole)
            except Exception as error:  # noqa: BLE001 (a guard in line: on every call's path)
                self._fail(reply.call, self._guard.caught("lane_reply", error))
        for number, piece in arrived.pieces():
            if number in self._arriving:
                self._guard("lane_piece", number, self._feed, number, piece)
        if arrived.frames.draining:
            self._guard("lane_frame", None, self._on_draining)

    def _hear(self, frames: Frames) -> None:
        """Take what the server says of itself, and of this lane."""
        if self._on_load is not None and frames.HasField("load"):
            self._guard("lane_frame", None, self._on_load, frames.load)
        if frames.HasField("welcome"):
            self.welcomed = True
            self._guard("lane_frame", None, self._on_welcome, frames.welcome)
        if frames.HasField("authorization"):
            self._guard("lane_frame", None, self._on_token_ends)
        if frames.reopen:
            self.reopen_asked.set()
        self.last = self.last or frames.last

    def _begun(self, number: int) -> None:
        _, started = self._calls.get(number, (None, None))
        if started is not None and started():
            self._outbox.frames(0.0).started.append(number)

    def _replied(self, reply: Reply, lengths: list[int], whole: list[memoryview] | None) -> None:
        number = reply.call
        listener, _ = self._calls.get(number, (None, None))
        if listener is None:
            return
        # The server may answer before it has the whole call: the rest of the call is not wanted.
        self._outbox.drop(number)
        if not lengths and reply.HasField("failure"):
            listener.failed(raised(reply.failure), reply)
            self._over(number)
            return
        body = Body(lengths, whole)
        listener.replied(reply, body)
        if whole is not None or body.complete:
            self._over(number)
        elif number in self._calls:
            self._arriving[number] = body

    def _feed(self, number: int, piece: memoryview) -> None:
        body = self._arriving[number]
        body.feed(piece)
        if body.complete:
            self._over(number)

    def _fail(self, number: int, error: UnlatchError) -> None:
        """End one call after an exception of ours. The server, which may not know of it, is told to stop."""
        call = self._calls.get(number)
        if call is not None:
            self.cancel(number)
            self._tell(call[0], error)

    def _tell(self, listener: ReplyListener, error: UnlatchError) -> None:
        self._guard("lane_failure", None, listener.failed, error)

    def _over(self, number: int) -> None:
        """Forget a call that has had its end."""
        self._calls.pop(number, None)
        self._arriving.pop(number, None)
        if self.finishing:
            self._close_if_finished()

    def _close_if_finished(self) -> None:
        if self.finishing and not self._calls and not self.ended and self._closing is None:
            self._closing = asyncio.create_task(self._close())

    async def _close(self) -> None:
        """Say that nothing more comes: the server, which has answered everything, ends the stream."""
        await self._outbox.flushed()
        await self._stream.done_writing()
