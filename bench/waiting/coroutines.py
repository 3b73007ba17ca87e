"""Ten thousand coroutines that wait at once in one async worker: the memory of each, and how late their event loop is.

The kernel `loop_lag` measures in the worker itself. JSON lines tell where the gateway and its metrics are.
"""

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import uvloop

from bench.scrape import scrape, total
from bench.waiting.callers import CALLERS, anonymous_bytes
from unlatch import Client

_ALL_WAIT_WITHIN_SECONDS = 30.0
_LAG_SECONDS = 3.0


async def wait_at_once(gateway: str, metrics: int, calls: int, seconds: float) -> dict[str, Any]:
    """Let all calls wait in the worker for `seconds`. Returns bytes a coroutine, the loop's lag, and what failed."""
    async with AsyncExitStack() as stack:
        meshes = [await stack.enter_async_context(Client(gateway, timeout=120.0)) for _ in range(CALLERS)]
        first = meshes[0]
        pid = int(await first.call("coroutine_pid"))
        before = anonymous_bytes([pid])

        async def own(number: int) -> bool:
            x = np.full(4, float(number))
            y = await meshes[number % CALLERS].call("waits_seconds", x, seconds=seconds)
            return bool(np.array_equal(x, y))

        waiting = [asyncio.ensure_future(own(number)) for number in range(calls)]
        most, until = 0.0, asyncio.get_running_loop().time() + _ALL_WAIT_WITHIN_SECONDS
        while most < calls and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.1)
            most = max(most, total(await asyncio.to_thread(scrape, metrics), "unlatch_worker_calls_in_flight"))
        taken = anonymous_bytes([pid]) - before
        lag = float(await first.call("loop_lag", seconds=_LAG_SECONDS))
        answers = await asyncio.gather(*waiting, return_exceptions=True)
    return {
        "bytes_a_call": taken / max(most, 1.0),
        "lag_p99_seconds": lag,
        "most_in_flight": most,
        "failed": sum(answer is not True for answer in answers),
    }


async def answer() -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await wait_at_once(**json.loads(line))), flush=True)


if __name__ == "__main__":
    uvloop.run(answer())
