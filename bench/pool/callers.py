"""The callers for the figures of the pool, in a process of their own. JSON lines tell the figure and its parameters.

All times are of the machine's monotonic clock, which kernels read too.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import uvloop

from bench.processes import kill, workers
from bench.scrape import scrape
from bench.tenant_lane import TenantLane, tenant_lane
from unlatch import Client
from unlatch.common.errors import DeadlineExceeded, ResourceExhausted

ROW = np.random.default_rng(7).random((1, 16))
ENDLESS = np.array([10**12])
MAP_IN_FLIGHT = 256
CAPACITY_IN_FLIGHT = 16
LIGHT_CALLERS = 80

Figures = dict[str, Any]


async def replacement(gateway: str, root: int, kills: int) -> Figures:
    """Time from the SIGKILL of the only worker until its replacement runs a call that was made then."""
    milliseconds = []
    async with Client(gateway, timeout=10.0) as mesh:
        for _ in range(kills):
            await mesh.burns_0ms()
            (worker,) = workers(root)
            killed = time.monotonic()
            kill(worker)
            began, _, _ = await mesh.burns_0ms()
            milliseconds.append((began - killed) * 1e3)
    return {"milliseconds": milliseconds}


async def cancel_to_next(gateway: str, metrics: int, count: int, rounds: int) -> Figures:
    """Time from when callers abandon endless loops until each core runs another caller's call."""
    milliseconds: list[float] = []
    async with Client(gateway, timeout=30.0) as mesh, Client(gateway) as leaver:
        for _ in range(rounds):
            loops = [asyncio.ensure_future(leaver.python_loop(ENDLESS)) for _ in range(count)]
            while _running(metrics) < count:  # noqa: ASYNC110 (it happens in another process)
                await asyncio.sleep(0.005)
            others = [asyncio.ensure_future(mesh.burns_4ms()) for _ in range(2 * count)]
            await asyncio.sleep(0.02)
            left = time.monotonic()
            for loop in loops:
                loop.cancel()
            first: dict[float, float] = {}
            while len(first) < count:
                for began, _, pid in await asyncio.gather(*others):
                    first[pid] = min(began, first.get(pid, began))
                others = [asyncio.ensure_future(mesh.burns_4ms()) for _ in range(2 * count)]
            await asyncio.gather(*others, *loops, return_exceptions=True)
            milliseconds += [(began - left) * 1e3 for began in first.values()]
    return {"milliseconds": milliseconds}


def _running(metrics: int) -> int:
    """The number of workers that run a call."""
    return sum(name == "unlatch_worker_running_seconds" for name, _ in scrape(metrics))


async def short_beside_long(gateway: str, seconds: float, per_second: float, beside: int) -> Figures:
    """Latency of 1 ms calls, from when they are due, at a fixed rate beside an excess of long calls."""
    async with Client(gateway, timeout=60.0) as mesh, Client(gateway) as background:
        # The service learns from runs which calls are long.
        await asyncio.gather(mesh.burns_500ms(), *(mesh.burns_1ms() for _ in range(20)))

        async def long() -> None:
            while True:
                await background.call("burns_500ms", priority="background")

        excess = [asyncio.ensure_future(long()) for _ in range(beside)]
        taken: list[float] = []

        async def short(due: float) -> None:
            await mesh.burns_1ms()
            taken.append(time.monotonic() - due)

        await open_loop(short, (at / per_second for at in range(round(seconds * per_second))))
        for task in excess:
            task.cancel()
        await asyncio.gather(*excess, return_exceptions=True)
    return {"milliseconds": [each * 1e3 for each in taken]}


