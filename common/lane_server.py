"""The serving end of a lane: takes calls in, sends replies out, and lets go of everything when the caller is gone."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol

import grpc
import structlog

from common.lane import MOST_UNSENT_BYTES, Body, Outbox, ProtocolViolation, Sink, check_pieces, check_whole, unpack
from protos.unlatch_pb2 import Descriptor, Reply, Welcome

log = structlog.get_logger()

# How long a caller who does not read holds up the end of its lane.
_LAST_WRITE_SECONDS = 1.0


class Accepted(Sink, Protocol):
    """A call that was taken in. Its body is fed to it; it is abandoned when its caller does not wait any more."""

    def abandon(self) -> None:
        """Nobody waits for the reply any more, and none is to be sent."""


Accept = Callable[["LaneServer", Descriptor, list[memoryview] | None], Accepted | None]


class LaneServer:
    """One lane, from its opening to its end.

    `accept` is called for each descriptor, with the tensors' bytes where they came along. It gives what takes the rest
    in, or None when it has replied already.
    """

    def __init__(self, accept: Accept) -> None:
        self._accept = accept
        self._calls: dict[int, Accepted] = {}
        self._outbox = Outbox(lambda: len(self._calls))
        self._quiet = asyncio.Event()
        self._quiet.set()

    def welcome(self, welcome: Welcome) -> None:
        """Say what this side serves and grants."""
        self._outbox.welcome(welcome)

    def draining(self) -> None:
        """Say that new calls belong elsewhere."""
        self._outbox.draining()

    def reply(self, number: int, reply: Reply, body: Body, sent: Callable[[], None] | None = None) -> None:
        """Answer a call, and forget it. `sent` is called when the body's buffers are no longer needed."""
        self._calls.pop(number, None)
        if not self._calls:
            self._quiet.set()
        self._outbox.reply(number, reply, body, sent)

    async def run(self, read: Callable[[], Awaitable[object]], write: Callable[[bytes], Awaitable[None]]) -> None:
        """Carry calls until the caller closes the stream. Raises ProtocolViolation when it breaks the protocol."""
        writing = asyncio.Lock()

        async def write_whole(message: bytes) -> None:
            async with writing:
                await write(message)

        writer = asyncio.ensure_future(self._outbox.run(write_whole))
        try:
            while isinstance(message := await read(), bytes):
                self._receive(message)
                await self._outbox.relieved(MOST_UNSENT_BYTES)
        finally:
            try:
                # gRPC can end no stream in the middle of a write: the caller would never hear how it ended.
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LAST_WRITE_SECONDS):
                        await writing.acquire()
            finally:
                await self._let_go(writer)

    async def _let_go(self, writer: asyncio.Future[None]) -> None:
        writer.cancel()
        with suppress(BaseException):
            await writer
        self._outbox.close()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.abandon()
        self._quiet.set()

    async def drain(self) -> None:
        """Ask the caller for no more calls, and wait until all that came are answered and the answers handed on."""
        self.draining()
        while self._calls:
            self._quiet.clear()
            await self._quiet.wait()
        await self._outbox.flushed()

    def _receive(self, message: bytes) -> None:
        frames, payload = unpack(message)
        at = 0
        for descriptor in frames.calls:
            whole: list[memoryview] | None = None
            if descriptor.whole:
                whole = payload[at : at + len(descriptor.lengths)]
                at += len(descriptor.lengths)
                check_whole(descriptor.lengths, whole)
            if descriptor.call in self._calls:
                raise ProtocolViolation(f"call {descriptor.call} is already under way")
            accepted = self._accept(self, descriptor, whole)
            if accepted is not None:
                self._calls[descriptor.call] = accepted
        check_pieces(frames, payload, at)
        for piece, bytes_ in zip(frames.pieces, payload[at:], strict=True):
            # A call that was already answered may still have pieces on their way.
            call = self._calls.get(piece.call)
            if call is not None:
                call.feed(bytes_)
        for number in frames.cancels:
            self._outbox.drop(number)
            call = self._calls.pop(number, None)
            if call is not None:
                call.abandon()
        if not self._calls:
            self._quiet.set()


class Lanes:
    """Every lane that callers have open here. `welcome` says what to greet a new one with."""

    def __init__(self, welcome: Callable[[], Welcome], accept: Accept) -> None:
        self._welcome = welcome
        self._accept = accept
        self._open: set[LaneServer] = set()
        self._draining = False

    async def open(self, _: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """The RPC: one lane, for as long as its caller keeps it."""
        lane = LaneServer(self._accept)
        lane.welcome(self._welcome())
        if self._draining:
            lane.draining()
        self._open.add(lane)
        try:
            await lane.run(context.read, context.write)
        except ProtocolViolation as violation:
            log.warning("lane closed", peer=context.peer(), reason=str(violation))
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(violation))
        finally:
            self._open.discard(lane)

    def greet_again(self) -> None:
        """What is served here has changed: say so on every lane."""
        for lane in self._open:
            lane.welcome(self._welcome())

    async def drain(self) -> None:
        """Ask every caller for no more calls, and wait until all that came are answered."""
        self._draining = True
        await asyncio.gather(*(lane.drain() for lane in self._open))
