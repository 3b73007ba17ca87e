"""The callers of the part `waiting`, in a process of their own: many calls at once, each with a result of its own.

JSON lines tell the interface, the number of calls, and where to read how many have arrived.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import uvloop

from bench.load.client import unary
from bench.scrape import scrape, total
from unlatch import Client
from unlatch.protos import inference_pb2_grpc as pb_grpc

# The window of a lane is 1,024 calls.
CALLERS = 10
# Long calls that occupy every worker until all others wait.
BUSY = 24

Array = np.ndarray[Any, Any]
Call = Callable[[Array], Awaitable[Array]]


async def wait_and_be_answered(door: str, gateway: str, metrics: int, pids: list[int], calls: int) -> dict[str, Any]:
    """Memory of the serving processes before and while all calls wait, and the number of calls with a wrong result."""
    async with AsyncExitStack() as stack:
        callers = [await _caller(door, gateway, stack) for _ in range(CALLERS)]
        for call in callers:
            await call(np.zeros(1))
        mesh = await stack.enter_async_context(Client(gateway))
        # Priority puts these first, whatever has arrived meanwhile.
        held = [asyncio.ensure_future(mesh.burns_500ms(priority="interactive")) for _ in range(BUSY)]
        await asyncio.sleep(0.2)
        before = anonymous_bytes(pids)

        async def own(number: int) -> bool:
            x = np.full(4, float(number))
            return bool(np.array_equal(await callers[number % CALLERS](x), x))

        waiting = [asyncio.ensure_future(own(number)) for number in range(calls)]
        most, taken = 0.0, 0
        while not all(busy.done() for busy in held):
            in_flight = total(await asyncio.to_thread(scrape, metrics), "unlatch_calls_in_flight")
            if in_flight > most:
                most, taken = in_flight, anonymous_bytes(pids) - before
            await asyncio.sleep(0.1)
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.gather(*held)
    return {
        "bytes_a_call": taken / most,
        "most_in_flight": most,
        "failed": sum(answer is not True for answer in answers),
    }


async def _caller(door: str, gateway: str, stack: AsyncExitStack) -> Call:
    if door == "lane":
        mesh: Any = await stack.enter_async_context(Client(gateway, timeout=60.0))
        call: Call = mesh.identity
        return call
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(gateway, options=options))
    return unary(pb_grpc.GRPCInferenceServiceStub(channel))


def anonymous_bytes(pids: list[int]) -> int:
    """Memory of processes in RAM that is their own."""
    statuses = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    return sum(int(status.partition("RssAnon:")[2].split()[0]) * 1024 for status in statuses)


async def answer() -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await wait_and_be_answered(**json.loads(line))), flush=True)


if __name__ == "__main__":
    uvloop.run(answer())
