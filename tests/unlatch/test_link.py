"""A client's lanes to gateways that end: what a gateway refuses goes to another one, once for each."""

import asyncio
import gc
import socket
import tracemalloc
from collections.abc import AsyncIterator, Iterator

import grpc
import grpc.aio
import numpy as np
import pytest

from tests.support.watching import until
from unlatch import Client
from unlatch.common.errors import InvalidArgument, Unavailable
from unlatch.common.lane.frames import METHOD, unpack
from unlatch.common.net.ports import connections
from unlatch.protos.unlatch_pb2 import (
    Array,
    Failure,
    Frames,
    Kernel,
    LaneMessage,
    Piece,
    Reply,
    Response,
    Tensor,
    Welcome,
)

AT_ONCE = 8
KERNELS = [Kernel(name="nothing", version="1"), Kernel(name="many", version="1", outputs=[Array(name="y")])]
WELCOME = Welcome(kernels=KERNELS, window_calls=64, window_bytes=1 << 20)
# A reply's bytes, in pieces of a MiB.
PIECES, PIECE = 32, 1 << 20


class Lane:
    """The gateway's end of a lane: it keeps the calls that come, until the test answers them."""

    def __init__(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        self.came: list[int] = []
        self.refuses = self.closed = False
        self._context = context

    async def run(self) -> None:
        """Take calls until the caller closes the lane."""
        while isinstance(message := await self._context.read(), bytes):
            for call, _, _ in (arrived := unpack(message)).bodied(arrived.frames.calls):
                self.came.append(call.call)
                if self.refuses:
                    await self.refuse(call.call)
        self.closed = True

    async def send(self, frames: Frames, *payload: bytes) -> None:
        """Send one message of these frames and entries."""
        await self._context.write(LaneMessage(frames=frames, payload=payload).SerializeToString())

    async def refuse(self, call: int) -> None:
        """Answer that the call was not begun."""
        failure = Failure(code=Unavailable.code, message="refused", not_begun=True)
        await self.send(Frames(replies=[Reply(call=call, failure=failure)]))

    async def begin_reply(self, call: int) -> None:
        """Answer with one array, whose pieces follow."""
        size = PIECES * PIECE
        response = Response(kernel="many", tensors=[Tensor(name="y", datatype="UINT8", shape=[size])])
        await self.send(Frames(replies=[Reply(call=call, response=response, lengths=[size])]))

    async def send_pieces(self, call: int, value: int, count: int) -> None:
        """Send this many pieces of a reply, each byte with this value."""
        for _ in range(count):
            await self.send(Frames(pieces=[Piece(call=call)]), bytes([value]) * PIECE)

    async def answer(self, call: int, text: str) -> None:
        """Answer with an error of this text, which no client takes for a refusal."""
        await self.send(Frames(replies=[Reply(call=call, failure=Failure(code=InvalidArgument.code, message=text))]))


class Gateways:
    """Gateways at one address, as behind a balancer: each new lane is to another one."""

    def __init__(self) -> None:
        self.lanes: list[Lane] = []
        self.address = ""

    async def carry(self, _: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Run one lane."""
        lane = Lane(context)
        await lane.send(Frames(welcome=WELCOME))
        # Only now, because gRPC takes no second message while it sends one.
        self.lanes.append(lane)
        await lane.run()

    async def lane(self, number: int) -> Lane:
        """Wait for the lane of this number, from 0."""
        await until(lambda: len(self.lanes) > number, f"the client opens lane {number}")
        return self.lanes[number]


@pytest.fixture
async def gateways() -> AsyncIterator[Gateways]:
    there, server = Gateways(), grpc.aio.server()
    _, service, method = METHOD.split("/")
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        method: grpc.stream_stream_rpc_method_handler(there.carry)
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    there.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield there
    await server.stop(0.0)


@pytest.fixture
async def client(gateways: Gateways) -> AsyncIterator[Client]:
    async with Client(gateways.address, timeout=20.0) as client:
        yield client


async def test_calls_that_a_gateway_refuses_are_not_sent_to_it_again(gateways: Gateways, client: Client) -> None:
    """Calls that are refused at the same time wait for another lane, whatever ends on this one meanwhile."""
    calls = [asyncio.ensure_future(client.call("nothing")) for _ in range(AT_ONCE)]
    ending = await gateways.lane(0)
    await until(lambda: len(ending.came) == AT_ONCE, "the calls came")
    await ending.send(Frames(draining=True))
    ending.refuses = True
    for number in list(ending.came):
        await ending.refuse(number)
    other = await gateways.lane(1)
    await until(lambda: len(other.came) == AT_ONCE, "the calls came to the other gateway")
    assert len(ending.came) == AT_ONCE
    for number in other.came:
        await other.answer(number, "the other gateway")
    for call in calls:
        with pytest.raises(InvalidArgument, match="the other gateway"):
            await call


async def test_call_that_is_refused_late_goes_to_the_newest_lane(gateways: Gateways, client: Client) -> None:
    """The lane that replaced the refusing one has been replaced and closed meanwhile."""
    call = asyncio.ensure_future(client.call("nothing"))
    first = await gateways.lane(0)
    await until(lambda: first.came, "the call came")
    await first.send(Frames(draining=True))
    second = await gateways.lane(1)
    await second.send(Frames(draining=True))
    third = await gateways.lane(2)
    await until(lambda: second.closed, "the client has closed the second lane")
    await first.refuse(first.came[0])
    await until(lambda: third.came, "the call came to the newest lane")
    await third.answer(third.came[0], "the newest")
    with pytest.raises(InvalidArgument, match="the newest"):
        await call
    assert second.came == []


async def test_refusal_by_a_gateway_that_does_not_end_is_the_answer(gateways: Gateways, client: Client) -> None:
    """No other lane will come, so the call does not wait for one. The lane goes on."""
    call = asyncio.ensure_future(client.call("nothing"))
    lane = await gateways.lane(0)
    await until(lambda: lane.came, "the call came")
    await lane.refuse(lane.came[0])
    with pytest.raises(Unavailable, match="refused"):
        await asyncio.wait_for(call, 5.0)
    call = asyncio.ensure_future(client.call("nothing"))
    await until(lambda: len(lane.came) == 2, "the next call came on the same lane")
    await lane.answer(lane.came[1], "the same lane")
    with pytest.raises(InvalidArgument, match="the same lane"):
        await call


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Let no garbage be collected during a test. Lanes that have ended are garbage in cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
async def test_closed_client_closes_its_connection(gateways: Gateways) -> None:
    """Not at the next garbage collection, which may come late, but at once: a gateway bounds its connections."""
    async with Client(gateways.address) as client:
        await client.kernels()
        assert connections(gateways.address) == 1
    await until(lambda: connections(gateways.address) == 0, "the connection is closed")


@pytest.mark.usefixtures("uncollected")
async def test_replaced_lane_closes_its_connection(gateways: Gateways, client: Client) -> None:
    """Once its calls are answered, only the connection of the lane in its place is left."""
    # Else both lanes share a connection.
    client._options.append(("grpc.use_local_subchannel_pool", 1))
    await client.kernels()
    await gateways.lanes[0].send(Frames(draining=True))
    await gateways.lane(1)
    await until(lambda: connections(gateways.address) == 1, "the connection of the first lane is closed")


@pytest.mark.usefixtures("uncollected")
async def test_reply_that_broke_off_is_replaced(gateways: Gateways, client: Client) -> None:
    """The result is all of the last reply. What came before is freed at once, not at the next garbage collection."""
    calling = asyncio.ensure_future(client.call("many"))
    lane = await gateways.lane(0)
    await until(lambda: lane.came, "the call came")
    (call,) = lane.came
    tracemalloc.start()
    try:
        for value in (1, 2, 3):
            await lane.begin_reply(call)
            await lane.send_pieces(call, value, PIECES // 2)
        # A failure on the same lane comes after the pieces.
        other = asyncio.ensure_future(client.call("nothing"))
        await until(lambda: len(lane.came) == 2, "another call came")
        await lane.answer(lane.came[1], "it came in order")
        with pytest.raises(InvalidArgument, match="it came in order"):
            await other
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2 * PIECES * PIECE
    await lane.send_pieces(call, 3, PIECES // 2)
    result = await calling
    assert isinstance(result, np.ndarray)
    assert (result == 3).all()


async def test_time_that_was_too_short_to_connect_is_told() -> None:
    """The process at the address accepts the connection, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        async with Client(address, timeout=0.05) as client:
            with pytest.raises(Unavailable, match=f"cannot connect to {address}: no answer within 0.05 s"):
                await client.call("nothing")


async def test_client_that_closes_as_it_connects_says_so() -> None:
    """The gateway is not the cause."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        async with Client(address) as client:
            call = asyncio.ensure_future(client.call("nothing"))
            await until(lambda: client._links, "the client opens a lane")
        with pytest.raises(Unavailable, match="the client closed it"):
            await call
