"""Both doors of a gateway, opened by hand: tests send bytes, right or wrong, and see what comes back."""

import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2

from unlatch.common.kernel.lists import Value
from unlatch.common.kernel.parameters import parameter
from unlatch.common.lane.body import WHOLE_BYTES
from unlatch.common.lane.outbox import PIECE_BYTES
from unlatch.protos.inference_pb2 import InferParameter, ModelInferRequest, ModelInferResponse
from unlatch.protos.unlatch_pb2 import Descriptor, Frames, LaneMessage, Reply, Welcome

_WITHIN_SECONDS = 10.0
# The life of a lane, in which many calls may come, and large ones.
_LANE_SECONDS = 40.0
Metadata = Sequence[tuple[str, str]]
# What docs/clients.md tells gRPC in Python to keep of a call, to send the call again. A connection may end by
# its age just when a large call is sent.
KEEPS = ("grpc.per_rpc_retry_buffer_size", 64 << 20)
# Tests are about the doors' own limits, not about the client's.
LARGE = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), KEEPS]


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a call was refused: the status, the fields that google.rpc.BadRequest names, the quota that was used up."""

    code: str
    message: str
    fields: tuple[str, ...] = ()
    quota: str = ""
    retry_after_seconds: float = 0.0


def request(
    kernel: str, arrays: Mapping[str, np.ndarray[Any, Any]] | None = None, **scalars: Value
) -> ModelInferRequest:
    """Make a valid request, which tests then spoil."""
    datatypes = {"f2": "FP16", "f4": "FP32", "f8": "FP64", "u1": "UINT8", "i8": "INT64", "b1": "BOOL"}
    message = ModelInferRequest(model_name=kernel)
    for name, array in (arrays or {}).items():
        message.inputs.add(name=name, datatype=datatypes[array.dtype.str[1:]], shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    for name, value in scalars.items():
        message.parameters[name].CopyFrom(InferParameter.FromString(parameter(value).SerializeToString()))
    return message


def vector(kernel: str, *values: float, **scalars: Value) -> ModelInferRequest:
    """Make a valid request for a kernel of one float64 vector `x`."""
    return request(kernel, {"x": np.array(values, "f8")}, **scalars)


def arrays_of(response: ModelInferResponse) -> list[np.ndarray[Any, Any]]:
    """Return a response's float64 and int64 outputs."""
    dtypes = {"FP64": "f8", "INT64": "i8", "FP32": "f4", "FP16": "f2", "UINT8": "u1"}
    return [
        np.frombuffer(raw, dtypes[tensor.datatype]).reshape(tuple(tensor.shape))
        for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    ]


class Oip:
    """The door of the Open Inference Protocol, called with this metadata."""

    def __init__(self, channel: grpc.Channel, metadata: Metadata = ()) -> None:
        self._channel = channel
        self._metadata = metadata

    def send(self, message: bytes, method: str = "ModelInfer", timeout: float = _WITHIN_SECONDS) -> bytes:
        """Send bytes and return the answer's bytes. Raises grpc.RpcError."""
        rpc: Any = self._channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        answer: bytes = rpc(message, timeout=timeout, metadata=self._metadata)
        return answer

    def infer(self, message: ModelInferRequest, timeout: float = _WITHIN_SECONDS) -> ModelInferResponse:
        """Make a call. Raises grpc.RpcError."""
        return ModelInferResponse.FromString(self.send(message.SerializeToString(), timeout=timeout))

    def refusal(
        self, message: ModelInferRequest | bytes, method: str = "ModelInfer", timeout: float = _WITHIN_SECONDS
    ) -> Refusal:
        """Return how this request is refused; the code is OK when it is not refused."""
        encoded = message if isinstance(message, bytes) else message.SerializeToString()
        try:
            self.send(encoded, method, timeout)
        except grpc.RpcError as error:
            return refusal_of(error)
        return Refusal("OK", "")

    def serves(self) -> bool:
        """Whether a valid call gets the right answer."""
        (y,) = arrays_of(self.infer(vector("identity", 1.0, 2.0)))
        return bool(y.tolist() == [1.0, 2.0])


