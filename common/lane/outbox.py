"""The outbox: one end of a lane gathers here what it has to say, and sends it in common messages.

While one message is on its way to gRPC the next one fills, so the busier a lane is the less a call costs. Small bodies
go whole, beside their frame. Larger ones go in pieces, one piece of each waiting body by turns, so that no call waits
for another's bytes.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from time import monotonic

from unlatch.common.errors import UnlatchError
from unlatch.common.lane.body import WHOLE_BYTES, Body, Buffer, Cursor
from unlatch.common.lane.frames import MAX_ENTRIES, MAX_FRAMES, PAYLOAD_FIELD
from unlatch.common.lane.listener import Caught
from unlatch.common.lane.pacing import Pace, gathered
from unlatch.common.lane.protowire import bulk_entry
from unlatch.protos.unlatch_pb2 import Descriptor, Frames, LaneMessage, Load, Reply, Welcome

# A piece: large enough that its cost is copying, small enough that copying it holds a loop well under a millisecond.
PIECE_BYTES = 512 * 1024
# A message is closed once it carries this much; the rest goes with the next one.
MESSAGE_BYTES = 1024 * 1024
# Both sizes, where a small body was sent within the seconds below: the next small one then waits for less.
MIXED_BYTES = 128 * 1024
_MIXED_SECONDS = 0.1

_FRAMES_FIELD = LaneMessage.FRAMES_FIELD_NUMBER


class _Sending:
    """A body on its way out, piece by piece."""

    __slots__ = ("call", "cursor", "sent", "size")

    def __init__(self, call: int, size: int, cursor: Cursor, sent: Callable[[], None] | None) -> None:
        self.call = call
        self.size = size
        self.cursor = cursor
        self.sent = sent


class Outbox:
    """Everything that one end of a lane has still to say. No method waits, except `run`, which sends.

    `outstanding` returns how many calls are unanswered. `caught` settles exceptions that no code expected, and `lost`
    ends a call, with that error, whose frames or bytes could not be sent.
    """

    def __init__(
        self, outstanding: Callable[[], int], caught: Caught, lost: Callable[[int, UnlatchError], None]
    ) -> None:
        self._outstanding = outstanding
        self._caught = caught
        self._lost = lost
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
        """Say what this side serves and grants."""
        self._draft.frames.welcome.CopyFrom(welcome)
        # The reader applies `draining` after the welcome, which takes it back.
        self._draft.frames.draining = False
        self._wake()

    def load(self, load: Load) -> None:
        """Say how much there is to do here. The latest report counts: it replaces one that has not left yet."""
        self._draft.frames.load.CopyFrom(load)
        self._wake()

    def draining(self) -> None:
        """Ask for no more calls."""
        self._draft.frames.draining = True
        self._wake()

    def started(self, call: int, within: float) -> None:
        """Say that a call is begun, or that this is known; at most `within` seconds after the last message."""
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
        """Tell the server that a call is given up, and stop sending its body."""
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
        """Send a call's reply, copied, after the call has taken `taken_seconds`. The body is let go of as it is sent.

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
        if sending is None:
            return
        sending.cursor.close()
        self._sent(sending.size)
        if sending in self._turns:
            self._turns.remove(sending)
        if sending.sent is not None:
            try:
                sending.sent()
            except Exception as error:  # noqa: BLE001 (the guard: the other bodies go on)
                self._caught("lane_sent", error)
        if not self._sending:
            # A drain or a close may wait for there to be nothing left.
            self._wake()

    async def run(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Send what is due, for ever: until `write` raises or the task is cancelled."""
        while True:
            await self._pace.next()
            while self._closed or self._turns or self._draft.frames.ByteSize():
                if message := self._take():
                    await write(message)
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
        """Free every body and end the tasks that wait for bodies to be sent, because the lane has ended."""
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
            self._send_pieces(frame.call, body, sent)
            if isinstance(frame, Reply):
                # A call's body may have to be sent again, elsewhere; a reply's never.
                body.let_go()
        if draft.full:
            self._closed.append(draft)
            self._draft = _Draft()
        self._wake(within)

    def _send_pieces(self, call: int, body: Body, sent: Callable[[], None] | None) -> None:
        def more() -> None:
            if sending not in self._turns:
                self._turns.append(sending)
                self._wake()

        sending = self._sending[call] = _Sending(call, body.size, body.subscribe(more), sent)
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
        """Return the next message: frames that are due, then pieces by turns until it is full. Empty if that failed."""
        done: list[_Sending] = []
        if self._closed:
            # Pieces wait: their frames may be in a later message than this.
            draft = self._closed.popleft()
        else:
            draft, self._draft = self._draft, _Draft()
            self._fill(draft, done)
        try:
            message = draft.packed()
        except Exception as error:  # noqa: BLE001 (the guard: the message's calls fail, and no others)
            message = b""
            self._lose(draft.numbers(), error)
        self._sent(draft.own_bytes)
        for sending in done:
            self.drop(sending.call)
        return message

    def _fill(self, draft: "_Draft", done: list[_Sending]) -> None:
        """Add pieces by turns until the message is full; bodies that end in it are appended to `done`."""
        mixed = monotonic() - self._whole_at < _MIXED_SECONDS
        message_bytes, piece_bytes = (MIXED_BYTES, MIXED_BYTES) if mixed else (MESSAGE_BYTES, PIECE_BYTES)
        while self._turns and draft.size < message_bytes:
            sending = self._turns.popleft()
            try:
                piece = sending.cursor.next(piece_bytes)
            except Exception as error:  # noqa: BLE001 (the guard: this call fails, and no other)
                self.drop(sending.call)
                self._lose([sending.call], error)
                continue
            if piece is not None:
                draft.frames.pieces.add().call = sending.call
                draft.payload.append(piece)
                draft.size += len(piece)
            if sending.cursor.finished:
                done.append(sending)
            elif piece is not None:
                self._turns.append(sending)

    def _lose(self, calls: Iterable[int], error: Exception) -> None:
        """End the calls of a message, or of a body, that could not be made."""
        told = self._caught("lane_writer", error)
        for call in calls:
            self._lost(call, told)


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
