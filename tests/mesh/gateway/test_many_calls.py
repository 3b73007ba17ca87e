"""More calls at once on one channel than a connection may have RPCs: they wait with the caller, and none is refused."""

import asyncio
from collections import Counter
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.support.doors import vector
from tests.support.mesh import Mesh
from tests.support.watching import Scrape

INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.mark.parametrize("calls", [1500, 3000])
async def test_calls_beyond_max_streams_wait_with_their_caller(mesh: Mesh, calls: int) -> None:
    """As gRPC's clients do with MAX_CONCURRENT_STREAMS. Every call is answered and counted."""
    message = vector("identity", 1.0).SerializeToString()

    def counted() -> float:
        return Scrape(mesh.gateway_metrics).sum("unlatch_calls_total", kernel="identity")

    before = counted()
    async with grpc.aio.insecure_channel(mesh.gateway) as channel:
        infer: Any = channel.unary_unary(INFER)

        async def code() -> str:
            try:
                await infer(message, timeout=60)
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {error.details()}"
            return "OK"

        assert Counter(await asyncio.gather(*(code() for _ in range(calls)))) == {"OK": calls}
    assert counted() - before == calls
