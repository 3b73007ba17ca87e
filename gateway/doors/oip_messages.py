"""The protocol's call messages: ModelInferRequest bytes become a descriptor and a body, a reply becomes a response.

A message is walked once. All but the tensors is a descriptor's request as it stands (protos/unlatch.proto), the tensors
are slices of the message. Typed `contents` cost a pass over their elements: clients should send raw bytes.
"""

from array import array
from collections.abc import Sequence
from typing import Any

from google.protobuf.message import DecodeError

from unlatch.common.errors import InvalidArgument, ResourceExhausted, UnlatchError
from unlatch.common.kernel.datatypes import BYTES
from unlatch.common.lane.body import Body, Buffer
from unlatch.common.lane.frames import MAX_DESCRIPTOR_BYTES, MAX_TENSORS
from unlatch.common.lane.protowire import Malformed, bulk_entry, split
from unlatch.gateway.doors.fields import descriptor_too_large, undecodable
from unlatch.protos.inference_pb2 import (
    InferTensorContents,
    ModelInferRequest,
    ModelInferResponse,
    ModelStreamInferResponse,
)
from unlatch.protos.unlatch_pb2 import Descriptor, Reply, Request, Tensor

_RAW_INPUTS = ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
_RAW_OUTPUTS = ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER
_INPUTS = ModelInferRequest.INPUTS_FIELD_NUMBER
_CONTENTS = ModelInferRequest.InferInputTensor.CONTENTS_FIELD_NUMBER


def read_request(message: bytes, max_message_bytes: int) -> tuple[Descriptor, Body]:
    """Return a ModelInferRequest as a descriptor and the bytes of its tensors.

    Raises InvalidArgument, and ResourceExhausted for one that is too large.
    """
    # gRPC's own limit leaves room for lanes' messages, which come on the same port.
    if len(message) > max_message_bytes:
        raise ResourceExhausted(
            f"the request is {len(message)} bytes, more than max_message_bytes={max_message_bytes}; "
            "the Python client's lane carries larger ones"
        )
    descriptor = Descriptor()
    typed: list[bytes] = []
    try:
        header, raw = split(message, _RAW_INPUTS, MAX_TENSORS)
        if len(header) > MAX_DESCRIPTOR_BYTES:
            header, typed = _without_contents(header)
        descriptor.request.MergeFromString(header)
    except Malformed as error:
        raise InvalidArgument(f"the message is no ModelInferRequest: {error}") from None
    except DecodeError:
        raise undecodable(header, ModelInferRequest) from None
    typed = typed or [tensor.typed_contents for tensor in descriptor.request.tensors if tensor.typed_contents]
    buffers: list[Buffer] = _buffers(descriptor.request, raw, typed) if typed else list(raw)
    return descriptor, Body([len(buffer) for buffer in buffers], buffers)


def _buffers(request: Request, raw: Sequence[memoryview], typed: list[bytes]) -> list[Buffer]:
    """Take the typed contents out of a request, and return them as raw bytes. Raises InvalidArgument."""
    if raw:
        raise InvalidArgument(
            "contents: raw_input_contents came too; a request brings one or the other", field="contents"
        )
    tensors = request.tensors
    if len(typed) != len(tensors):
        typed = [tensor.typed_contents for tensor in tensors]
    buffers: list[Buffer] = [_raw(tensor, contents) for tensor, contents in zip(tensors, typed, strict=True)]
    for tensor in tensors:
        tensor.ClearField("typed_contents")
    return buffers


def write_response(reply: Reply, buffers: list[Buffer]) -> bytes:
    """Return a ModelInferResponse around the tensors' bytes, which may be in pieces; always raw."""
    parts: list[Buffer] = [reply.response.SerializeToString()]
    if reply.whole:
        for buffer in buffers:
            parts += bulk_entry(_RAW_OUTPUTS, len(buffer)), buffer
        return b"".join(parts)
    pieces = iter(buffers)
    for length in reply.lengths:
        parts.append(bulk_entry(_RAW_OUTPUTS, length))
        left = length
        while left:
            piece = next(pieces)
            left -= len(piece)
            parts.append(piece)
    return b"".join(parts)


