"""The lane's messages: what both ends agree on, and how frames and payload come out of a message.

    caller (client, gateway)                                   server (gateway, front)
    Outbox ── calls, pieces, cancels ──────────────────────────> unpack
    unpack <───────────────────── welcome, replies, pieces ── Outbox

Whoever sends what the protocol does not allow loses the lane: ProtocolViolation.
"""

from collections.abc import Sequence

from google.protobuf.message import DecodeError

from unlatch.common.lane.protowire import Malformed, split
from unlatch.protos.unlatch_pb2 import Frames, LaneMessage

SERVICE = "unlatch.v1.Lane"
METHOD = f"/{SERVICE}/Open"

# What one call's descriptor may measure, and how many tensors it may bring: a lane carries everybody's, so the doors
# refuse what is larger.
MOST_DESCRIPTOR_BYTES = 128 * 1024
MOST_TENSORS = 256
# A message is closed, too, once it has so many calls or replies, which hold their reader's loop for a millisecond or
# two, or so many entries.
MOST_FRAMES = 64
# Of another's message: a lane that brings more at once is not ours, and would hold the loop.
MOST_CALLS = 2 * MOST_FRAMES
MOST_ENTRIES = 1024
# Frames and bodies that a server has still to send to a caller who does not take them; past it no more are read of him.
MOST_UNSENT_BYTES = 256 * 1024 * 1024
# What gRPC must let through: a closed message, whose last entry and frames came on top.
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
_MAX_MESSAGE_ENTRIES = 2 * MOST_ENTRIES

PAYLOAD_FIELD = LaneMessage.PAYLOAD_FIELD_NUMBER


class ProtocolViolation(Exception):
    """The peer sent what no peer should. The lane is closed; the message says what it was."""


def unpack(message: bytes) -> tuple[Frames, list[memoryview]]:
    """A lane message's frames and payload. Raises ProtocolViolation for bytes that are none."""
    if len(message) > MAX_MESSAGE_BYTES:
        raise ProtocolViolation(f"a lane message of {len(message)} bytes; {MAX_MESSAGE_BYTES} are the most")
    try:
        header, payload = split(message, PAYLOAD_FIELD, _MAX_MESSAGE_ENTRIES)
        # What is left is the field `frames` alone, or it is not a lane message that we know.
        return LaneMessage.FromString(header).frames, payload
    except (Malformed, DecodeError) as error:
        raise ProtocolViolation(f"no lane message: {error}") from None


def check_whole(lengths: list[int], pieces: Sequence[memoryview]) -> None:
    """Hold a whole body against the lengths that its frame declared. Raises ProtocolViolation."""
    if list(map(len, pieces)) != lengths:
        raise ProtocolViolation("a whole body does not have the lengths that its frame declares")


def check_pieces(frames: Frames, payload: Sequence[memoryview], at: int) -> None:
    """Hold the payload from entry `at` on against the message's Piece frames. Raises ProtocolViolation."""
    if len(payload) - at != len(frames.pieces):
        raise ProtocolViolation(f"{len(frames.pieces)} pieces are declared, but {len(payload) - at} entries are left")
