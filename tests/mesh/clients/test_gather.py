"""Thousands of calls that wait in one client: a reply wakes the next call, and no other."""

import asyncio
import cProfile

import numpy as np

from tests.support.mesh import Mesh
from unlatch import Client

FEW, MANY = 500, 6_000


async def function_calls(client: Client, number: int) -> float:
    """Gather so many calls; returns how many function calls the client's loop makes for each of them."""
    x = np.arange(3.0)
    profile = cProfile.Profile()
    profile.enable()
    try:
        results = await asyncio.gather(*(client.identity(x) for _ in range(number)))
    finally:
        profile.disable()
    assert all(result.tolist() == x.tolist() for result in results)
    return sum(entry.callcount for entry in profile.getstats()) / number


async def test_reply_costs_the_same_however_many_calls_wait(mesh: Mesh) -> None:
    """The gateway's window lets 1,024 out. Of the many, most wait in the client, and each reply lets one more out."""
    async with Client(mesh.gateway, timeout=60.0) as client:
        await function_calls(client, 10)
        few, many = await function_calls(client, FEW), await function_calls(client, MANY)
    assert many < 2 * few