class LaneEnd:
    """A caller's end of a lane, which breaks the lane's rules where a test wants that."""

    def __init__(self, channel: grpc.Channel, metadata: Metadata = (), *, within: float = _LANE_SECONDS) -> None:
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        opening: Any = channel.stream_stream("/unlatch.v1.Lane/Open")
        self._stream = opening(iter(self._outgoing.get, None), timeout=within, metadata=metadata)
        self._replies: dict[int, Reply] = {}
        self._bytes: dict[int, bytearray] = {}
        self._started: set[int] = set()
        self.welcome = Welcome()
        while not self.welcome.kernels:
            self._receive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._outgoing.put(None)
        self._stream.cancel()

    def send(self, frames: Frames, *payload: bytes) -> None:
        """Send a message of these frames and entries, whether they fit or not."""
        self.send_bytes(LaneMessage(frames=frames, payload=payload).SerializeToString())

    def send_bytes(self, message: bytes) -> None:
        self._outgoing.put(message)

    def call(self, number: int, message: ModelInferRequest, remaining_microseconds: int = 0, attempt: int = 0) -> None:
        """Send a call with its body. From a gateway's first `attempt` on, the server reports when the call begins."""
        raw = message.raw_input_contents
        small = sum(map(len, raw)) <= WHOLE_BYTES
        frame = descriptor(number, message, whole=small, remaining_microseconds=remaining_microseconds)
        frame.attempt = attempt
        self.send(Frames(calls=[frame]), *(raw if small else ()))
        for frames, piece in () if small else pieces(number, raw, PIECE_BYTES):
            self.send(frames, piece)

    def reply(self, number: int) -> tuple[Reply, bytes]:
        """Wait for the reply to a call and all its bytes. Raises grpc.RpcError when the lane ends."""
        while True:
            reply = self._replies.get(number)
            if reply is not None and len(self._bytes[number]) == sum(reply.lengths):
                del self._replies[number]
                return reply, bytes(self._bytes.pop(number))
            self._receive()

    def first_frame(self, number: int) -> Reply:
        """Wait for the reply to a call, without its bytes."""
        while number not in self._replies:
            self._receive()
        return self._replies[number]

    def until_started(self, number: int) -> None:
        """Wait until the server says that a call begins, or is about to."""
        while number not in self._started:
            self._receive()

    def forget(self, number: int) -> None:
        """Ignore everything that still comes for a call that was cancelled."""
        self._replies.pop(number, None)
        self._bytes.setdefault(number, bytearray())

    def refusal(self, number: int) -> Refusal:
        """Return how a call was refused; the code is OK when it was not refused."""
        reply, _ = self.reply(number)
        failure = reply.failure
        names = {code.value[0]: code.name for code in grpc.StatusCode}
        fields = (failure.field,) if failure.field else ()
        wait = failure.retry_after_milliseconds / 1e3
        return Refusal(names[failure.code], failure.message, fields, failure.quota, wait)

    def end(self) -> Refusal:
        """Return how the server closed the lane."""
        try:
            while True:
                self._receive()
        except grpc.RpcError as error:
            return refusal_of(error)
        except StopIteration:
            return Refusal("OK", "")

    def close(self) -> Refusal:
        """Say that no more frames will come, and return how the server then ended the lane."""
        self._outgoing.put(None)
        return self.end()

    def serves(self, number: int) -> bool:
        """Whether a valid call gets the right answer on this lane."""
        self.call(number, vector("identity", 1.0, 2.0))
        reply, body = self.reply(number)
        return reply.HasField("response") and np.frombuffer(body).tolist() == [1.0, 2.0]

    def _receive(self) -> None:
        message = LaneMessage.FromString(next(self._stream))
        entries = iter(message.payload)
        if message.frames.HasField("welcome"):
            self.welcome = message.frames.welcome
        self._started.update(message.frames.started)
        for reply in message.frames.replies:
            self._replies[reply.call] = reply
            whole = [next(entries) for _ in reply.lengths] if reply.whole else []
            self._bytes[reply.call] = bytearray(b"".join(whole))
        for piece in message.frames.pieces:
            self._bytes[piece.call] += next(entries)
        assert not list(entries), "a message carries more entries than its frames account for"


def descriptor(
    number: int,
    message: ModelInferRequest,
    *,
    whole: bool = True,
    lengths: Sequence[int] | None = None,
    remaining_microseconds: int = 0,
) -> Descriptor:
    """Make a lane's descriptor from an OIP request: the header's fields are the same."""
    header = ModelInferRequest()
    header.CopyFrom(message)
    del header.raw_input_contents[:]
    frame = Descriptor(call=number, whole=whole, remaining_microseconds=remaining_microseconds)
    frame.request.MergeFromString(header.SerializeToString())
    frame.lengths[:] = [len(raw) for raw in message.raw_input_contents] if lengths is None else lengths
    return frame


def pieces(number: int, body: Sequence[bytes], size: int) -> Iterator[tuple[Frames, bytes]]:
    """Split a body into messages of one piece each, of at most `size` bytes."""
    for tensor in body:
        for start in range(0, len(tensor), size):
            frames = Frames()
            frames.pieces.add(call=number)
            yield frames, tensor[start : start + size]


def refusal_of(error: Any) -> Refusal:
    """Read the refusal out of a grpc.RpcError."""
    fields: list[str] = []
    quota, wait = "", 0.0
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            assert (status.code, status.message) == (error.code().value[0], error.details())
            for detail in status.details:
                bad_request = error_details_pb2.BadRequest()
                failure, retry = error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo()
                if detail.Unpack(bad_request):
                    fields += [violation.field for violation in bad_request.field_violations]
                elif detail.Unpack(failure):
                    quota = failure.violations[0].subject
                elif detail.Unpack(retry):
                    wait = retry.retry_delay.ToTimedelta().total_seconds()
    return Refusal(error.code().name, error.details() or "", tuple(fields), quota, wait)
