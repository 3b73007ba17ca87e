"""The lane, both ends: how frames and bodies become LaneMessages and come back out of them.

    caller (client, gateway)                                   server (gateway, front)
    Outbox ── calls, pieces, cancels ──────────────────────────> unpack
    unpack <───────────────────── welcome, replies, pieces ── Outbox

An Outbox gathers what is due and sends it together: while one message is on its way to gRPC the next one fills, so
the busier a lane is the less a call costs. Small bodies go whole, beside their frame. Larger ones go in pieces, one
piece of each waiting body by turns, so that no call waits for another's bytes.

Whoever sends what the protocol does not allow loses the lane: ProtocolViolation.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Protocol

from google.protobuf.message import DecodeError

from common.protowire import Malformed, bulk_entry, split
from protos.unlatch_pb2 import Descriptor, Frames, LaneMessage, Reply, Welcome

SERVICE = "unlatch.v1.Lane"
METHOD = f"/{SERVICE}/Open"

# A body up to this size goes beside its frame: one message, no bookkeeping.
WHOLE_BYTES = 64 * 1024
# A piece: large enough that its cost is copying, small enough that copying it holds a loop well under a millisecond.
PIECE_BYTES = 512 * 1024
# A message is closed once it carries this much; what is still due goes with the next one.
MESSAGE_BYTES = 1024 * 1024
# Both, where a small body was sent within the seconds below: the next one then waits for so much less.
MIXED_BYTES = 128 * 1024
_MIXED_SECONDS = 0.1
# A message costs some 200 µs of processor at its two ends, a call in it a tenth. So a lane on which many calls are
# outstanding gathers: it lets this much time pass between messages for each of them, at most two milliseconds. A few
# calls never wait, nor does any on a lane that was quiet. (docs/decisions/0002)
_PAUSE_SECONDS_A_CALL = 0.0005
_LONGEST_PAUSE_SECONDS = 0.002
# Bodies that a server has still to send to a caller who does not take them; past it no more calls are read from him.
MOST_UNSENT_BYTES = 256 * 1024 * 1024
# What gRPC must let through: a closed message, whose last entry and frames came on top.
MAX_MESSAGE_BYTES = 8 * 1024 * 1024

_FRAMES_FIELD = LaneMessage.FRAMES_FIELD_NUMBER
_PAYLOAD_FIELD = LaneMessage.PAYLOAD_FIELD_NUMBER

Buffer = bytes | bytearray | memoryview


class ProtocolViolation(Exception):
    """The peer sent what no peer should. The lane is closed; the message says what it was."""


class Sink(Protocol):
    """Where a body's pieces go as they arrive."""

    @property
    def complete(self) -> bool:
        """Whether every byte is here."""

    def feed(self, piece: memoryview) -> None:
        """Take the next piece. Raises ProtocolViolation where it does not fit."""


def unpack(message: bytes) -> tuple[Frames, list[memoryview]]:
    """A lane message's frames and payload. Raises ProtocolViolation for bytes that are none."""
    try:
        header, payload = split(message, _PAYLOAD_FIELD)
        # What is left is the field `frames` alone, or it is not a lane message that we know.
        return LaneMessage.FromString(header).frames, payload
    except (Malformed, DecodeError) as error:
        raise ProtocolViolation(f"no lane message: {error}") from None


def check_whole(lengths: Sequence[int], pieces: Sequence[memoryview]) -> None:
    """Hold a whole body against the lengths that its frame declared. Raises ProtocolViolation."""
    if len(lengths) != len(pieces) or any(map(int.__ne__, lengths, map(len, pieces))):
        raise ProtocolViolation("a whole body does not have the lengths that its frame declares")


def check_pieces(frames: Frames, payload: Sequence[memoryview], at: int) -> None:
    """Hold the payload from entry `at` on against the message's Piece frames. Raises ProtocolViolation."""
    if len(payload) - at != len(frames.pieces):
        raise ProtocolViolation(f"{len(frames.pieces)} pieces are declared, but {len(payload) - at} entries are left")


class Arrival:
    """Where in a body of several tensors the next piece belongs."""

    __slots__ = ("_lengths", "_offset", "_tensor", "missing")

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self._tensor = self._offset = 0
        self.missing = sum(lengths)

    def place(self, size: int) -> tuple[int, int]:
        """The tensor, and the offset in it, of a next piece of `size` bytes. Raises ProtocolViolation."""
        while self._tensor < len(self._lengths) and self._offset == self._lengths[self._tensor]:
            self._tensor, self._offset = self._tensor + 1, 0
        if self._tensor == len(self._lengths) or not 0 < size <= self._lengths[self._tensor] - self._offset:
            raise ProtocolViolation("a piece crosses the end of its tensor, or carries nothing")
        at = self._offset
        self._offset += size
        self.missing -= size
        return self._tensor, at


