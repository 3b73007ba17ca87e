"""The serving end of a lane: it receives calls, sends replies, and frees everything when the caller has left.

Each frame is handled under a guard of its own. An unexpected exception ends only the frame's call with INTERNAL; it is
counted and logged, and the next frame is handled. Only ProtocolViolation ends the lane.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Protocol

from unlatch.common.errors import UnlatchError
from unlatch.common.fair import Turns
from unlatch.common.lane.body import Body
from unlatch.common.lane.frames import MAX_CALLS, MAX_UNSENT_BYTES, ProtocolViolation, unpack
from unlatch.common.lane.held_bytes import HeldBytes
from unlatch.common.lane.listener import CallGuard, Caught
from unlatch.common.lane.outbox import Outbox
from unlatch.common.lane.replies import failed
from unlatch.protos.unlatch_pb2 import Descriptor, Frames, Load, Reply, Welcome

# How long a `started` frame may wait to share a message with other frames.
_STARTED_SECONDS = 0.01


class Accepted(Protocol):
    """A call that was accepted, as its lane sees it."""

    def feed(self, piece: memoryview) -> None:
        """Take the next piece of the call's body. Raises ProtocolViolation if it does not fit."""

    def abandon(self) -> None:
        """Give the call up and send no reply, because its caller has left."""


