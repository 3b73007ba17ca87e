"""The protocol's calls as gRPC sends their answers: what is held until then, and for how long."""

import asyncio
import weakref
from typing import Any

import pytest

from tests.gateway.calls.test_execution import LARGE
from tests.support.replicas import hand_gateway
from unlatch.common.errors import InvalidArgument
from unlatch.common.net.unread import unread_answers
from unlatch.gateway.doors.oip import OipCalls
from unlatch.gateway.doors.oip_messages import read_request
from unlatch.protos.inference_pb2 import InferParameter, ModelInferRequest, ModelInferResponse

Input = ModelInferRequest.InferInputTensor


class Rpc:
    """The context of a unary RPC whose answer the test sends."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def time_remaining(self) -> float:
        return 5.0

    def set_trailing_metadata(self, _: object) -> None: ...


class Piece(bytearray):
    """A part of a reply, of which can be seen whether it is still held."""


WRONG_TEXTS = {
    "model_name": ModelInferRequest(model_name="??"),
    "model_version": ModelInferRequest(model_version="??"),
    "id": ModelInferRequest(model_name="pure", id="??"),
    "parameters.key": ModelInferRequest(parameters={"??": InferParameter(int64_param=1)}),
    "parameters.value.string_param": ModelInferRequest(parameters={"a": InferParameter(string_param="??")}),
    "inputs.name": ModelInferRequest(inputs=[Input(name="right"), Input(name="??")]),
    "inputs.datatype": ModelInferRequest(inputs=[Input(name="right", datatype="??")]),
    "outputs.name": ModelInferRequest(outputs=[ModelInferRequest.InferRequestedOutputTensor(name="??")]),
}


@pytest.mark.parametrize("field", WRONG_TEXTS)
def test_text_that_is_not_utf8_is_named(field: str) -> None:
    """The error names the field, and not the type that the gateway reads the message as."""
    message = WRONG_TEXTS[field].SerializeToString().replace(b"??", b"\xff\xfe")
    with pytest.raises(InvalidArgument) as refused:
        read_request(message, 1 << 20)
    assert refused.value.message == f"the message is no ModelInferRequest: {field} is not UTF-8"
    assert refused.value.field == field


def test_message_that_cannot_be_decoded_is_refused_plainly() -> None:
    """Without a wrong text, no field is named."""
    with pytest.raises(InvalidArgument) as refused:
        read_request(b"\x2a\x01\xff", 1 << 20)
    assert refused.value.message == "the message is no ModelInferRequest: it cannot be decoded"


async def test_answer_counts_until_it_is_sent() -> None:
    """Its pieces are freed when they are joined, and its tenant may make the next call at once."""
    async with hand_gateway(1) as gateway:
        unread = unread_answers(60.0)
        calls = OipCalls(gateway.calls, None, unread, 1 << 20, gateway.errors.caught)  # type: ignore[arg-type]
        is_sent = asyncio.Event()
        answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def handle_rpc() -> None:
            """Do as gRPC does: its task gets the answer, and ends when the answer is sent."""
            answered.set_result(await calls.one(message, Rpc(), gateway.tenant))
            await is_sent.wait()

        message = ModelInferRequest(model_name="pure").SerializeToString()
        handling = asyncio.ensure_future(handle_rpc())
        await asyncio.sleep(0)
        body = gateway.sent[0].begin_answer(LARGE)
        pieces = [Piece(LARGE // 2) for _ in range(2)]
        held: list[weakref.ref[Any]] = [weakref.ref(piece) for piece in pieces]
        for piece in pieces:
            body.feed(memoryview(piece))
        del body, piece, pieces
        gateway.sent.clear()
        gateway.replicas[0].lane.calls.clear()
        answer = ModelInferResponse.FromString(await answered)
        assert answer.raw_output_contents[0] == bytes(LARGE)
        assert [found() for found in held] == [None, None]
        assert (len(gateway.calls), gateway.live_bytes.held, gateway.tenant.in_flight) == (1, LARGE, 0)
        is_sent.set()
        await handling
        await asyncio.sleep(0)
        assert gateway.at_rest()
        assert gateway.metrics.codes == ["OK"]
