"""A process that sends a health check every 20 ms and measures the time until the answer.

Checks are sent on a fixed schedule, even if the last one is not answered: a server that stalls for a second shows fifty
bad checks, not one. Each is timed from when it was due. The delay before sending is this process's own lag, and is
reported separately. The process has priority over all others if allowed (SCHED_FIFO), since Linux was seen to let a
process that is rarely awake wait 0.1 s or more behind busy sessions. Controlled by JSON lines.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import grpc.aio
import numpy as np
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

from unlatch.protos import inference_pb2 as pb
from unlatch.protos import inference_pb2_grpc as pb_grpc

PERIOD_SECONDS = 0.020
TIMEOUT_SECONDS = 10.0

Ask = Callable[[], Awaitable[object]]


class Probe:
    """A kind of check on its schedule."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._seconds: list[float] = []
        self._late: list[float] = []
        self._failed = 0
        self._running: set[asyncio.Task[None]] = set()

    async def run(self, stop: asyncio.Event) -> None:
        self._seconds, self._late, self._failed = [], [], 0
        due = time.perf_counter()
        while not stop.is_set():
            self._late.append(time.perf_counter() - due)
            task = asyncio.create_task(self._once(due))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            due += PERIOD_SECONDS
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await asyncio.gather(*self._running)

    async def _once(self, due: float) -> None:
        try:
            await self._ask()
        except grpc.aio.AioRpcError:
            self._failed += 1  # a check without an answer is as bad as the longest wait
        self._seconds.append(time.perf_counter() - due)

    def answer(self) -> dict[str, float]:
        p50, p99 = np.percentile(self._seconds, [50, 99]) * 1e3
        return {
            "checks": len(self._seconds),
            "failed": self._failed,
            "p50_ms": float(p50),
            "p99_ms": float(p99),
            "max_ms": max(self._seconds) * 1e3,
            "late_p99_ms": float(np.percentile(self._late, 99)) * 1e3,
        }


async def probe(health_address: str, live_address: str | None) -> None:
    async with grpc.aio.insecure_channel(health_address) as health_channel:
        health: Any = health_pb2_grpc.HealthStub(health_channel)
        probes = {"health": Probe(lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS))}
        live_channel = grpc.aio.insecure_channel(live_address or health_address)
        if live_address is not None:
            live: Any = pb_grpc.GRPCInferenceServiceStub(live_channel)
            probes["live"] = Probe(lambda: live.ServerLive(pb.ServerLiveRequest(), timeout=TIMEOUT_SECONDS))
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        running: list[asyncio.Task[None]] = []
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            if json.loads(line)["do"] == "start":
                stop = asyncio.Event()
                running = [asyncio.create_task(item.run(stop)) for item in probes.values()]
                print("{}", flush=True)
            else:
                stop.set()
                await asyncio.gather(*running)
                print(json.dumps({name: item.answer() for name, item in probes.items()}), flush=True)
        await live_channel.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.load.probe", description=__doc__)
    parser.add_argument("--health", required=True)
    parser.add_argument("--live")
    args = parser.parse_args()
    _go_first()
    uvloop.run(probe(args.health, args.live))


def _go_first() -> None:
    """Get priority over other processes if allowed, since the server's time is to be measured, not this process's."""
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


if __name__ == "__main__":
    main()
