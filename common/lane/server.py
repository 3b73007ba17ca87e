"""The serving end of a lane: it receives calls, sends replies, and frees everything when the caller has left.

Each frame is handled under a guard of its own. An unexpected exception ends only the frame's call with INTERNAL; it is
counted and logged, and the next frame is handled. Only ProtocolViolation ends the lane.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Protocol

from unlatch.common.errors import UnlatchError
from unlatch.common.fair import Turns
from unlatch.common.lane.body import Body
from unlatch.common.lane.frames import (
    MAX_CALLS,
    MAX_UNSENT_BYTES,
    ProtocolViolation,
    check_pieces,
    check_whole,
    unpack,
)
from unlatch.common.lane.listener import Caught
from unlatch.common.lane.outbox import Outbox
from unlatch.common.lane.replies import failed
from unlatch.protos.unlatch_pb2 import Descriptor, Frames, Load, Reply, Welcome

# How long the end of a lane waits for a caller that does not read.
_LAST_WRITE_SECONDS = 1.0
# How long a `started` frame may wait to share a message with other frames.
_STARTED_SECONDS = 0.01


class Accepted(Protocol):
    """A call that was accepted, as its lane sees it."""

    def feed(self, piece: memoryview) -> None:
        """Take the next piece of the call's body. Raises ProtocolViolation if it does not fit."""

    def abandon(self) -> None:
        """Give the call up and send no reply, because its caller has left."""


Accept = Callable[["LaneServer", Descriptor, list[memoryview] | None], Accepted | None]


@dataclass(slots=True)
class _Taken:
    """A call that was accepted: its arrival time, its deadline, and the bytes of its tensors."""

    call: Accepted
    came: float
    deadline: float
    size: int


