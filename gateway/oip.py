"""The Open Inference Protocol's door.

ModelInferRequest bytes become a descriptor and a body, a reply becomes ModelInferResponse bytes; and what the protocol
asks about server and kernels is answered.

The message is walked once. What is not tensors is a descriptor's request as it stands (protos/unlatch.proto), the
tensors are slices of the message.
"""

import asyncio
from importlib.metadata import version
from typing import Any

from google.protobuf.message import DecodeError

from common.datatypes import carrier
from common.errors import InvalidArgument, ResourceExhausted, UnlatchError
from common.failures import raised
from common.lane import Body, Buffer, Sink
from common.protowire import Malformed, bulk_entry, split
from common.rpc import Unary
from gateway.calls import Calls
from protos.inference_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelReadyRequest,
    ModelReadyResponse,
    ServerLiveResponse,
    ServerMetadataResponse,
    ServerReadyResponse,
)
from protos.unlatch_pb2 import Array, Descriptor, Reply

SERVICE = "inference.GRPCInferenceService"

_RAW_INPUTS = ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
_RAW_OUTPUTS = ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER


class OpenInference:
    """The service's methods, each from bytes to bytes."""

    def __init__(self, calls: Calls, max_message_bytes: int) -> None:
        self._calls = calls
        self._fleet = calls.fleet
        self._max_message_bytes = max_message_bytes

    def methods(self) -> dict[str, Unary]:
        """By name, as the gRPC server wants them."""
        return {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._model_infer,
        }

    async def _model_infer(self, message: bytes, context: Any) -> bytes:
        # gRPC's own limit leaves room for lanes' messages, which come by the same port.
        if len(message) > self._max_message_bytes:
            raise ResourceExhausted(
                f"the request is {len(message)} bytes, more than max_message_bytes={self._max_message_bytes}; "
                "the Python client's lane carries larger ones"
            )
        descriptor, body = read_request(message)
        answer = _Answer()
        call = self._calls.begin(descriptor, body, context.time_remaining(), answer)
        try:
            reply, tensors = await answer.whole
        finally:
            call.abandon()
        return write_response(reply, tensors, self._max_message_bytes)

    async def _server_live(self, _: bytes, __: Any) -> bytes:
        return ServerLiveResponse(live=True).SerializeToString()

    async def _server_ready(self, _: bytes, __: Any) -> bytes:
        return ServerReadyResponse(ready=self._fleet.takes_calls).SerializeToString()

    async def _server_metadata(self, _: bytes, __: Any) -> bytes:
        return ServerMetadataResponse(name="unlatch", version=version("unlatch")).SerializeToString()

    async def _model_ready(self, message: bytes, _: Any) -> bytes:
        request = _parsed(ModelReadyRequest, message)
        try:
            self._fleet.kernel(request.name, request.version)
        except UnlatchError:
            return ModelReadyResponse(ready=False).SerializeToString()
        return ModelReadyResponse(ready=True).SerializeToString()

    async def _model_metadata(self, message: bytes, _: Any) -> bytes:
        request = _parsed(ModelMetadataRequest, message)
        kernel = self._fleet.kernel(request.name, request.version)
        return ModelMetadataResponse(
            name=kernel.name,
            versions=[kernel.version],
            platform="unlatch_numpy",
            inputs=[_metadata(array) for array in kernel.inputs],
            outputs=[_metadata(array) for array in kernel.outputs],
        ).SerializeToString()


class _Answer:
    """A call's answer for a caller who wants it whole."""

    def __init__(self) -> None:
        self.whole: asyncio.Future[tuple[Reply, list[Buffer]]] = asyncio.get_running_loop().create_future()

    def answer(self, reply: Reply, whole: list[memoryview] | None) -> Sink | None:
        if reply.HasField("failure"):
            self.fail(raised(reply.failure))
            return None
        if whole is not None:
            self._done(reply, list(whole))
            return None
        body = Body(reply.lengths)

        def more() -> None:
            if body.complete:
                self._done(reply, body.buffers)

        body.on_more = more
        return body

    def fail(self, error: UnlatchError) -> None:
        # The caller may have left in the meantime, which cancels the future.
        if not self.whole.done():
            self.whole.set_exception(error)

    def _done(self, reply: Reply, buffers: list[Buffer]) -> None:
        if not self.whole.done():
            self.whole.set_result((reply, buffers))


def read_request(message: bytes) -> tuple[Descriptor, Body]:
    """A ModelInferRequest as a descriptor and the slices that are its tensors. Raises InvalidArgument."""
    try:
        header, tensors = split(message, _RAW_INPUTS)
        descriptor = Descriptor()
        descriptor.request.MergeFromString(header)
    except (Malformed, DecodeError) as error:
        raise InvalidArgument(f"the message is no ModelInferRequest: {error}") from None
    for tensor in descriptor.request.tensors:
        if tensor.typed_contents:
            raise InvalidArgument(
                f"{tensor.name}: typed contents are not served; send the bytes in raw_input_contents", field="contents"
            )
    return descriptor, Body([len(tensor) for tensor in tensors], list(tensors))


def write_response(reply: Reply, buffers: list[Buffer], max_message_bytes: int) -> bytes:
    """A ModelInferResponse around the tensors' bytes. Raises ResourceExhausted when it would be too large a message."""
    size = sum(reply.lengths)
    if size > max_message_bytes:
        raise ResourceExhausted(
            f"the response is {size} bytes, more than max_message_bytes={max_message_bytes}; the Python client's lane "
            "carries larger ones"
        )
    parts: list[Buffer] = [reply.response.SerializeToString()]
    if reply.whole:
        for buffer in buffers:
            parts += bulk_entry(_RAW_OUTPUTS, len(buffer)), buffer
        return b"".join(parts)
    # Pieces: a tensor's are joined under one header. Tensors of no bytes have none.
    pieces = iter(buffers)
    for length in reply.lengths:
        parts.append(bulk_entry(_RAW_OUTPUTS, length))
        left = length
        while left:
            piece = next(pieces)
            left -= len(piece)
            parts.append(piece)
    return b"".join(parts)


def _parsed(kind: type[Any], message: bytes) -> Any:
    try:
        return kind.FromString(message)
    except DecodeError as error:
        raise InvalidArgument(f"the message is no {kind.DESCRIPTOR.name}: {error}") from None


def _metadata(array: Array) -> ModelMetadataResponse.TensorMetadata:
    """An array as the protocol tells of it: one datatype, -1 for a length that may vary."""
    dtype = array.dtypes[0] if array.dtypes else "float64"
    shape = [int(dim) if dim.isdecimal() else -1 for dim in array.dims]
    if dtype.startswith("complex"):
        shape.append(2)
    return ModelMetadataResponse.TensorMetadata(name=array.name, datatype=carrier(dtype), shape=shape)