class ServingEnd(Protocol):
    """The serving end of a lane, as a service and its calls see it: a LaneServer, or a LocalLane (local.py)."""

    @property
    def busy(self) -> bool:
        """Whether calls are unanswered."""

    def welcome(self, welcome: Welcome) -> None:
        """Send what this side serves, and the window that it grants."""

    def load(self, load: Load) -> None:
        """Send a load report."""

    def draining(self) -> None:
        """Ask the caller to send new calls elsewhere."""

    async def drain(self) -> None:
        """Ask the caller to send no more calls, and wait until all calls are answered and the answers are sent."""

    def refuse(self, error: UnlatchError) -> None:
        """Answer every new call with this error from now on, and that it was not begun."""

    async def end(self) -> None:
        """Drain a lane that refuses calls, so that its caller knows of each call without an answer: not begun."""

    def started(self, number: int, heard: Callable[[], None] | None = None) -> None:
        """Tell the caller that a call has begun; with `heard`, that it is about to."""

    def reply(self, number: int, reply: Reply, body: Body, sent: Callable[[], None] | None = None) -> None:
        """Answer a call, and forget it. `sent` is called when the body's buffers are no longer needed."""

    def fail(self, number: int, error: UnlatchError) -> None:
        """Answer a call with an error, and forget it."""


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

    def __init__(
        self,
        accept: Accept,
        caught: Caught,
        renew: Callable[[str], None] = lambda _: None,
        within: HeldBytes | None = None,
    ) -> None:
        self._accept = accept
        self._guard = CallGuard(caught, self._break_off)
        self._renew = renew
        self._calls: dict[int, _Taken] = {}
        self._bytes = 0
        # By call number: a function to call once the caller confirms that it knows of the call's start.
        self._unheard: dict[int, Callable[[], None]] = {}
        self._outbox = Outbox(lambda: len(self._calls), self._guard, within)
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
        frames = self._outbox.frames()
        frames.welcome.CopyFrom(welcome)
        # The reader applies `draining` after the welcome, which takes it back.
        frames.draining = self.refusal is not None

    @property
    def busy(self) -> bool:
        """Whether calls are unanswered."""
        return bool(self._calls)

    def load(self, load: Load) -> None:
        """Send a load report. It replaces one that has not left yet."""
        self._outbox.frames().load.CopyFrom(load)

    def draining(self) -> None:
        """Ask the caller to send new calls elsewhere."""
        self._outbox.frames().draining = True

    def started(self, number: int, heard: Callable[[], None] | None = None) -> None:
        """Tell the caller that a call has begun; with `heard`, that it is about to.

        `heard` is called when the caller has confirmed that it knows.
        """
        if heard is not None:
            self._unheard[number] = heard
        # Without `heard`, the frame may go with the next reply, even with the reply to this call.
        self._outbox.frames(_STARTED_SECONDS if heard is None else 0.0).started.append(number)

    def ask_for_token(self) -> None:
        """Ask the caller for a new token, because the present one is about to expire."""
        self._outbox.frames(0.0).authorization = ""

    def reopen(self) -> None:
        """Ask the caller for another lane in this one's place."""
        self._outbox.frames().reopen = True

    def refuse(self, error: UnlatchError) -> None:
        """Answer every new call with this error from now on. Its caller may send it on another lane."""
        error.not_begun = True
        self.refusal = error

    def last(self) -> None:
        """Tell the caller of a lane that refuses calls: calls that get no answer were not begun."""
        self._outbox.frames(0.0).last = True

    def reply(self, number: int, reply: Reply, body: Body, sent: Callable[[], None] | None = None) -> None:
        """Answer a call, and forget it. `sent` is called when the body's buffers are no longer needed."""
        taken = self._forget(number)
        now = monotonic()
        # The longer the call has taken and the more time is left, the longer its reply may wait to share a message.
        seconds = 0.0 if taken is None else min(now - taken.came, taken.deadline - now)
        self._outbox.reply(number, reply, body, sent, seconds)

    def fail(self, number: int, error: UnlatchError) -> None:
        """Answer a call with an error, and forget it."""
        self.reply(number, failed(error), Body((), []))

    async def run(
        self, read: Callable[[], Awaitable[object]], write: Callable[[bytes], Awaitable[None]], turns: Turns
    ) -> None:
        """Carry calls until the caller closes the stream. Raises ProtocolViolation when it breaks the protocol.

        Messages are handled by `turns`, which many lanes share.
        """
        writer = asyncio.ensure_future(self._write(write))
        try:
            while isinstance(message := await read(), bytes):
                await turns.take(partial(self._receive, message))
                await self._outbox.relieved(MAX_UNSENT_BYTES)
        finally:
            self.close()
            # gRPC cannot end a stream during a write: its caller would never hear the status. The write ends once the
            # caller reads, or has been disconnected because it does not (common/net/unread.py). It is not cancelled
            # when its caller leaves meanwhile: gRPC goes on with it all the same.
            await asyncio.wait((writer,))

    async def _write(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        # Where a write fails the caller has left, and reading ends too.
        with suppress(Exception):
            await self._outbox.run(write)

    def close(self) -> None:
        """Free everything: the caller has left, or has no more time to read. May be called again."""
        self._outbox.close()
        calls, self._calls = self._calls, {}
        for taken in calls.values():
            self._guard("lane_cancel", None, taken.call.abandon)
        self._quiet.set()

    async def drain(self) -> None:
        """Ask the caller to send no more calls, and wait until all calls are answered and the answers are sent."""
        self.draining()
        while self._calls:
            self._quiet.clear()
            await self._quiet.wait()
        await self._outbox.flushed()

    async def end(self) -> None:
        """Drain a lane that refuses calls. Then tell the caller that calls without an answer were not begun."""
        await self.drain()
        self.last()
        await self._outbox.flushed()

    def _receive(self, message: bytes) -> None:
        arrived = unpack(message)
        frames = arrived.frames
        self._check_counts(frames)
        for number in frames.started:
            if (heard := self._unheard.pop(number, None)) is not None:
                self._guard("lane_started", number, heard)
        if frames.HasField("authorization"):
            # Where it raises, the previous token stays valid.
            self._guard("lane_token", None, self._renew, frames.authorization)
        # First, because cancels make room for the calls of the same message.
        self._cancel(frames.cancels)
        for descriptor, lengths, whole in arrived.bodied(frames.calls):
            self._take_call(descriptor, lengths, whole)
        for number, piece in arrived.pieces():
            # A call that was already answered may still have pieces on their way.
            if (taken := self._calls.get(number)) is not None:
                self._guard("lane_piece", number, taken.call.feed, piece)
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

    def _take_call(self, descriptor: Descriptor, lengths: list[int], whole: list[memoryview] | None) -> None:
        """Accept a call, or refuse it. Raises ProtocolViolation where its caller may not send it."""
        if self._calls and (len(self._calls) >= self._window_calls or self._bytes >= self._window_bytes):
            raise ProtocolViolation(
                f"more calls are unanswered than window_calls={self._window_calls} and "
                f"window_bytes={self._window_bytes} let be"
            )
        if descriptor.call in self._calls:
            raise ProtocolViolation(f"call {descriptor.call} is already under way")
        if self.refusal is not None:
            self.fail(descriptor.call, self.refusal)
            return
        try:
            accepted = self._accept(self, descriptor, whole)
        except Exception as error:  # noqa: BLE001 (a guard in line: on every call's path)
            self._break_off(descriptor.call, self._guard.caught("lane_call", error))
            return
        if accepted is not None:
            size, came, remaining = sum(lengths), monotonic(), descriptor.remaining_microseconds
            deadline = came + remaining / 1e6 if remaining else math.inf
            self._calls[descriptor.call] = _Taken(accepted, came, deadline, size)
            self._bytes += size

    def _cancel(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._outbox.drop(number)
            if (taken := self._forget(number)) is not None:
                self._guard("lane_cancel", None, taken.call.abandon)

    def _break_off(self, number: int, error: UnlatchError) -> None:
        """Answer one call after an exception in our own code, and abandon what was accepted of it."""
        taken = self._calls.get(number)
        self.fail(number, error)
        if taken is not None:
            self._guard("lane_cancel", None, taken.call.abandon)

    def _forget(self, number: int) -> "_Taken | None":
        """Remove and return the call with this number; None if the lane has no such call."""
        taken = self._calls.pop(number, None)
        if self._unheard:
            self._unheard.pop(number, None)
        if taken is not None:
            self._bytes -= taken.size
        if not self._calls:
            self._quiet.set()
        return taken
