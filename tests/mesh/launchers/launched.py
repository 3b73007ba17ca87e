"""Parts of the launchers' tests: a gateway that follows a file, and the replicas that a launcher has started."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tests.support.mesh import ROOT, Service
from tests.support.watching import Gate, until

LAUNCHERS = ROOT / "examples" / "launchers"
HERE = Path(__file__).parent
# The nodes of a cluster take seconds to start, and many more on a busy machine.
WITHIN = 120.0


@contextmanager
def gateway_of(file: Path) -> Iterator[Service]:
    """Run a gateway to the replicas of a file."""
    ports = ("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0")
    with Service("gateway", "--replicas", f"file:{file}", "--drain-seconds", "5", *ports) as door:
        door.wait_for("serving")
        yield door


async def all_ready(door: Service, file: Path, count: int) -> None:
    """Wait until the file has so many addresses, and the gateway a lane to each."""
    await until(lambda: len(addresses(file)) == count, f"the file has {count} addresses", within=WITHIN)
    for target in addresses(file):
        await asyncio.to_thread(door.wait_for, "replica is ready", replica=target, within=WITHIN)


def dispatchers(name: str) -> list[int]:
    """The pids of the replicas of that name."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"compute" in words and name.encode() in words:
            found.append(int(pid))
    return found


def addresses(file: Path) -> list[str]:
    """The lines of the file that the launcher keeps."""
    return file.read_text().splitlines() if file.exists() else []


async def let_go(call: "asyncio.Future[np.ndarray]", gate: Gate) -> int:
    """Open the gate of a call until the call is answered, by its first run or by another one. Returns the answer."""

    def answered() -> bool:
        if gate.reached:
            gate.open()
        return call.done()

    await until(answered, "the call is answered", within=WITHIN)
    return int(await call)
