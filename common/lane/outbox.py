"""The outbox: one end of a lane gathers here what it has to say, and sends it together.

While one message is on its way to gRPC the next one fills, so the busier a lane is the less a call costs. Small bodies
go whole, beside their frame. Larger ones go in pieces, one piece of each waiting body by turns, so that no call waits
for another's bytes.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from time import monotonic

from unlatch.common.lane.body import WHOLE_BYTES, Body, Buffer
from unlatch.common.lane.frames import MOST_ENTRIES, MOST_FRAMES, PAYLOAD_FIELD
from unlatch.common.lane.pacing import Pace, gathered
from unlatch.common.lane.protowire import bulk_entry
from unlatch.protos.unlatch_pb2 import Descriptor, Frames, LaneMessage, Load, Reply, Welcome

# A piece: large enough that its cost is copying, small enough that copying it holds a loop well under a millisecond.
PIECE_BYTES = 512 * 1024
# A message is closed once it carries this much; what is still due goes with the next one.
MESSAGE_BYTES = 1024 * 1024
# Both, where a small body was sent within the seconds below: the next one then waits for so much less.
MIXED_BYTES = 128 * 1024
_MIXED_SECONDS = 0.1

_FRAMES_FIELD = LaneMessage.FRAMES_FIELD_NUMBER


class _Sending:
    """A body on its way out, piece by piece."""

    __slots__ = ("_buffer", "_keeps", "_offset", "body", "call", "sent")

    def __init__(self, call: int, body: Body, sent: Callable[[], None] | None, *, keeps: bool) -> None:
        self.call = call
        self.body = body
        self.sent = sent
        # Whether somebody may want the buffers again: a call's, to send it elsewhere; a reply's nobody.
        self._keeps = keeps
        self._buffer = self._offset = 0

    def next(self, most_bytes: int) -> Buffer | None:
        """The next piece, or None when there is none yet, or no more."""
        buffers = self.body.buffers
        while self._buffer < len(buffers):
            buffer = buffers[self._buffer]
            left = len(buffer) - self._offset
            if left > most_bytes:
                start = self._offset
                self._offset += most_bytes
                return memoryview(buffer)[start : self._offset]
            start, self._offset = self._offset, 0
            if not self._keeps:
                buffers[self._buffer] = b""
            self._buffer += 1
            if left:
                return memoryview(buffer)[start:] if start else buffer
        return None

    @property
    def finished(self) -> bool:
        return self.body.complete and self._buffer == len(self.body.buffers)


class Outbox:
    """What one end of a lane has still to say. Nothing here waits, except `run`, which sends."""

    def __init__(self, outstanding: Callable[[], int]) -> None:
        self._outstanding = outstanding
        self._draft = _Draft()
        self._closed: deque[_Draft] = deque()
        self._whole_at = float("-inf")
        self._sending: dict[int, _Sending] = {}
        self._turns: deque[_Sending] = deque()
        self._pace = Pace()
        self._idle = asyncio.Event()
        self._idle.set()
        # Bytes of frames and bodies that were taken on and not sent yet.
        self._unsent = 0
        self._relieved = asyncio.Event()

    def welcome(self, welcome: Welcome) -> None:
        self._draft.frames.welcome.CopyFrom(welcome)
        # It would be applied after the welcome, which takes it back.
        self._draft.frames.draining = False
        self._wake()

    def load(self, load: Load) -> None:
        """Say how much there is to do here: the latest report counts, and one that has not left yet is out of date."""
        self._draft.frames.load.CopyFrom(load)
        self._wake()

    def draining(self) -> None:
        self._draft.frames.draining = True
        self._wake()

    def started(self, call: int, within: float) -> None:
        """Say that a call is begun, or that this is known; at most so many seconds after the last message."""
        self._draft.frames.started.append(call)
        self._wake(within)

    def authorization(self, token: str) -> None:
        """Renew the caller's token; or, empty, ask the caller to."""
        self._draft.frames.authorization = token
        self._wake(0.0)

    def reopen(self) -> None:
        """Ask the caller for another lane in this one's place."""
        self._draft.frames.reopen = True
        self._wake()

    def cancel(self, call: int) -> None:
        """Tell the server that nobody waits for a call, and stop sending its body."""
        self.drop(call)
        self._draft.frames.cancels.append(call)
        self._wake()

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
        """Send a call's reply, copied, after the call has taken so long.

        `sent` is called when the body's buffers are no longer needed. A failure may follow a response whose body could
        not be sent to its end.
        """
        self.drop(number)
        frame = self._draft.frames.replies.add()
        frame.CopyFrom(reply)
        frame.call = number
        # A refusal is worth something while its caller can still go elsewhere.
        within = 0.0 if reply.HasField("failure") else gathered(self._outstanding(), taken_seconds)
        self._send(frame, body, sent, within)

    def drop(self, call: int) -> None:
        """Send no more of a call's or a reply's body."""
        sending = self._sending.pop(call, None)
        if sending is not None:
            sending.body.on_more = None
            self._sent(sending.body.size)
            if sending in self._turns:
                self._turns.remove(sending)
            if sending.sent is not None:
                sending.sent()
            if not self._sending:
                # Somebody may wait for there to be nothing left.
                self._wake()

    async def run(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Send what is due, for ever: until `write` raises or the task is cancelled."""
        while True:
            await self._pace.next()
            while self._closed or self._turns or self._draft.frames.ByteSize():
                await write(self._take())
            self._pace.sent()
            if not self._sending:
                self._idle.set()

    async def flushed(self) -> None:
        """Wait until everything, bodies included, has been handed to gRPC."""
        await self._idle.wait()

    async def relieved(self, limit: int) -> None:
        """Wait until no more than `limit` bytes of bodies are unsent: a peer that reads slowly is served slowly."""
        while self._unsent > limit:
            self._relieved.clear()
            await self._relieved.wait()

    def close(self) -> None:
        """The lane is gone: let go of every body, and of whoever waits for them to be sent."""
        for call in list(self._sending):
            self.drop(call)
        self._closed.clear()
        self._draft = _Draft()
        self._idle.set()

    def _send(self, frame: Descriptor | Reply, body: Body, sent: Callable[[], None] | None, within: float) -> None:
        frame.lengths[:] = body.lengths
        draft = self._draft
        frame_bytes = frame.ByteSize()
        draft.size += frame_bytes
        draft.own_bytes += frame_bytes
        draft.count += 1
        self._unsent += frame_bytes + body.size
        if body.whole:
            frame.whole = True
            self._whole_at = monotonic()
            draft.payload += body.buffers
            draft.size += body.size
            draft.own_bytes += body.size
        else:
            frame.whole = False
            keeps = isinstance(frame, Descriptor)
            sending = self._sending[frame.call] = _Sending(frame.call, body, sent, keeps=keeps)
            self._take_turns(sending)
        if draft.full:
            self._closed.append(draft)
            self._draft = _Draft()
        self._wake(within)

    def _take_turns(self, sending: _Sending) -> None:
        def more() -> None:
            if sending not in self._turns:
                self._turns.append(sending)
                self._wake()

        sending.body.on_more = None if sending.body.complete else more
        self._turns.append(sending)

    def _wake(self, within: float | None = None) -> None:
        self._idle.clear()
        # What is large, or comes in pieces, gains nothing by waiting.
        at_once = self._closed or self._turns or self._draft.size > WHOLE_BYTES
        self._pace.send_within(0.0 if at_once else gathered(self._outstanding()) if within is None else within)

    def _sent(self, size: int) -> None:
        self._unsent -= size
        self._relieved.set()

    def _take(self) -> bytes:
        """The next message: frames that are due, then pieces by turns until it is full."""
        if self._closed:
            # Pieces wait: their frames may be in a later message than this.
            draft = self._closed.popleft()
            self._sent(draft.own_bytes)
            return draft.packed()
        draft, self._draft = self._draft, _Draft()
        mixed = monotonic() - self._whole_at < _MIXED_SECONDS
        message_bytes, piece_bytes = (MIXED_BYTES, MIXED_BYTES) if mixed else (MESSAGE_BYTES, PIECE_BYTES)
        done: list[_Sending] = []
        while self._turns and draft.size < message_bytes:
            sending = self._turns.popleft()
            piece = sending.next(piece_bytes)
            if piece is not None:
                draft.frames.pieces.add().call = sending.call
                draft.payload.append(piece)
                draft.size += len(piece)
            if sending.finished:
                done.append(sending)
            elif piece is not None:
                self._turns.append(sending)
        message = draft.packed()
        self._sent(draft.own_bytes)
        for sending in done:
            self.drop(sending.call)
        return message


class _Draft:
    """A message that is being filled."""

    __slots__ = ("count", "frames", "own_bytes", "payload", "size")

    def __init__(self) -> None:
        self.frames = Frames()
        self.count = 0
        self.payload: list[Buffer] = []
        self.size = 0
        # Of its frames, and of the bodies that go beside them.
        self.own_bytes = 0

    @property
    def full(self) -> bool:
        return self.size > MESSAGE_BYTES or self.count >= MOST_FRAMES or len(self.payload) >= MOST_ENTRIES

    def packed(self) -> bytes:
        """Its bytes. Payload is copied here, once."""
        header = self.frames.SerializeToString()
        parts: list[Buffer] = [bulk_entry(_FRAMES_FIELD, len(header)), header]
        for buffer in self.payload:
            parts.append(bulk_entry(PAYLOAD_FIELD, len(buffer)))
            parts.append(buffer)
        return b"".join(parts)
