"""Calls beside other programs that take all cores, in a Unix session of their own.

fleet     a gateway with three replicas        no call fails: a replica without a core is not a lost one
serve     `unlatch serve`                      the same
killed    the fleet, while replicas are killed: one every two seconds, and every fifth time all three at once;
          only a call whose deadline passes may fail, since calls wait until a replica is back
"""

import asyncio
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.bounds import Bound, Figures
from bench.processes import PYTHON, BenchError, kill
from bench.soak.fleet import KILL_SECONDS, REPLICAS, START_SECONDS, Fleet
from bench.subjects.subjects import start
from unlatch import Client
from unlatch.common.errors import UnlatchError

CALLERS = 16
KERNEL, SHORT_KERNEL = "doubled_slowly", "doubled"
# As long as calls wait for a replica (`hold_seconds`).
_TIMEOUT_SECONDS = 10.0
_ANSWERED_SECONDS = 60.0
_ALL_AT_ONCE_EVERY = 5
# Four processes of one session, which end with the bench.
_SPIN = """
import os

bench = os.getppid()
os.fork()
os.fork()
while os.path.exists(f"/proc/{bench}") and os.path.exists(f"/proc/{os.getsid(0)}"):
    for _ in range(10**6):
        pass
"""

BOUNDS = tuple(Bound(name=f"starved_{part}_failed", at_most=0.0) for part in ("fleet", "serve", "killed"))


@dataclass(slots=True)
class _Calls:
    """The ends of calls by status, and the seconds of those that were answered."""

    codes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


def measure(*, seconds: float, on_step: Callable[[str], None]) -> Figures:
    """Measure each part for `seconds`. Raises BenchError if a server does not start."""
    found: Figures = {}
    for part, load in (("fleet", _fleet), ("serve", _serve), ("killed", _killed)):
        on_step(f"starved · {part}")
        with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
            calls = asyncio.run(load(stack, Path(directory), seconds))
        found |= {f"starved_{part}_{name}": value for name, value in _figures(calls, seconds).items()}
    return found


async def _fleet(stack: ExitStack, directory: Path, seconds: float) -> _Calls:
    fleet = Fleet(stack, directory)
    await fleet.up(REPLICAS)
    with _busy():
        return await _load(fleet.port, asyncio.sleep(seconds))


async def _serve(stack: ExitStack, _: Path, seconds: float) -> _Calls:
    subject = start(stack, "unlatch", log="starved-serve")
    await _until_served(subject.port)
    with _busy():
        return await _load(subject.port, asyncio.sleep(seconds))


async def _until_served(port: int) -> None:
    """Wait until a call is answered. Raises BenchError."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            async with Client(f"127.0.0.1:{port}", timeout=_ANSWERED_SECONDS) as client:
                await client.call(KERNEL, np.zeros(1))
                return
        except UnlatchError:
            await asyncio.sleep(0.1)
    raise BenchError(f"`unlatch serve` does not serve after {START_SECONDS:.0f} s")


async def _killed(stack: ExitStack, directory: Path, seconds: float) -> _Calls:
    fleet = Fleet(stack, directory)
    await fleet.up(REPLICAS)
    with _busy():
        return await _load(fleet.port, _kill(fleet, seconds), SHORT_KERNEL, _TIMEOUT_SECONDS)


async def _kill(fleet: Fleet, seconds: float) -> None:
    """Kill one replica at random every two seconds, and sometimes all. Each is started again at once."""
    dice, until, kills = random.Random(1), time.monotonic() + seconds, 0
    while time.monotonic() < until:
        await asyncio.sleep(KILL_SECONDS)
        kills += 1
        everyone = kills % _ALL_AT_ONCE_EVERY == 0
        ending = range(REPLICAS) if everyone else [dice.randrange(REPLICAS)]
        await asyncio.gather(*(fleet.kill(number) for number in ending))


async def _load(
    port: int, lasting: Awaitable[None], kernel: str = KERNEL, timeout: float = _ANSWERED_SECONDS
) -> _Calls:
    """Call as long as `lasting` takes, and check all answers."""
    calls, stop = _Calls(), asyncio.Event()
    async with Client(f"127.0.0.1:{port}", timeout=timeout) as client:
        callers = [asyncio.create_task(_call(client, kernel, seed, calls, stop)) for seed in range(CALLERS)]
        await lasting
        stop.set()
        await asyncio.gather(*callers)
    return calls


async def _call(client: Client, kernel: str, seed: int, calls: _Calls, stop: asyncio.Event) -> None:
    # No two calls are equal, so that none shares another's run.
    noise = np.random.default_rng(seed)
    while not stop.is_set():
        x = noise.normal(size=64)
        began = time.monotonic()
        try:
            answer = await client.call(kernel, x)
        except UnlatchError as error:
            calls.codes[error.status] += 1
            await asyncio.sleep(0.01)
            continue
        if not np.array_equal(answer, x * 2.0):
            raise AssertionError("a wrong answer")
        calls.codes["OK"] += 1
        calls.seconds.append(time.monotonic() - began)


def _figures(calls: _Calls, seconds: float) -> Figures:
    late = calls.codes["DEADLINE_EXCEEDED"]
    return {
        "failed": float(calls.codes.total() - calls.codes["OK"] - late),
        "late": float(late),
        "p99_ms": float(np.percentile(calls.seconds, 99)) * 1e3 if calls.seconds else float("nan"),
        "calls_per_second": calls.codes["OK"] / seconds,
    }


@contextmanager
def _busy() -> Iterator[None]:
    """Keep the cores busy by processes in another session."""
    spinning = subprocess.Popen([PYTHON, "-c", _SPIN], start_new_session=True)
    try:
        yield
    finally:
        os.killpg(spinning.pid, signal.SIGKILL)
        kill(spinning.pid)
        spinning.wait()
