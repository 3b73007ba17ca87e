"""The serving end of a lane: takes calls in, sends replies out, and lets go of everything when the caller is gone.

Each frame that comes is handled under a guard of its own: an exception there answers the one call that the frame is
about with INTERNAL, is counted and logged, and the next frame is handled. Only ProtocolViolation ends the lane.
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

# How long a caller who does not read holds up the end of its lane.
_LAST_WRITE_SECONDS = 1.0
# How long the news that a call has started may wait for other frames to go with.
_STARTED_SECONDS = 0.01


class Accepted(Protocol):
    """A call that was taken in, as its lane knows it."""

    def feed(self, piece: memoryview) -> None:
        """Take the next piece of the call's body. Raises ProtocolViolation where it does not fit."""

    def abandon(self) -> None:
        """Give the call up. Its caller has left: no reply is to be sent."""


Accept = Callable[["LaneServer", Descriptor, list[memoryview] | None], Accepted | None]


@dataclass(slots=True)
class _Taken:
    """A call that was taken in: when it came, until when its caller waits, and the bytes of its tensors."""

    call: Accepted
    came: float
    deadline: float
    size: int


class LaneServer:
    """The serving end of one lane, from its opening to its end.

    `accept` is called for each descriptor, with the tensors' bytes where they came along. It returns what takes the
    other bytes, or None when it has replied already. `renew` is given each token that the caller is to be authenticated
    by from then on. `caught` settles exceptions that no code expected (common/lane/listener.py).
    """

    def __init__(self, accept: Accept, caught: Caught, renew: Callable[[str], None] = lambda _: None) -> None:
        self._accept = accept
        self._caught = caught
        self._renew = renew
        self._calls: dict[int, _Taken] = {}
        self._bytes = 0
        # By call: what to do once the caller has said that it knows of the call's start.
        self._unheard: dict[int, Callable[[], None]] = {}
        self._outbox = Outbox(lambda: len(self._calls), caught, self._fail)
        # The most that this side has granted.
        self._window_calls = self._window_bytes = 0
        self._quiet = asyncio.Event()
        self._quiet.set()
        # The error that new calls are refused with.
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
        """Ask the caller to send new calls elsewhere."""
        self._outbox.draining()

    def started(self, number: int, heard: Callable[[], None] | None = None) -> None:
        """Say that a call has begun; or, with `heard`, that it is about to: `heard` is called when the caller knows."""
        if heard is None:
            # Early enough if it goes with the next reply, or with that of this call.
            self._outbox.started(number, _STARTED_SECONDS)
        else:
            self._unheard[number] = heard
            self._outbox.started(number, 0.0)

    def ask_for_token(self) -> None:
        """Say that the caller's token is about to end."""
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
        # How long the reply may be gathered goes by the call's time so far, and by what is left of it.
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
            self._abandon(taken.call)
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
        self._check_counts(frames)
        for number in frames.started:
            self._heard(number)
        if frames.HasField("authorization"):
            try:
                self._renew(frames.authorization)
            except Exception as error:  # noqa: BLE001 (the guard: the token before holds)
                self._caught("lane_token", error)
        # What is cancelled makes room for the calls that come with it.
        self._cancel(frames.cancels)
        at = self._take_calls(frames, payload)
        check_pieces(frames, payload, at)
        for piece, bytes_ in zip(frames.pieces, payload[at:], strict=True):
            self._feed(piece.call, bytes_)
        # A call may be cancelled by the message that brings it.
        self._cancel(frames.cancels)

    def _check_counts(self, frames: Frames) -> None:
        """Raise ProtocolViolation where a message says more than the protocol lets one."""
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
        """Answer one call after an exception of ours, and give up what was taken in of it."""
        taken = self._calls.get(number)
        self.reply(number, failed(error), Body((), []))
        if taken is not None:
            self._abandon(taken.call)

    def _forget(self, number: int) -> "_Taken | None":
        """Return and forget a call of this lane, if the number is one's."""
        taken = self._calls.pop(number, None)
        self._unheard.pop(number, None)
        if taken is not None:
            self._bytes -= taken.size
        if not self._calls:
            self._quiet.set()
        return taken

    def _take_calls(self, frames: Frames, payload: list[memoryview]) -> int:
        """Accept the calls of a message; return how many of its entries were theirs."""
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
