"""Ten thousand calls wait in one gateway at once, through both doors."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest

from tests.mesh.faults.conftest import FAULT_KERNELS
from tests.support.doors import arrays_of, vector
from tests.support.mesh import running_mesh
from tests.support.watching import Gate, Scrape, resident_bytes, until
from unlatch import Client
from unlatch.protos.inference_pb2 import ModelInferResponse

# Through each door; a lane's window is 1,024 calls.
CALLS, CALLERS = 5_000, 5
MOST_BYTES_A_CALL = 40 * 1024
WORKERS = 2


@pytest.mark.timeout(120)
async def test_ten_thousand_calls_wait_and_are_answered(tmp_path: Path) -> None:
    """While no worker is free each call takes less than 40 KiB of the gateway. Then each gets its own result."""
    gates = [Gate(tmp_path / f"gate{number}") for number in range(WORKERS)]
    async with AsyncExitStack() as stack:
        mesh = stack.enter_context(running_mesh(tmp_path, dispatcher=["--kernels", str(FAULT_KERNELS)]))
        clients = [await stack.enter_async_context(Client(mesh.gateway, timeout=100.0)) for _ in range(CALLERS)]
        unary = [await _unary(stack, mesh.gateway) for _ in range(CALLERS)]
        pid = mesh.gateway_service.pid
        held = [asyncio.ensure_future(clients[0].waits(np.zeros(1), gate=str(gate))) for gate in gates]
        await until(lambda: all(gate.reached for gate in gates), "every worker is busy")
        before = resident_bytes(pid)

        async def by_lane(number: int) -> bool:
            x = np.full(3, float(number))
            return np.array_equal(await clients[number % CALLERS].echo(x), x)

        async def by_protocol(number: int) -> bool:
            message = vector("echo", -float(number)).SerializeToString()
            (y,) = arrays_of(ModelInferResponse.FromString(await unary[number % CALLERS](message, timeout=100.0)))
            return bool(y.tolist() == [-float(number)])

        calls = [asyncio.ensure_future(one(number)) for number in range(CALLS) for one in (by_lane, by_protocol)]
        await until(lambda: _waiting(mesh.gateway_metrics) == 2 * CALLS + WORKERS, "all of them wait", within=60.0)
        assert resident_bytes(pid) - before < MOST_BYTES_A_CALL * 2 * CALLS
        for gate in gates:
            gate.open()
        assert all(await asyncio.gather(*calls))
        await asyncio.gather(*held)


async def _unary(stack: AsyncExitStack, address: str) -> Any:
    # Each on a connection of its own, as from as many callers.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=options))
    return channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")


def _waiting(metrics: str) -> float:
    return Scrape(metrics).sum("unlatch_calls_in_flight")
