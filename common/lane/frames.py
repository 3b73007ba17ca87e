"""The lane's messages: what both ends agree on, and how frames and payload come out of a message.

    caller (client, gateway)                                   server (gateway, dispatcher)
    Outbox ── calls, pieces, cancels ──────────────────────────> unpack
    unpack <───────────────────── welcome, replies, pieces ── Outbox

A peer that sends what the protocol does not allow loses the lane: ProtocolViolation.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from google.protobuf.message import DecodeError

from unlatch.common.lane.protowire import Malformed, split
from unlatch.protos.unlatch_pb2 import Descriptor, LaneMessage, Reply

SERVICE = "unlatch.v1.Lane"
METHOD = f"/{SERVICE}/Open"

# The largest descriptor of one call, and the most tensors that a call may bring. A lane is shared by many callers, so
# the gateway's doors refuse larger ones.
MAX_DESCRIPTOR_BYTES = 128 * 1024
MAX_TENSORS = 256
# The outbox closes a message, too, at this number of calls or replies, which hold their reader's loop for a millisecond
# or two, or at this number of entries.
MAX_FRAMES = 64
MAX_ENTRIES = 1024
# Calls in a message that arrives. A message with more is not from our outbox, and would hold the loop.
MAX_CALLS = 2 * MAX_FRAMES
# Bytes of frames and small bodies that a server has still to send to a caller who reads slowly. Past it the server
# stops reading from that caller.
MAX_UNSENT_BYTES = 8 * 1024 * 1024
# The largest message that gRPC must let through: a closed one, whose last entry and frames came on top.
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
_MAX_MESSAGE_ENTRIES = 2 * MAX_ENTRIES

# Frames of messages with more bytes of frames than this are copied. 64 usual calls have a third of it.
_CROWDED_BYTES = 32 * 1024

PAYLOAD_FIELD = LaneMessage.PAYLOAD_FIELD_NUMBER


Bodied = TypeVar("Bodied", Descriptor, Reply)


class ProtocolViolation(Exception):
    """The peer sent what the protocol does not allow. The lane is closed; the message says what was wrong."""


class Arrived:
    """A lane message that has arrived: its frames, and the entries of its payload, which are taken in order.

    A frame shares the memory of all frames of its message. In a large message each is copied, so that a call that waits
    does not hold the others' descriptors too.
    """

    __slots__ = ("_at", "_copies", "frames", "payload")

    def __init__(self, header: bytes, payload: list[memoryview]) -> None:
        # The rest of the message is the field `frames` alone, or the message is not of a version that we know.
        self.frames = LaneMessage.FromString(header).frames
        self.payload = payload
        self._at = 0
        self._copies = len(header) > _CROWDED_BYTES

    def bodied(self, frames: Iterable[Bodied]) -> Iterator[tuple[Bodied, list[int], list[memoryview] | None]]:
        """Give each of the calls, or replies, with the lengths of its tensors, and their bytes if they came beside it.

        Raises ProtocolViolation.
        """
        for frame in frames:
            # Read once: each walk of a protobuf list costs half a microsecond.
            lengths = frame.lengths[:]
            whole: list[memoryview] | None = None
            if frame.whole:
                at, self._at = self._at, self._at + len(lengths)
                whole = self.payload[at : self._at]
                if list(map(len, whole)) != lengths:
                    raise ProtocolViolation("a whole body does not have the lengths that its frame declares")
            yield (_copy(frame) if self._copies else frame), lengths, whole

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """Return the pieces, each with its call's number, after the whole bodies. Raises ProtocolViolation."""
        pieces, left = self.frames.pieces, self.payload[self._at :]
        if len(left) != len(pieces):
            raise ProtocolViolation(f"{len(pieces)} pieces are declared, but {len(left)} entries are left")
        return zip((piece.call for piece in pieces), left, strict=True)


def _copy(frame: Bodied) -> Bodied:
    copied = type(frame)()
    copied.CopyFrom(frame)
    return copied


def unpack(message: bytes) -> Arrived:
    """Return a lane message's frames and payload. Raises ProtocolViolation for bytes that are no lane message."""
    if len(message) > MAX_MESSAGE_BYTES:
        raise ProtocolViolation(f"a lane message of {len(message)} bytes; {MAX_MESSAGE_BYTES} are the most")
    try:
        return Arrived(*split(message, PAYLOAD_FIELD, _MAX_MESSAGE_ENTRIES))
    except (Malformed, DecodeError) as error:
        raise ProtocolViolation(f"no lane message: {error}") from None
