"""The outbox: one end of a lane gathers here what it has to say, and sends it in common messages.

While one message is on its way to gRPC the next one fills, so the busier a lane is the less a call costs. Small bodies
go whole, beside their frame. Larger ones go in pieces, one piece of each waiting body by turns, so that no call waits
for another's bytes.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import monotonic

from unlatch.common.lane.body import WHOLE_BYTES, Body, Buffer, Cursor, kept
from unlatch.common.lane.frames import MAX_ENTRIES, MAX_FRAMES, PAYLOAD_FIELD
from unlatch.common.lane.held_bytes import HeldBytes
from unlatch.common.lane.listener import CallGuard
from unlatch.common.lane.pacing import Pace, gathered
from unlatch.common.lane.protowire import bulk_entry
from unlatch.protos.unlatch_pb2 import Descriptor, Frames, LaneMessage, Reply

# A piece: large enough that its cost is copying, small enough that copying it holds a loop well under a millisecond.
PIECE_BYTES = 512 * 1024
# A message is closed once it carries this much; the rest goes with the next one.
MESSAGE_BYTES = 1024 * 1024
# Both sizes, where a small body was sent within the seconds below: the next small one then waits for less.
MIXED_BYTES = 128 * 1024
_MIXED_SECONDS = 0.1

_FRAMES_FIELD = LaneMessage.FRAMES_FIELD_NUMBER


@dataclass(slots=True, eq=False)
class _Sending:
    """A body on its way out, piece by piece."""

    call: int
    cursor: Cursor
    sent: Callable[[], None] | None


class Outbox:
    """Everything that one end of a lane has still to say. No method waits, except `run`, which sends.

    `outstanding` returns how many calls are unanswered. `guard` ends a call whose frames or bytes could not be sent.
    `within` counts what is held here too: frames and small bodies, and each message until gRPC's flow control has taken
    it. Large bodies are counted where they come from.
    """

    def __init__(self, outstanding: Callable[[], int], guard: CallGuard, within: HeldBytes | None = None) -> None:
        self._outstanding = outstanding
        self._guard = guard
        self._held = HeldBytes(within=within)
        self._draft = _Draft()
        self._closed: deque[_Draft] = deque()
        self._whole_at = float("-inf")
        self._sending: dict[int, _Sending] = {}
        self._turns: deque[_Sending] = deque()
        self._pace = Pace()
        self._idle = asyncio.Event()
        self._idle.set()
        # The lane has ended: nothing more is sent, and nothing is waited for.
        self._ended = False
        # The bytes of the message that is being written.
        self._written_bytes = 0
        self._relieved = asyncio.Event()

    def frames(self, within: float | None = None) -> Frames:
        """Return the frames of the next message, to add to them. It leaves `within` seconds after the last, or soon."""
        self._wake(within)
        return self._draft.frames

    def cancel(self, call: int) -> None:
        """Tell the server that a call is given up, and stop sending its body."""
        self.drop(call)
        self.frames().cancels.append(call)

    def call(self, number: int, descriptor: Descriptor, body: Body) -> None:
        """Send a call under its number here. The descriptor is copied: a caller makes several calls of one."""
        frame = self._draft.frames.calls.add()
        frame.CopyFrom(descriptor)
        frame.call = number
        self._send(frame, body, None, gathered(self._outstanding()))

    def reply(
        self,
        number: int,
        reply: Reply,
        body: Body,
        sent: Callable[[], None] | None = None,
        taken_seconds: float = 0.0,
    ) -> None:
        """Send a call's reply, copied, after the call has taken `taken_seconds`. The body is let go of as it is sent.

        `sent` is called when the body's buffers are no longer needed. A failure may follow a response whose body could
        not be sent to its end.
        """
        self.drop(number)
        if self._ended:
            if sent is not None:
                self._guard("lane_sent", None, sent)
            return
        frame = self._draft.frames.replies.add()
        frame.CopyFrom(reply)
        frame.call = number
        # A failure has no tensors, and is worth something while its caller can still go elsewhere.
        within = gathered(self._outstanding(), taken_seconds) if body.lengths else 0.0
        self._send(frame, body, sent, within)

    def drop(self, call: int) -> None:
        """Send no more of a call's or a reply's body."""
        sending = self._sending.pop(call, None)
        if sending is None:
            return
        sending.cursor.close()
        if sending in self._turns:
            self._turns.remove(sending)
        if sending.sent is not None:
            self._guard("lane_sent", None, sending.sent)
        if not self._sending:
            # A drain or a close may wait for there to be nothing left.
            self._wake()

    async def run(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Send what is due until the outbox is closed, `write` raises, or the task is cancelled."""
        while not self._ended:
            await self._pace.next()
            while not self._ended and (self._closed or self._turns or self._draft.frames.ByteSize()):
                if message := self._take():
                    await self._write(write, message)
            self._pace.sent()
            if not self._sending:
                self._idle.set()

    async def _write(self, write: Callable[[bytes], Awaitable[None]], message: bytes) -> None:
        self._written_bytes = len(message)
        self._held.hold(len(message))
        try:
            await write(message)
        finally:
            self._written_bytes = 0
            self._free(len(message))

    async def flushed(self) -> None:
        """Wait until everything, bodies included, has been handed to gRPC."""
        await self._idle.wait()

    async def relieved(self, limit: int) -> None:
        """Wait until no more than `limit` bytes are held here, and none while all that may be held in all is held.

        So a peer that reads slowly is served slowly.
        """
        while self._held.held > limit or (self._held.held and self._held.is_full):
            self._relieved.clear()
            await self._relieved.wait()

    def close(self) -> None:
        """Free every body and end the tasks that wait for bodies to be sent, because the lane has ended.

        Frames that are added later are dropped, and no task waits for them.
        """
        self._ended = True
        for call in list(self._sending):
            self.drop(call)
        self._closed.clear()
        self._draft = _Draft()
        # The message that is being written stays counted until it has left.
        self._free(self._held.held - self._written_bytes)
        self._pace.send_within(0.0)
        self._idle.set()

    def _send(self, frame: Descriptor | Reply, body: Body, sent: Callable[[], None] | None, within: float) -> None:
        frame.lengths[:] = body.lengths
        draft = self._draft
        own_bytes = frame.ByteSize()
        draft.count += 1
        if body.whole:
            own_bytes += body.size
            frame.whole = True
            self._whole_at = monotonic()
            draft.payload += map(kept, body.buffers)
        else:
            frame.whole = False
            self._send_pieces(frame.call, body, sent)
            if isinstance(frame, Reply):
                # A call's body may have to be sent again, elsewhere; a reply's never.
                body.let_go()
        draft.size += own_bytes
        self._held.hold(own_bytes)
        if draft.full:
            self._closed.append(draft)
            self._draft = _Draft()
        self._wake(within)

    def _send_pieces(self, call: int, body: Body, sent: Callable[[], None] | None) -> None:
        def more() -> None:
            if sending not in self._turns:
                self._turns.append(sending)
                self._wake()

        sending = self._sending[call] = _Sending(call, body.subscribe(more), sent)
        self._turns.append(sending)

    def _wake(self, within: float | None = None) -> None:
        if self._ended:
            return
        self._idle.clear()
        # What is large, or comes in pieces, gains nothing by waiting.
        at_once = self._closed or self._turns or self._draft.size > WHOLE_BYTES
        self._pace.send_within(0.0 if at_once else gathered(self._outstanding()) if within is None else within)

    def _free(self, size: int) -> None:
        self._held.free(size)
        self._relieved.set()

    def _take(self) -> bytes:
        """Return the next message: frames that are due, then pieces by turns until it is full. Empty if that failed."""
        done: list[_Sending] = []
        if self._closed:
            # Pieces wait: their frames may be in a later message than this.
            draft = self._closed.popleft()
            own_bytes = draft.size
        else:
            draft, self._draft = self._draft, _Draft()
            own_bytes = draft.size
            self._fill(draft, done)
        try:
            message = draft.packed()
        except Exception as error:  # noqa: BLE001 (the guard: the message's calls fail, and no others)
            message = b""
            told = self._guard.caught("lane_writer", error)
            for call in draft.numbers():
                self._guard.fail(call, told)
        self._free(own_bytes)
        for sending in done:
            self.drop(sending.call)
        return message

    def _fill(self, draft: "_Draft", done: list[_Sending]) -> None:
        """Add pieces by turns until the message is full; bodies that end in it are appended to `done`."""
        mixed = monotonic() - self._whole_at < _MIXED_SECONDS
        message_bytes, piece_bytes = (MIXED_BYTES, MIXED_BYTES) if mixed else (MESSAGE_BYTES, PIECE_BYTES)
        while self._turns and draft.size < message_bytes:
            sending = self._turns.popleft()
            self._guard("lane_writer", sending.call, self._add_piece, draft, sending, piece_bytes, done)

    def _add_piece(self, draft: "_Draft", sending: _Sending, max_bytes: int, done: list[_Sending]) -> None:
        piece = sending.cursor.next(max_bytes)
        if piece is not None:
            draft.frames.pieces.add().call = sending.call
            draft.payload.append(piece)
            draft.size += len(piece)
        if sending.cursor.finished:
            done.append(sending)
        elif piece is not None:
            self._turns.append(sending)


@dataclass(slots=True)
class _Draft:
    """A message that is being filled. `size` is that of its calls, replies, bodies and pieces."""

    frames: Frames = field(default_factory=Frames)
    payload: list[Buffer] = field(default_factory=list)
    # Calls and replies.
    count: int = 0
    size: int = 0

    @property
    def full(self) -> bool:
        """Whether the message is to be closed."""
        return self.size > MESSAGE_BYTES or self.count >= MAX_FRAMES or len(self.payload) >= MAX_ENTRIES

    def packed(self) -> bytes:
        """Return the message's bytes. Payload is copied here, once."""
        header = self.frames.SerializeToString()
        parts: list[Buffer] = [bulk_entry(_FRAMES_FIELD, len(header)), header]
        for buffer in self.payload:
            parts.append(bulk_entry(PAYLOAD_FIELD, len(buffer)))
            parts.append(buffer)
        return b"".join(parts)

    def numbers(self) -> set[int]:
        """Return the calls that the message is about. Without failures: a failure that is lost ends nothing more."""
        frames = self.frames
        replies = {reply.call for reply in frames.replies if not reply.HasField("failure")}
        return replies.union(frames.started, (call.call for call in frames.calls), (one.call for one in frames.pieces))
