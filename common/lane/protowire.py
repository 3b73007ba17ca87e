"""Protobuf messages whose bulk never meets a protobuf runtime.

A tensor's bytes lie in `repeated bytes` fields at a message's top level. `split` walks that level once, in whatever
order the fields come, and gives the bulk as slices of the message and the rest as bytes to parse; `bulk_entry` is the
way back. Wire format: https://protobuf.dev/programming-guides/encoding/
"""

from functools import lru_cache

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
# Fields besides the bulk: a request has some for each of its tensors, parameters and outputs.
_MAX_FIELDS = 4096


class Malformed(ValueError):
    """Bytes that are no protobuf message."""


def split(message: bytes, bulk_field: int, max_entries: int) -> tuple[bytes, list[memoryview]]:  # noqa: C901 (one loop, on every call's path)
    """Return a message without its `bulk_field` entries, and those entries in order, as slices of `message`.

    The slices keep `message` alive. Raises Malformed when the top level cannot be walked to its end, or has more
    entries than `max_entries`, or more other fields than any message of ours: an empty field takes two bytes on the
    wire and far more of the loop's time.
    """
    view = memoryview(message)
    end = len(message)
    bulk: list[memoryview] = []
    kept: list[memoryview] = []
    at = kept_from = fields = 0
    try:
        while at < end:
            start = at
            tag = message[at]
            at += 1
            if tag > 0x7F:
                tag, at = _varint(message, start)
            kind = tag & 7
            if kind == _BYTES:
                size = message[at]
                at += 1
                if size > 0x7F:
                    size, at = _varint(message, at - 1)
                body = at
                at += size
                if tag >> 3 == bulk_field:
                    if start > kept_from:
                        kept.append(view[kept_from:start])
                    kept_from = at
                    bulk.append(view[body:at])
                    if len(bulk) > max_entries:
                        raise Malformed(f"it has more than {max_entries} entries of field {bulk_field}")
                    continue
            elif kind == _VARINT:
                _, at = _varint(message, at)
            else:
                at += _fixed_bytes(kind, start)
            fields += 1
            if fields > _MAX_FIELDS:
                raise Malformed(f"it has more than {_MAX_FIELDS} fields")
    except IndexError:
        raise Malformed("the message ends within a field") from None
    if at > end:
        raise Malformed("the message ends within a field")
    kept.append(view[kept_from:])
    return b"".join(kept), bulk


def _fixed_bytes(kind: int, at: int) -> int:
    """Return the length of a value of a wire type that has one. Raises Malformed for a type that is none."""
    if kind == _FIXED64:
        return 8
    if kind == _FIXED32:
        return 4
    raise Malformed(f"wire type {kind} at byte {at} is not one of protobuf's")


def varint(value: int) -> bytes:
    """Return an unsigned integer as protobuf writes it."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


@lru_cache(1024)
def bulk_entry(field: int, size: int) -> bytes:
    """Return the bytes that stand before one entry, of `size` bytes, of a `bytes` field."""
    return varint(field << 3 | _BYTES) + varint(size)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    for _ in range(_MAX_VARINT_BYTES):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise Malformed(f"a number of more than {_MAX_VARINT_BYTES} bytes before byte {at}")
