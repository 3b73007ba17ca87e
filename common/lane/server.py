"""The serving end of a lane: takes calls in, sends replies out, and lets go of everything when the caller is gone."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Protocol

import structlog

from unlatch.common.errors import UnlatchError
from unlatch.common.fair import Turns
from unlatch.common.lane.body import Body, Sink
from unlatch.common.lane.frames import (
    MOST_CALLS,
    MOST_UNSENT_BYTES,
    ProtocolViolation,
    check_pieces,
    check_whole,
    unpack,
)
from unlatch.common.lane.outbox import Outbox
from unlatch.common.lane.replies import failed
from unlatch.protos.unlatch_pb2 import Descriptor, Frames, Load, Reply, Welcome

log = structlog.get_logger()

# How long a caller who does not read holds up the end of its lane.
_LAST_WRITE_SECONDS = 1.0
# How long a start may wait for company.
_STARTED_SECONDS = 0.01


class Accepted(Sink, Protocol):
    """A call that was taken in. Its body is fed to it; it is abandoned when its caller does not wait any more."""

    def abandon(self) -> None:
        """Nobody waits for the reply any more, and none is to be sent."""


Accept = Callable[["LaneServer", Descriptor, list[memoryview] | None], Accepted | None]


@dataclass(slots=True)
class _Taken:
    """A call that was taken in: when it came, until when its caller waits, and the bytes of its tensors."""

    call: Accepted
    came: float
    deadline: float
    size: int


class LaneServer:
    """One lane, from its opening to its end.

    `accept` is called for each descriptor, with the tensors' bytes where they came along. It gives what takes the rest
    in, or None when it has replied already. `renew` is given each token that the caller is to be let in by instead.
    """

    def __init__(self, accept: Accept, renew: Callable[[str], None] = lambda _: None) -> None:
        self._accept = accept
        self._renew = renew
        self._calls: dict[int, _Taken] = {}
        self._bytes = 0
        # What is to happen once the caller has said that it knows of a call's start.
        self._unheard: dict[int, Callable[[], None]] = {}
        self._outbox = Outbox(lambda: len(self._calls))
        # The most that this side has granted.
        self._window_calls = self._window_bytes = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        # What new calls are refused with.
        self.refusal: UnlatchError | None = None

    def welcome(self, welcome: Welcome) -> None:
        """Say what this side serves and grants."""
        # What was granted is not taken back.
        self._window_calls = max(self._window_calls, welcome.window_calls)
        self._window_bytes = max(self._window_bytes, welcome.window_bytes)
        self._outbox.welcome(welcome)

    @property
    def busy(self) -> bool:
        """Whether calls are unanswered."""
        return bool(self._calls)

    def load(self, load: Load) -> None:
        """Say how much there is to do here."""
        self._outbox.load(load)

    def draining(self) -> None:
        """Say that new calls belong elsewhere."""
        self._outbox.draining()

    def started(self, number: int, heard: Callable[[], None] | None = None) -> None:
        """Say that a call has begun; or, with `heard`, that it is about to: `heard` is called when the caller knows."""
        if heard is None:
            # It is told in time where it is told with the next reply, or that of this call.
            self._outbox.started(number, _STARTED_SECONDS)
        else:
            self._unheard[number] = heard
            self._outbox.started(number, 0.0)

    def ask_for_token(self) -> None:
        """Say that the caller's token is about to end."""
        self._outbox.authorization("")

    def reopen(self) -> None:
        """Say that another lane is to take this one's place."""
        self._outbox.reopen()

    def refuse(self, error: UnlatchError) -> None:
        """Answer what comes from now on with this."""
        self.refusal = error

    def reply(self, number: int, reply: Reply, body: Body, sent: Callable[[], None] | None = None) -> None:
        """Answer a call, and forget it. `sent` is called when the body's buffers are no longer needed."""
        taken = self._forget(number)
        now = monotonic()
        # How long it may be gathered goes by its time so far, and by what is left of it.
        seconds = 0.0 if taken is None else min(now - taken.came, taken.deadline - now)
        self._outbox.reply(number, reply, body, sent, seconds)

    async def run(
        self, read: Callable[[], Awaitable[object]], write: Callable[[bytes], Awaitable[None]], turns: Turns
    ) -> None:
        """Carry calls until the caller closes the stream. Raises ProtocolViolation when it breaks the protocol.

        What comes is taken in by `turns`, which many lanes share.
        """
        writing = asyncio.Lock()

        async def write_whole(message: bytes) -> None:
            async with writing:
                await write(message)

        writer = asyncio.ensure_future(self._outbox.run(write_whole))
        try:
            while isinstance(message := await read(), bytes):
                await turns.take(partial(self._receive, message))
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
        for taken in calls.values():
            taken.call.abandon()
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
        if len(frames.calls) > MOST_CALLS:
            raise ProtocolViolation(f"{len(frames.calls)} calls in one message; {MOST_CALLS} are the most")
        if len(frames.cancels) > self._window_calls + len(frames.calls):
            raise ProtocolViolation(f"{len(frames.cancels)} calls are cancelled, more than there can be")
        if len(frames.started) > self._window_calls:
            raise ProtocolViolation(f"{len(frames.started)} calls are known to be started, more than there can be")
        for number in frames.started:
            if (heard := self._unheard.pop(number, None)) is not None:
                heard()
        if frames.HasField("authorization"):
            self._renew(frames.authorization)
        # What is cancelled makes room for the calls that come with it.
        self._cancel(frames.cancels)
        at = self._take_calls(frames, payload)
        check_pieces(frames, payload, at)
        for piece, bytes_ in zip(frames.pieces, payload[at:], strict=True):
            # A call that was already answered may still have pieces on their way.
            taken = self._calls.get(piece.call)
            if taken is not None:
                taken.call.feed(bytes_)
        # A call may be cancelled by the message that brings it.
        self._cancel(frames.cancels)

    def _cancel(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._outbox.drop(number)
            taken = self._forget(number)
            if taken is not None:
                taken.call.abandon()

    def _forget(self, number: int) -> "_Taken | None":
        """A call, if it was one, is over on this lane."""
        taken = self._calls.pop(number, None)
        self._unheard.pop(number, None)
        if taken is not None:
            self._bytes -= taken.size
        if not self._calls:
            self._quiet.set()
        return taken

    def _take_calls(self, frames: Frames, payload: list[memoryview]) -> int:
        """Accept the calls of a message; how many of its entries were theirs."""
        at = 0
        for descriptor in frames.calls:
            # Read once: each walk of a protobuf list costs half a microsecond.
            lengths = descriptor.lengths[:]
            whole: list[memoryview] | None = None
            if descriptor.whole:
                whole = payload[at : at + len(lengths)]
                at += len(lengths)
                check_whole(lengths, whole)
            if self._calls and (len(self._calls) >= self._window_calls or self._bytes >= self._window_bytes):
                raise ProtocolViolation(
                    f"more calls are unanswered than window_calls={self._window_calls} and "
                    f"window_bytes={self._window_bytes} let be"
                )
            if descriptor.call in self._calls:
                raise ProtocolViolation(f"call {descriptor.call} is already under way")
            if self.refusal is not None:
                self._outbox.reply(descriptor.call, failed(self.refusal), Body((), []))
                continue
            accepted = self._accept(self, descriptor, whole)
            if accepted is not None:
                size, came = sum(lengths), monotonic()
                remaining = descriptor.remaining_microseconds
                deadline = came + remaining / 1e6 if remaining else math.inf
                self._calls[descriptor.call] = _Taken(accepted, came, deadline, size)
                self._bytes += size
        return at