class Body:
    """The bytes of a call's or a reply's tensors: buffers in order, of which some may still be on their way.

    None crosses from one tensor into the next. A body that is complete from the start has one buffer a tensor; one that
    arrives piece by piece is fed, and passes each piece on to whoever has asked `on_more`.
    """

    __slots__ = ("_arrival", "buffers", "lengths", "on_more", "size")

    def __init__(self, lengths: Sequence[int], buffers: list[Buffer] | None = None) -> None:
        self.lengths = lengths
        self.size = sum(lengths)
        self.buffers: list[Buffer] = [] if buffers is None else buffers
        self._arrival = Arrival(lengths) if buffers is None and self.size else None
        self.on_more: Callable[[], None] | None = None

    @property
    def complete(self) -> bool:
        """Whether every byte is here."""
        return self._arrival is None or not self._arrival.missing

    @property
    def whole(self) -> bool:
        """Whether it is here, and small enough to go beside its frame."""
        return self._arrival is None and self.size <= WHOLE_BYTES and len(self.buffers) == len(self.lengths)

    def feed(self, piece: memoryview) -> None:
        """Take the next piece. Raises ProtocolViolation where it does not fit."""
        if self._arrival is None:
            raise ProtocolViolation("a piece of a body that is already here")
        self._arrival.place(len(piece))
        self.buffers.append(piece)
        if self.on_more is not None:
            self.on_more()


class _Sending:
    """A body on its way out, piece by piece."""

    __slots__ = ("_buffer", "_offset", "body", "call", "sent")

    def __init__(self, call: int, body: Body, sent: Callable[[], None] | None) -> None:
        self.call = call
        self.body = body
        self.sent = sent
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
        self._due = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        # Bytes of bodies that were taken on and not sent yet.
        self._unsent = 0
        self._relieved = asyncio.Event()

    def welcome(self, welcome: Welcome) -> None:
        self._draft.frames.welcome.CopyFrom(welcome)
        self._wake()

    def draining(self) -> None:
        self._draft.frames.draining = True
        self._wake()

    def cancel(self, call: int) -> None:
        """Tell the server that nobody waits for a call, and stop sending its body."""
        self.drop(call)
        self._draft.frames.cancels.append(call)
        self._wake()

    def call(self, number: int, descriptor: Descriptor, body: Body) -> None:
        """Send a call under its number here. The descriptor is copied: it may be under way on another lane too."""
        frame = self._draft.frames.calls.add()
        frame.CopyFrom(descriptor)
        frame.call = number
        self._send(frame, body, None)

    def reply(self, number: int, reply: Reply, body: Body, sent: Callable[[], None] | None = None) -> None:
        """Send a call's reply, copied. `sent` is called when the body's buffers are no longer needed.

        A failure may follow a response whose body could not be sent to its end.
        """
        self.drop(number)
        frame = self._draft.frames.replies.add()
        frame.CopyFrom(reply)
        frame.call = number
        self._send(frame, body, sent)

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

    async def run(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Send what is due, for ever: until `write` raises or the task is cancelled."""
        loop = asyncio.get_running_loop()
        last = 0.0
        while True:
            await self._due.wait()
            pause = self._pause(loop.time() - last)
            if pause:
                await asyncio.sleep(pause)
            self._due.clear()
            while self._closed or self._turns or self._draft.frames.ByteSize():
                await write(self._take())
            last = loop.time()
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
        self._idle.set()

    def _send(self, frame: Descriptor | Reply, body: Body, sent: Callable[[], None] | None) -> None:
        frame.lengths[:] = body.lengths
        draft = self._draft
        draft.size += frame.ByteSize()
        self._unsent += body.size
        if body.whole:
            frame.whole = True
            self._whole_at = monotonic()
            draft.payload += body.buffers
            draft.size += body.size
            draft.whole_bytes += body.size
        else:
            frame.whole = False
            sending = self._sending[frame.call] = _Sending(frame.call, body, sent)
            self._take_turns(sending)
        if draft.size > MESSAGE_BYTES:
            self._closed.append(draft)
            self._draft = _Draft()
        self._wake()

    def _take_turns(self, sending: _Sending) -> None:
        def more() -> None:
            if sending not in self._turns:
                self._turns.append(sending)
                self._wake()

        sending.body.on_more = None if sending.body.complete else more
        self._turns.append(sending)

    def _pause(self, since_last: float) -> float:
        """How long to gather before the next message: nothing, where calls are few or large or the lane was quiet."""
        if self._closed or self._draft.size > WHOLE_BYTES or self._turns:
            return 0.0
        pause = min(_LONGEST_PAUSE_SECONDS, _PAUSE_SECONDS_A_CALL * self._outstanding()) - since_last
        # The loop's timers tick in milliseconds: half of one is none.
        return pause if pause > 0.0005 else 0.0

    def _wake(self) -> None:
        self._idle.clear()
        self._due.set()

    def _sent(self, size: int) -> None:
        self._unsent -= size
        self._relieved.set()

    def _take(self) -> bytes:
        """The next message: frames that are due, then pieces by turns until it is full."""
        if self._closed:
            # Pieces wait: their frames may be in a later message than this.
            draft = self._closed.popleft()
            self._sent(draft.whole_bytes)
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
        self._sent(draft.whole_bytes)
        for sending in done:
            self.drop(sending.call)
        return message


class _Draft:
    """A message that is being filled."""

    __slots__ = ("frames", "payload", "size", "whole_bytes")

    def __init__(self) -> None:
        self.frames = Frames()
        self.payload: list[Buffer] = []
        self.size = 0
        self.whole_bytes = 0

    def packed(self) -> bytes:
        """Its bytes. Payload is copied here, once."""
        header = self.frames.SerializeToString()
        parts: list[Buffer] = [bulk_entry(_FRAMES_FIELD, len(header)), header]
        for buffer in self.payload:
            parts.append(bulk_entry(_PAYLOAD_FIELD, len(buffer)))
            parts.append(buffer)
        return b"".join(parts)
