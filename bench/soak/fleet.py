"""`python -m bench.soak --fleet`: three replicas at saturation, one killed every two seconds, then each restarted.

Callers check every reply. No call of a pure kernel may fail. Other calls may be ABORTED while replicas are killed,
but not while they are restarted, and the gateway must count each. Retries must keep to their budget.
"""

import asyncio
import random
import signal
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.processes import PYTHON, BenchError, Process, free_port, kill
from bench.scrape import scrape, total
from unlatch import Client
from unlatch.common.errors import UnlatchError

REPLICAS = 3
KILL_SECONDS = 2.0
CALLERS = 8
START_SECONDS = 60.0
PURE = ("doubled", "doubled_slowly")
OTHER = ("negated", "negated_slowly")
# As in decision 14.
_SHARE = 0.1


@dataclass(slots=True)
class Ended:
    """How calls ended, by kernel and status; and the faults of any."""

    codes: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Fleet:
    """A gateway and its replicas, each a process that can be ended and started again."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self._stack = stack
        self._sockets = [directory / f"{number}.sock" for number in range(REPLICAS)]
        self._replicas = [self._replica(number) for number in range(REPLICAS)]
        self.port, self.metrics_port = free_port(), free_port()
        targets = ",".join(f"unix:{socket}" for socket in self._sockets)
        argv = [PYTHON, "-m", "unlatch.gateway", "--listen", f"127.0.0.1:{self.port}", "--replicas", targets]
        argv += ["--metrics-listen", f"127.0.0.1:{self.metrics_port}", "--health-listen", "127.0.0.1:0"]
        self._gateway = stack.enter_context(Process("fleet-gateway", argv))

    def total(self, name: str) -> float:
        """The sum of a metric in the gateway."""
        return total(scrape(self.metrics_port), name)

    async def up(self, count: int) -> None:
        """Wait until the gateway has a lane to `count` replicas."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                if await asyncio.to_thread(self.total, "unlatch_replica_up") >= count:
                    return
            except OSError:
                pass  # the gateway does not listen yet
            await asyncio.sleep(0.05)
        raise BenchError(f"{count} replicas are not up after {START_SECONDS:.0f} s\n{self._gateway.tail()}")

    async def kill(self, number: int) -> None:
        """End a replica by SIGKILL, and start it again."""
        await self._end(number, signal.SIGKILL)

    async def restart(self, number: int) -> None:
        """End a replica by SIGTERM, start it again once it has drained, and wait until it serves."""
        await self._end(number, signal.SIGTERM)
        await self.up(REPLICAS)

    async def _end(self, number: int, how: signal.Signals) -> None:
        ended = self._replicas[number].child
        if how is signal.SIGKILL:
            kill(ended.pid)
        else:
            ended.send_signal(how)
        await asyncio.to_thread(ended.wait)
        self._replicas[number] = self._replica(number)

    def _replica(self, number: int) -> Process:
        argv = [PYTHON, "-m", "unlatch.compute", "--listen", f"unix:{self._sockets[number]}", "--workers", "1"]
        argv += [
            "--metrics-listen",
            "127.0.0.1:0",
            "--health-listen",
            "127.0.0.1:0",
            "--kernels",
            "bench/subjects/kernels.py",
        ]
        return self._stack.enter_context(Process(f"fleet-{number}", argv))


def run(seconds: float, seed: int, console: Console) -> list[str]:
    """Kill replicas for some time, then restart each, and print what happened. Returns what was wrong."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack, console.status("soaking a fleet"):
        fleet = Fleet(stack, Path(directory))
        return asyncio.run(_run(fleet, seconds, random.Random(seed), console))


async def _run(fleet: Fleet, seconds: float, dice: random.Random, console: Console) -> list[str]:
    await fleet.up(REPLICAS)
    ended, kills, stop = Ended(), 0, asyncio.Event()
    async with Client(f"127.0.0.1:{fleet.port}", timeout=START_SECONDS) as client:
        callers = [
            asyncio.create_task(_call(client, kernel, np.random.default_rng(seed), ended, stop))
            for seed, kernel in enumerate((*PURE, *OTHER) * CALLERS)
        ]
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await asyncio.sleep(KILL_SECONDS)
            # At least one of the others stays up, since calls need a replica.
            await fleet.up(2)
            await fleet.kill(dice.randrange(REPLICAS))
            kills += 1
        await fleet.up(REPLICAS)
        lost = {kernel: ended.codes[kernel, "ABORTED"] for kernel in OTHER}
        for number in range(REPLICAS):
            await fleet.restart(number)
        stop.set()
        await asyncio.gather(*callers)
    for kernel in OTHER:
        if more := ended.codes[kernel, "ABORTED"] - lost[kernel]:
            ended.wrong.append(f"{kernel}: {more} calls were lost to a rolling restart")
    _check_counts(fleet, ended, kills, len(callers), seconds, console)
    return ended.wrong


def _check_counts(fleet: Fleet, ended: Ended, kills: int, callers: int, seconds: float, console: Console) -> None:
    """Compare the gateway's counters with the callers' counts, and show both."""
    calls = sum(ended.codes.values())
    told = scrape(fleet.metrics_port)
    counted = sum(value for (name, labels), value in told.items() if name == "unlatch_calls_total" and labels)
    if counted != calls:
        ended.wrong.append(f"the gateway counted {counted:.0f} calls, and {calls} ended")
    retries = {
        dict(labels)["reason"]: value for (name, labels), value in told.items() if name.endswith("retries_total")
    }
    spent = sum(value for reason, value in retries.items() if reason != "not_begun")
    if spent > _SHARE * calls + callers:
        ended.wrong.append(f"{spent:.0f} retries are more than a tenth of {calls} calls, and a replica's worth")
    _show(ended, kills, retries, seconds, console)


async def _call(client: Client, kernel: str, noise: np.random.Generator, ended: Ended, stop: asyncio.Event) -> None:
    """Call one kernel repeatedly, each time with other values."""
    while not stop.is_set():
        x = noise.standard_normal(int(noise.integers(16, 1024)))
        try:
            y = await client.call(kernel, x)
        except UnlatchError as error:
            ended.codes[kernel, error.status] += 1
            if kernel in PURE or error.status != "ABORTED" or "may have had an effect" not in error.message:
                ended.wrong.append(f"{kernel}: {error.status} {error.message[:200]}")
        else:
            ended.codes[kernel, "OK"] += 1
            if not np.array_equal(y, x * 2.0 if kernel in PURE else -x):
                ended.wrong.append(f"{kernel}: the content is wrong")


def _show(ended: Ended, kills: int, retries: dict[str, float], seconds: float, console: Console) -> None:
    table = Table(
        title=f"{sum(ended.codes.values()):,} calls, {kills} replicas killed in {seconds:.0f} s, then a restart"
    )
    table.title_justify = table.caption_justify = "left"
    table.add_column("kernel")
    codes = sorted({code for _, code in ended.codes})
    for code in codes:
        table.add_column(code, justify="right")
    for kernel in (*PURE, *OTHER):
        table.add_row(kernel, *(f"{ended.codes[kernel, code]:,}" for code in codes))
    again = ", ".join(f"{count:.0f} {reason}" for reason, count in sorted(retries.items()))
    table.caption = f"Sent again: {again or 'none'}."
    console.print(table)
