"""A process of one kind of Python client; kinds differ only in how they call. Controlled by JSON lines.

- `map`: `Client.map`, in order, 64 in flight
- `call`: `Client.call`, each awaited before the next
- `gathered`: 32 tasks, each awaiting its own `Client.call`s
- `gathered_16k`: `asyncio.gather` of 16,000 `Client.call`s at a time
- `unary`: 32 tasks of OIP ModelInfer RPCs from grpc.aio, arrays packed and unpacked by hand
- `beside`: 1 KiB calls on a schedule, and one 64 MiB call in their middle, all on one client's lane
"""

import argparse
import asyncio
import gc
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio
import numpy as np
import uvloop

from unlatch.protos import inference_pb2 as pb
from unlatch.protos import inference_pb2_grpc as pb_grpc

MAP_IN_FLIGHT = 64
IN_FLIGHT = 32
AT_ONCE = 16_000
WARM_SECONDS = 0.4
SMALL_PERIOD_SECONDS = 0.004
LARGE_BYTES = 64 << 20

Array = np.ndarray[Any, Any]
Call = Callable[[Array], Awaitable[Array]]


class Until:
    """Counts calls until the time is up, and checks every 64th result."""

    def __init__(self, seconds: float, x: Array) -> None:
        self._begun = time.perf_counter()
        self._end = self._begun + seconds
        self._x = x
        self.calls = 0

    def more(self) -> bool:
        return time.perf_counter() < self._end

    def note(self, y: Array) -> None:
        self.calls += 1
        if self.calls % 64 == 1 and not (y.dtype == self._x.dtype and np.array_equal(y, self._x)):
            raise AssertionError("identity gave back something else")

    def inputs(self) -> Iterator[Array]:
        while self.more():
            yield self._x

    def seconds(self) -> float:
        return time.perf_counter() - self._begun


async def one_after_another(call: Call, until: Until, x: Array) -> None:
    while until.more():
        until.note(await call(x))


async def many(call: Call, until: Until, x: Array) -> None:
    await asyncio.gather(*(one_after_another(call, until, x) for _ in range(IN_FLIGHT)))


async def all_at_once(call: Call, until: Until, x: Array) -> None:
    while until.more():
        for y in await asyncio.gather(*(call(x) for _ in range(AT_ONCE))):
            until.note(y)


async def mapped(mesh: Any, until: Until) -> None:
    async for y in mesh.map("identity", until.inputs(), in_flight=MAP_IN_FLIGHT):
        until.note(y)


def unary(stub: Any) -> Call:
    async def call(x: Array) -> Array:
        tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP64", shape=x.shape)
        request = pb.ModelInferRequest(model_name="identity", inputs=[tensor], raw_input_contents=[x.tobytes()])
        reply = await stub.ModelInfer(request, timeout=30.0)
        return np.frombuffer(reply.raw_output_contents[0], "<f8").reshape(tuple(reply.outputs[0].shape))

    return call


async def beside(mesh: Any, x: Array, seconds: float) -> dict[str, Any]:
    """Latencies of 1 KiB calls, alone and beside a 64 MiB call, from when they were begun.

    `late_max_ms` is how long this process kept a call from its beginning: it copies the 64 MiB when their call begins.
    In a virtual machine that takes 7 ms, and 145 ms where the copy lies in memory that the machine never used before:
    then its host gives it each page.
    """
    large = np.random.default_rng(3).random(LARGE_BYTES // 8)

    async def small(due: float) -> tuple[float, float]:
        begun = time.perf_counter()
        await mesh.identity(x)
        return time.perf_counter() - begun, begun - due

    async def on_schedule(done: Callable[[], bool]) -> tuple[list[float], list[float]]:
        due, tasks = time.perf_counter(), []
        while not done():
            tasks.append(asyncio.create_task(small(due)))
            due += SMALL_PERIOD_SECONDS
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        took, late = zip(*await asyncio.gather(*tasks), strict=True)
        return list(took), list(late)

    end = time.perf_counter() + seconds
    alone, _ = await on_schedule(lambda: time.perf_counter() > end)
    begun = time.perf_counter()
    passing = asyncio.create_task(mesh.identity(large))
    together, late = await on_schedule(passing.done)
    took = time.perf_counter() - begun
    if not np.array_equal(await passing, large):
        raise AssertionError("the 64 MiB call gave back something else")
    return {
        "alone_p50_ms": float(np.median(alone)) * 1e3,
        "alone_max_ms": max(alone) * 1e3,
        "beside_p50_ms": float(np.median(together)) * 1e3,
        "beside_max_ms": max(together) * 1e3,
        "late_max_ms": max(late) * 1e3,
        "delay_ms": max(0.0, max(together) - float(np.median(alone))) * 1e3,
        "large_seconds": took,
        "small_calls_beside": len(together),
    }


async def client(kind: str, gateway: str) -> None:
    x = np.random.default_rng(7).random(1024 // 8)
    async with AsyncExitStack() as stack:
        mesh, call = await _caller(kind, gateway, stack)

        async def stretch(seconds: float) -> dict[str, Any]:
            if kind == "beside":
                return await beside(mesh, x, seconds)
            until, cpu = Until(seconds, x), time.process_time()
            if kind == "map":
                await mapped(mesh, until)
            else:
                await _WAYS.get(kind, many)(call, until, x)
            took = until.seconds()
            cpu_us = (time.process_time() - cpu) / until.calls * 1e6
            return {"calls": until.calls, "calls_per_second": until.calls / took, "client_cpu_us": cpu_us}

        await stretch(WARM_SECONDS)
        # A full collection of all imported objects would delay a call by tens of milliseconds.
        gc.collect()
        gc.freeze()
        loop = asyncio.get_running_loop()
        print("{}", flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            print(json.dumps(await stretch(json.loads(line)["seconds"])), flush=True)


_WAYS = {"call": one_after_another, "gathered_16k": all_at_once}


async def _caller(kind: str, gateway: str, stack: AsyncExitStack) -> tuple[Any, Call]:
    if kind == "unary":
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(gateway))
        return None, unary(pb_grpc.GRPCInferenceServiceStub(channel))
    from unlatch import Client

    mesh: Any = await stack.enter_async_context(Client(gateway))

    async def call(x: Array) -> Array:
        y: Array = await mesh.call("identity", x, timeout=30.0)
        return y

    return mesh, call


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.load.client", description=__doc__)
    parser.add_argument("kind", choices=["map", "call", "gathered", "gathered_16k", "unary", "beside"])
    parser.add_argument("--gateway", required=True)
    args = parser.parse_args()
    uvloop.run(client(args.kind, args.gateway))


if __name__ == "__main__":
    main()
