"""A process that was stopped is told apart from one that is busy, by real ones."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.support.watching import descriptors, until
from unlatch.compute.pool import exits
from unlatch.compute.pool.exits import Exit
from unlatch.compute.pool.stopped import StoppedWatch

Runs = Callable[[str], int]


@pytest.fixture
def runs() -> Iterator[Runs]:
    """Starts processes of some Python each, which end with the test."""
    with ExitStack() as stack:

        def start(code: str) -> int:
            child = stack.enter_context(subprocess.Popen([sys.executable, "-c", code]))
            stack.callback(child.kill)
            return child.pid

        yield start


@pytest.fixture
def gone() -> int:
    """A process that has ended, and that its parent has waited for."""
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        return child.pid


async def test_stopped_process_is_found_and_no_other(runs: Runs) -> None:
    """Of three that are looked at alike the one that is stopped is told of, once: not one that computes or waits."""
    waits = "import time; time.sleep(600)"
    pids = {"computes": runs("while True: pass"), "waits": runs(waits), "stopped": runs(waits)}
    os.kill(pids["stopped"], signal.SIGSTOP)
    found: list[tuple[str, Exit]] = []
    looks = [
        StoppedWatch(pid, 0.5, lambda end, name=name: found.append((name, end)))  # type: ignore[misc]
        for name, pid in pids.items()
    ]
    off = StoppedWatch(pids["stopped"], 0.0, lambda end: found.append(("off", end)))
    await until(lambda: found, "it is found")
    assert found == [("stopped", exits.STOPPED)]
    for look in (*looks, off):
        look.close()


async def test_process_that_has_gone_is_not_looked_at(gone: int) -> None:
    """A process that has ended is not reported, and no descriptor of it is kept."""
    look = StoppedWatch(gone, 0.5, lambda end: pytest.fail(str(end)))
    assert not [opened for opened in descriptors(os.getpid()).values() if opened.startswith(f"/proc/{gone}/")]
    look.close()
