"""The lane's messages: what both ends agree on, and how frames and payload come out of a message.

    caller (client, gateway)                                   server (gateway, dispatcher)
    Outbox ── calls, pieces, cancels ──────────────────────────> unpack
    unpack <───────────────────── welcome, replies, pieces ── Outbox

A peer that sends what the protocol does not allow loses the lane: ProtocolViolation.
"""

from collections.abc import Sequence, Sized

from google.protobuf.message import DecodeError

from unlatch.common.lane.protowire import Malformed, split
from unlatch.protos.unlatch_pb2 import Frames, LaneMessage

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
# Bytes of frames and bodies that a server has still to send to a caller who reads slowly. Past it the server stops
# reading from that caller.
MAX_UNSENT_BYTES = 256 * 1024 * 1024
# The largest message that gRPC must let through: a closed one, whose last entry and frames came on top.
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
_MAX_MESSAGE_ENTRIES = 2 * MAX_ENTRIES

PAYLOAD_FIELD = LaneMessage.PAYLOAD_FIELD_NUMBER


class ProtocolViolation(Exception):
    """The peer sent what the protocol does not allow. The lane is closed; the message says what was wrong."""


def unpack(message: bytes) -> tuple[Frames, list[memoryview]]:
    """Return a lane message's frames and payload. Raises ProtocolViolation for bytes that are no lane message."""
    if len(message) > MAX_MESSAGE_BYTES:
        raise ProtocolViolation(f"a lane message of {len(message)} bytes; {MAX_MESSAGE_BYTES} are the most")
    try:
        header, payload = split(message, PAYLOAD_FIELD, _MAX_MESSAGE_ENTRIES)
        # The rest of the message is the field `frames` alone, or the message is not of a version that we know.
        return LaneMessage.FromString(header).frames, payload
    except (Malformed, DecodeError) as error:
        raise ProtocolViolation(f"no lane message: {error}") from None


def check_whole(lengths: list[int], pieces: Sequence[Sized]) -> None:
    """Compare a whole body with the lengths that its frame declared. Raises ProtocolViolation."""
    if list(map(len, pieces)) != lengths:
        raise ProtocolViolation("a whole body does not have the lengths that its frame declares")


def check_pieces(frames: Frames, payload: Sequence[memoryview], at: int) -> None:
    """Compare the payload from entry `at` on with the message's Piece frames. Raises ProtocolViolation."""
    if len(payload) - at != len(frames.pieces):
        raise ProtocolViolation(f"{len(frames.pieces)} pieces are declared, but {len(payload) - at} entries are left")
