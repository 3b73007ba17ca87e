"""Fields in errors, as callers of both doors know them: by the Open Inference Protocol's names."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from unlatch.common.errors import InvalidArgument, NotFound, PermissionDenied, UnlatchError
from unlatch.common.lane.frames import MAX_DESCRIPTOR_BYTES
from unlatch.common.lane.protowire import Malformed, split
from unlatch.protos.unlatch_pb2 import Request

# The protocol's names for fields of our requests.
_PROTOCOL_NAMES = {"kernel": "model_name", "version": "model_version"}
# Entries of one field that are looked at. A request with more is out of all proportion, and its largest entry does not
# matter.
_MAX_LOOKED_AT = 1024


def name_as_protocol(error: UnlatchError) -> UnlatchError:
    """Give the field that an error blames the protocol's name. Returns the error.

    Only in errors about the kernel itself: an array may be called `kernel`, too.
    """
    if isinstance(error, NotFound | PermissionDenied):
        error.field = _PROTOCOL_NAMES.get(error.field, error.field)
    return error


def descriptor_too_large(header: bytes) -> InvalidArgument:
    """Return the error for a call that is too large without its tensors' bytes. It names the largest part.

    `header` is those bytes of the request.
    """
    culprit, largest = "", 0
    with suppress(Malformed):
        for field in Request.DESCRIPTOR.fields:
            for entry in split(header, field.number, _MAX_LOOKED_AT)[1]:
                if len(entry) > largest:
                    culprit, largest = _name_of(field, entry), len(entry)
    return InvalidArgument(
        f"{culprit or 'the call'}: what a call says besides its tensors' bytes takes at most {MAX_DESCRIPTOR_BYTES} "
        f"bytes, and this one {len(header)}",
        field=culprit,
    )


def undecodable(message: bytes, kind: type[Message]) -> InvalidArgument:
    """Return the error for bytes that are no message of a kind. It names the first text that is not UTF-8."""
    culprit = ""
    if len(message) <= MAX_DESCRIPTOR_BYTES:
        with suppress(Malformed):
            culprit = _wrong_text(message, kind.DESCRIPTOR.fields)
    why = f"{culprit} is not UTF-8" if culprit else "it cannot be decoded"
    return InvalidArgument(f"the message is no {kind.DESCRIPTOR.name}: {why}", field=culprit)


def _wrong_text(message: bytes, fields: Iterable[Any]) -> str:
    for field in fields:
        if field.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE):
            continue
        for entry in split(message, field.number, _MAX_LOOKED_AT)[1]:
            if field.message_type is not None:
                if inner := _wrong_text(bytes(entry), field.message_type.fields):
                    return f"{field.name}.{inner}"
            elif not _is_utf8(entry):
                return str(field.name)
    return ""


def _is_utf8(text: memoryview) -> bool:
    try:
        str(text, "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _name_of(field: FieldDescriptor, entry: memoryview) -> str:
    """Return a parameter's key or a tensor's name, the first field of its entry; else the name of the field."""
    if field.message_type is None:
        return _PROTOCOL_NAMES.get(field.name, field.name)
    first = split(bytes(entry), 1, 1)[1]
    return bytes(first[0][:64]).decode(errors="replace") if first else field.name