class LaneServer:
    """The serving end of one lane, from its opening to its end.

    `accept` is called for each descriptor, with the tensors' bytes if they are in the same message. It returns the
    call, which takes the remaining bytes, or None if it has answered the call. `renew` is called with each new token of
    the caller. `caught` handles unexpected exceptions (common/lane/listener.py).
    """

    def __init__(self, accept: Accept, caught: Caught, renew: Callable[[str], None] = lambda _: None) -> None:
        self._accept = accept
        self._caught = caught
        self._renew = renew
        self._calls: dict[int, _Taken] = {}
        self._bytes = 0
        # By call number: a function to call once the caller confirms that it knows of the call's start.
        self._unheard: dict[int, Callable[[], None]] = {}
        self._outbox = Outbox(lambda: len(self._calls), caught, self._fail)
        # The largest window that this side has granted.
        self._window_calls = self._window_bytes = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        # The error that new calls are refused with.
        self.refusal: UnlatchError | None = None

    def welcome(self, welcome: Welcome) -> None:
        """Send what this side serves, and the window that it grants."""
        # What was granted is not taken back.
        self._window_calls = max(self._window_calls, welcome.window_calls)
        self._window_bytes = max(self._window_bytes, welcome.window_bytes)
        self._outbox.welcome(welcome)

    @property
    def busy(self) -> bool:
        """Whether calls are unanswered."""
        return bool(self._calls)

    def load(self, load: Load) -> None:
        """Send a load report."""
        self._outbox.load(load)

    def draining(self) -> None:
        """Ask the caller to send new calls elsewhere."""
        self._outbox.draining()

    def started(self, number: int, heard: Callable[[], None] | None = None) -> None:
        """Tell the caller that a call has begun; with `heard`, that it is about to.

        `heard` is called when the caller has confirmed that it knows.
        """
        if heard is None:
            # The frame may go with the next reply, even with the reply to this call.
            self._outbox.started(number, _STARTED_SECONDS)
        else:
            self._unheard[number] = heard
            self._outbox.started(number, 0.0)

    def ask_for_token(self) -> None:
        """Ask the caller for a new token, because the present one is about to expire."""
        self._outbox.authorization("")

    def reopen(self) -> None:
        """Ask the caller for another lane in this one's place."""
        self._outbox.reopen()

    def refuse(self, error: UnlatchError) -> None:
        """Answer every new call with this error from now on."""
        self.refusal = error

    def reply(self, number: int, reply: Reply, body: Body, sent: Callable[[], None] | None = None) -> None:
        """Answer a call, and forget it. `sent` is called when the body's buffers are no longer needed."""
        taken = self._forget(number)
        now = monotonic()
        # The longer the call has taken and the more time is left, the longer its reply may wait to share a message.
        seconds = 0.0 if taken is None else min(now - taken.came, taken.deadline - now)
        self._outbox.reply(number, reply, body, sent, seconds)

    async def run(
        self, read: Callable[[], Awaitable[object]], write: Callable[[bytes], Awaitable[None]], turns: Turns
    ) -> None:
        """Carry calls until the caller closes the stream. Raises ProtocolViolation when it breaks the protocol.

        Messages are handled by `turns`, which many lanes share.
        """
        writing = asyncio.Lock()

        async def write_whole(message: bytes) -> None:
            async with writing:
                await write(message)

        writer = asyncio.ensure_future(self._outbox.run(write_whole))
        try:
            while isinstance(message := await read(), bytes):
                await turns.take(partial(self._receive, message))
                await self._outbox.relieved(MAX_UNSENT_BYTES)
        finally:
            try:
                # gRPC cannot end a stream during a write: the caller would never receive the status.
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
            self._abandon(taken.call)
        self._quiet.set()

    async def drain(self) -> None:
        """Ask the caller to send no more calls, and wait until all calls are answered and the answers are sent."""
        self.draining()
        while self._calls:
            self._quiet.clear()
            await self._quiet.wait()
        await self._outbox.flushed()

    def _receive(self, message: bytes) -> None:
        frames, payload = unpack(message)
        self._check_counts(frames)
        for number in frames.started:
            self._heard(number)
        if frames.HasField("authorization"):
            try:
                self._renew(frames.authorization)
            except Exception as error:  # noqa: BLE001 (the guard: the previous token stays valid)
                self._caught("lane_token", error)
        # First, because cancels make room for the calls of the same message.
        self._cancel(frames.cancels)
        at = self._take_calls(frames, payload)
        check_pieces(frames, payload, at)
        for piece, bytes_ in zip(frames.pieces, payload[at:], strict=True):
            self._feed(piece.call, bytes_)
        # Again, because a message may cancel a call that it brings.
        self._cancel(frames.cancels)

    def _check_counts(self, frames: Frames) -> None:
        """Raise ProtocolViolation if a message has more calls, cancels or confirmations than the protocol allows."""
        if len(frames.calls) > MAX_CALLS:
            raise ProtocolViolation(f"{len(frames.calls)} calls in one message; {MAX_CALLS} are the most")
        if len(frames.cancels) > self._window_calls + len(frames.calls):
            raise ProtocolViolation(f"{len(frames.cancels)} calls are cancelled, more than there can be")
        if len(frames.started) > self._window_calls:
            raise ProtocolViolation(f"{len(frames.started)} calls are known to be started, more than there can be")

    def _heard(self, number: int) -> None:
        heard = self._unheard.pop(number, None)
        if heard is None:
            return
        try:
            heard()
        except Exception as error:  # noqa: BLE001 (the guard: this call fails, and no other)
            self._fail(number, self._caught("lane_started", error))

    def _feed(self, number: int, piece: memoryview) -> None:
        taken = self._calls.get(number)
        if taken is None:
            # A call that was already answered may still have pieces on their way.
            return
        try:
            taken.call.feed(piece)
        except ProtocolViolation:
            raise
        except Exception as error:  # noqa: BLE001 (the guard: this call fails, and no other)
            self._fail(number, self._caught("lane_piece", error))

    def _cancel(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._outbox.drop(number)
            taken = self._forget(number)
            if taken is not None:
                self._abandon(taken.call)

    def _abandon(self, call: Accepted) -> None:
        try:
            call.abandon()
        except Exception as error:  # noqa: BLE001 (the guard: the others are abandoned)
            self._caught("lane_cancel", error)

    def _fail(self, number: int, error: UnlatchError) -> None:
        """Answer one call after an exception in our own code, and abandon what was accepted of it."""
        taken = self._calls.get(number)
        self.reply(number, failed(error), Body((), []))
        if taken is not None:
            self._abandon(taken.call)

    def _forget(self, number: int) -> "_Taken | None":
        """Remove and return the call with this number; None if the lane has no such call."""
        taken = self._calls.pop(number, None)
        self._unheard.pop(number, None)
        if taken is not None:
            self._bytes -= taken.size
        if not self._calls:
            self._quiet.set()
        return taken

    def _take_calls(self, frames: Frames, payload: list[memoryview]) -> int:
        """Accept the calls of a message; return how many entries of its payload belong to them."""
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
            try:
                accepted = self._accept(self, descriptor, whole)
            except Exception as error:  # noqa: BLE001 (the guard: this call fails, and no other)
                self._fail(descriptor.call, self._caught("lane_call", error))
                continue
            if accepted is not None:
                size, came = sum(lengths), monotonic()
                remaining = descriptor.remaining_microseconds
                deadline = came + remaining / 1e6 if remaining else math.inf
                self._calls[descriptor.call] = _Taken(accepted, came, deadline, size)
                self._bytes += size
        return at