async def fair_share(dispatcher: str, seconds: float, light: str, heavy: str) -> Figures:
    """Processor seconds that two tenants get from a pool that they keep busy.

    The heavy tenant has ten times as many waiting calls, and calls that are five times as long.
    """
    async with tenant_lane(dispatcher) as lane:
        used = dict.fromkeys((light, heavy), 0.0)
        begin = time.monotonic() + seconds / 4
        end = begin + seconds

        async def caller(tenant: str, kernel: str) -> None:
            while True:
                began, cpu, _ = await lane.call(kernel, tenant)
                if begin <= began < end:
                    used[tenant] += cpu

        await warm(lane)
        callers = [asyncio.ensure_future(caller(light, "burns_4ms")) for _ in range(LIGHT_CALLERS)]
        callers += [asyncio.ensure_future(caller(heavy, "burns_20ms")) for _ in range(10 * LIGHT_CALLERS)]
        await asyncio.wait(callers, timeout=end - time.monotonic(), return_when=asyncio.FIRST_EXCEPTION)
        for each in callers:
            each.cancel()
        for ended in await asyncio.gather(*callers, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
    # With the next report the gateway learns that all calls are gone.
    await asyncio.sleep(0.5)
    return {"light": used[light], "heavy": used[heavy]}


async def warm(lane: TenantLane) -> None:
    """Let the dispatcher learn how long the calls of `fair_share` take."""
    for kernel in ("burns_4ms", "burns_20ms"):
        await lane.call(kernel, "")


async def capacity(gateway: str, seconds: float) -> Figures:
    """Measure 10 ms calls a second, with enough callers without deadlines to keep the pool busy."""
    async with Client(gateway, timeout=30.0) as mesh:
        return {"per_second": await rate(mesh.burns_10ms, CAPACITY_IN_FLIGHT, seconds)}


async def overload(gateway: str, seconds: float, per_second: float, seed: int) -> Figures:
    """Send 10 ms calls with a deadline of 100 ms, at a rate with random times (Poisson); count answers and refusals."""
    dice = random.Random(seed)
    due, at = [], 0.0
    while (at := at + dice.expovariate(per_second)) < seconds:
        due.append(at)
    answered, late, refusals = 0, 0, []
    async with Client(gateway, timeout=0.1) as mesh:

        async def call(_: float) -> None:
            nonlocal answered, late
            sent = time.monotonic()
            try:
                await mesh.burns_10ms()
                answered += 1
            except ResourceExhausted:
                refusals.append((time.monotonic() - sent) * 1e3)
            except DeadlineExceeded:
                late += 1

        await open_loop(call, due)
    return {"sent": len(due), "answered": answered, "late": late, "refusal_milliseconds": refusals}


async def rows(gateway: str, kernel: str, callers: int, seconds: float) -> Figures:
    """Calls of one row a second, from a number of callers."""
    async with Client(gateway, timeout=30.0) as mesh:
        return {"per_second": await rate(lambda: mesh.call(kernel, ROW), callers, seconds)}


async def alone(gateway: str, kernels: list[str], seconds: float) -> Figures:
    """Latency of one caller's calls of one row, with each kernel in turn."""
    taken: dict[str, list[float]] = {kernel: [] for kernel in kernels}
    async with Client(gateway, timeout=30.0) as mesh:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for kernel in kernels:
                sent = time.monotonic()
                await mesh.call(kernel, ROW)
                taken[kernel].append((time.monotonic() - sent) * 1e3)
    return {kernel: float(np.median(each)) for kernel, each in taken.items()}


async def one_by_one(gateway: str, kernel: str, calls: int) -> Figures:
    """Make calls of one row, each awaited before the next."""
    async with Client(gateway, timeout=30.0) as mesh:
        for _ in range(calls):
            await mesh.call(kernel, ROW)
    return {}


async def mapped(gateway: str, kernel: str, calls: int) -> Figures:
    """Make calls of one row with `map`."""
    async with Client(gateway, timeout=30.0) as mesh:
        async for _ in mesh.map(kernel, (ROW for _ in range(calls)), in_flight=MAP_IN_FLIGHT):
            pass
    return {}


async def rate(call: Callable[[], Awaitable[Any]], callers: int, seconds: float) -> float:
    """Calls a second once all callers are active; each makes its next call when its last is answered."""
    begin = time.monotonic() + seconds / 4
    end, answered = begin + seconds, 0

    async def caller() -> None:
        nonlocal answered
        while time.monotonic() < end:
            await call()
            answered += begin <= time.monotonic() < end

    await asyncio.gather(*(caller() for _ in range(callers)))
    return answered / seconds


async def open_loop(call: Callable[[float], Awaitable[None]], due: Any) -> None:
    """Make each call when it is due (seconds from now), even if earlier ones have not ended; wait for the last."""
    began, calls = time.monotonic(), []
    for at in due:
        await asyncio.sleep(max(0.0, began + at - time.monotonic()))
        calls.append(asyncio.ensure_future(call(began + at)))
    await asyncio.gather(*calls)


ASKED: dict[str, Callable[..., Awaitable[Figures]]] = {
    each.__name__: each
    for each in (
        *(replacement, cancel_to_next, short_beside_long, fair_share, capacity, overload),
        *(rows, alone, one_by_one, mapped),
    )
}


async def answer() -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        asked = json.loads(line)
        print(json.dumps(await ASKED[asked.pop("figure")](**asked)), flush=True)


if __name__ == "__main__":
    uvloop.run(answer())
