"""A call takes the bytes of its arrays when it begins: its caller may change them at once, whatever their size."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

from tests.conftest import StartMesh
from tests.support.mesh import Mesh
from unlatch import BlockingClient, Client

Array = np.ndarray[Any, Any]
# Beside its frame, in pieces, and in several messages.
SIZES = [128, 65 * 128, 1 << 19]
ITEMS = 20


def refilled(size: int) -> Iterator[Array]:
    """Yield one array again and again, each time with another content."""
    buffer = np.empty(size)
    for number in range(ITEMS):
        buffer.fill(number)
        yield buffer


async def refilled_beside(size: int) -> AsyncIterator[Array]:
    """Do the same in an asynchronous generator, which lets other tasks run in between."""
    for buffer in refilled(size):
        yield buffer
        await asyncio.sleep(0)


@pytest.mark.parametrize("in_flight", [1, 64])
@pytest.mark.parametrize("size", SIZES)
async def test_items_may_be_one_array_that_is_refilled(mesh: Mesh, size: int, in_flight: int) -> None:
    """A map's results are those of the contents that each item had, in order, however it is called."""
    async with Client(mesh.gateway, timeout=30) as client:
        for items in (refilled(size), refilled_beside(size)):
            means = [y.mean() async for y in client.map("identity", items, in_flight=in_flight)]
            assert means == list(range(ITEMS))
        unordered = [y.mean() async for y in client.map("identity", refilled(size), ordered=False)]
        assert sorted(unordered) == list(range(ITEMS))

    def blocking() -> list[float]:
        with BlockingClient(mesh.gateway, timeout=30) as client:
            return [float(y.mean()) for y in client.map("identity", refilled(size), in_flight=in_flight)]

    assert await asyncio.to_thread(blocking) == list(range(ITEMS))


@pytest.mark.parametrize("lane", ["open", "opening"])
@pytest.mark.parametrize("size", SIZES)
async def test_calls_may_share_one_array_that_is_refilled(start_mesh: StartMesh, size: int, lane: str) -> None:
    """Tasks that refill one array get results of what it was, also if they wait for the lane or for its window."""
    mesh = start_mesh(gateway=["--window-calls", "4"])
    buffer, named = np.empty(size), np.empty((size, 1))
    async with Client(mesh.gateway, timeout=30) as client:
        if lane == "open":
            await client.kernels()

        async def call(number: int) -> float:
            buffer.fill(number)
            named.fill(1 / size)
            product = client.matmul(buffer[None], b=named)
            return float((await product)[0, 0])

        products = await asyncio.gather(*map(call, range(ITEMS)))
    np.testing.assert_allclose(products, range(ITEMS))


async def test_calls_of_one_unchanged_array_share_one_copy(start_mesh: StartMesh) -> None:
    """Many calls that wait with the same large array take the memory of one."""
    mesh = start_mesh(gateway=["--window-calls", "2"])
    large = np.random.default_rng(1).random((1 << 20, 1))
    before = resident_bytes()
    async with Client(mesh.gateway, timeout=50) as client:
        calls = [asyncio.create_task(client.matmul(np.ones((1, 1 << 20)) * number, large)) for number in range(3)]
        waiting = [asyncio.create_task(client.identity(large)) for _ in range(60)]
        await asyncio.gather(*calls)
        assert resident_bytes() - before < 200 << 20
        for task in waiting[10:]:
            task.cancel()
        for result in await asyncio.gather(*waiting[:10]):
            np.testing.assert_array_equal(result, large)


@pytest.mark.parametrize("size", SIZES)
async def test_a_cancelled_call_and_a_reply_may_be_reused(mesh: Mesh, size: int) -> None:
    """The array of a cancelled call, and a reply that is sent and then changed, affect no other call."""
    buffer = np.zeros(size)
    async with Client(mesh.gateway, timeout=30) as client:
        for number in range(ITEMS):
            buffer.fill(-1)
            left = asyncio.create_task(client.identity(buffer))
            await asyncio.sleep(0)
            left.cancel()
            buffer.fill(number)
            reply = await client.identity(buffer)
            again = asyncio.create_task(client.identity(reply))
            await asyncio.sleep(0)
            reply.fill(-2)
            assert (await again == number).all()


def resident_bytes() -> int:
    """Return the memory of this process."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096