def write_answer(response: bytes) -> bytes:
    """Return a ModelStreamInferResponse around a ModelInferResponse."""
    return bulk_entry(ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER, len(response)) + response


def write_failure(descriptor: Descriptor, error: UnlatchError) -> bytes:
    """Return a ModelStreamInferResponse that says why the request of this descriptor failed."""
    request = descriptor.request
    which = ModelInferResponse(model_name=request.kernel[:64], model_version=request.version[:64], id=request.id)
    message = f"{error.status}: {error.message}"
    return ModelStreamInferResponse(error_message=message, infer_response=which).SerializeToString()


def _without_contents(header: bytes) -> tuple[bytes, list[bytes]]:
    """Return a large header without its inputs' typed contents, and these.

    Raises InvalidArgument when the header is large even so.
    """
    rest, inputs = split(header, _INPUTS, MAX_TENSORS)
    parts: list[Buffer] = [rest]
    contents: list[bytes] = []
    for entry in inputs:
        tensor, typed = split(bytes(entry), _CONTENTS, 1)
        parts += bulk_entry(_INPUTS, len(tensor)), tensor
        contents.append(b"".join(typed))
    slim = b"".join(parts)
    if len(slim) > MAX_DESCRIPTOR_BYTES:
        raise descriptor_too_large(slim)
    return slim, contents if any(contents) else []


# datatype -> (field of InferTensorContents, array.array's type code)
_TYPED: dict[str, tuple[str, str]] = {
    "INT8": ("int_contents", "b"),
    "INT16": ("int_contents", "h"),
    "INT32": ("int_contents", "i"),
    "INT64": ("int64_contents", "q"),
    "UINT8": ("uint_contents", "B"),
    "UINT16": ("uint_contents", "H"),
    "UINT32": ("uint_contents", "I"),
    "UINT64": ("uint64_contents", "Q"),
    "FP32": ("fp32_contents", "f"),
    "FP64": ("fp64_contents", "d"),
    "BOOL": ("bool_contents", "B"),
    BYTES: ("bytes_contents", ""),
}
# Floats lie in the message as an array has them.
_PACKED = {
    "FP32": InferTensorContents.FP32_CONTENTS_FIELD_NUMBER,
    "FP64": InferTensorContents.FP64_CONTENTS_FIELD_NUMBER,
}


def _raw(tensor: Tensor, contents: bytes) -> bytes:
    """Return a tensor's typed contents as raw bytes. Raises InvalidArgument."""
    name, datatype = tensor.name[:64], tensor.datatype
    known = _TYPED.get(datatype)
    if known is None:
        raise InvalidArgument(
            f"{name}: {datatype[:32]!r} has no typed contents; send the bytes in raw_input_contents", field=name
        )
    field, code = known
    try:
        if datatype in _PACKED:
            rest, packed = split(contents, _PACKED[datatype], MAX_TENSORS)
            if not rest:
                return b"".join(packed)
        if len(contents) > MAX_DESCRIPTOR_BYTES:
            raise InvalidArgument(
                f"{name}: typed contents of {len(contents)} bytes; past {MAX_DESCRIPTOR_BYTES} send the bytes in "
                "raw_input_contents",
                field=name,
            )
        message = InferTensorContents.FromString(contents)
    except (Malformed, DecodeError) as error:
        raise InvalidArgument(f"{name}: no InferTensorContents: {error}", field=name) from None
    for other, _ in message.ListFields():
        if other.name != field:
            raise InvalidArgument(f"{name}: {datatype} is given in {field}, not in {other.name}", field=name)
    return _packed(name, datatype, getattr(message, field), code)


def _packed(name: str, datatype: str, elements: Sequence[Any], code: str) -> bytes:
    if datatype == BYTES:
        return b"".join(len(element).to_bytes(4, "little") + element for element in elements)
    try:
        return array(code, elements).tobytes()
    except OverflowError as error:
        raise InvalidArgument(f"{name}: not every element is {datatype}: {error}", field=name) from None
