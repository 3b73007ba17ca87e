"""Counters of processor time, compared with the kernels' own clocks and the system's."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.mesh.faults.conftest import FAULT_KERNELS
from tests.support.mesh import Mesh, running_mesh
from tests.support.watching import Scrape, processor_seconds, tree, until
from unlatch import Client
from unlatch.common.errors import Aborted
from unlatch.common.telemetry.processes import WINDOW_SECONDS

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.alone]

CPU = "unlatch_process_cpu_seconds_total"
RATIO = "unlatch_process_utilization_ratio"
BUSY = "unlatch_worker_busy_seconds_total"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, at_start: Path) -> Iterator[Mesh]:
    """A mesh of three workers."""
    flags = ["--kernels", str(FAULT_KERNELS), "--workers", "3"]
    with running_mesh(tmp_path_factory.mktemp("three"), dispatcher=flags) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def caller(three: Mesh) -> AsyncIterator[Client]:
    """A client of this mesh."""
    async with Client(three.gateway, timeout=30.0) as opened:
        yield opened


def of_workers(scrape: Scrape) -> float:
    return sum(scrape.sum(CPU, process=f"worker-{slot}") for slot in range(3))


async def test_burnt_seconds_are_counted(three: Mesh, caller: Client, tmp_path: Path) -> None:
    """A kernel's processor seconds by its own clock are its worker's counters, also if workers died of it."""
    before = Scrape(three.dispatcher_metrics)
    burnt = sum(float(seconds) for seconds in await asyncio.gather(*(caller.burns(seconds=0.3) for _ in range(3))))
    for number in range(4):
        record = tmp_path / str(number)
        with pytest.raises(Aborted):
            await caller.burns_and_dies(seconds=0.25, record=str(record))
        burnt += float(record.read_text())
        await until(lambda: Scrape(three.dispatcher_metrics).sum("unlatch_worker_up") == 3, "the worker is replaced")
    after = Scrape(three.dispatcher_metrics)
    assert not after.fell_since(before)
    # The start of a worker costs some milliseconds, and the system counts in hundredths of a second.
    assert -0.02 <= of_workers(after) - of_workers(before) - burnt <= 0.03 + 4 * 0.03
    modes = {labels["mode"] for labels in after.labels(CPU)}
    assert modes == {"user", "system"}
    others = ("dispatcher", "forkserver")
    assert sum(after.sum(CPU, process=name) - before.sum(CPU, process=name) for name in others) < 0.7


async def test_every_process_is_counted(three: Mesh) -> None:
    """Gateway, dispatcher, forkserver and each worker have the time, utilisation and memory of /proc."""
    seen = {Scrape(address) for address in (three.gateway_metrics, three.dispatcher_metrics)}
    names = {"gateway", "dispatcher", "forkserver", "worker-0", "worker-1", "worker-2"}
    for series in (CPU, RATIO, "unlatch_process_resident_memory_bytes"):
        assert {dict(has)["process"] for scrape in seen for name, has in scrape.samples if name == series} == names
    for name, pid in (("gateway", three.gateway_service.pid), ("dispatcher", three.dispatcher_service.pid)):
        counted = max(scrape.sum(CPU, process=name) for scrape in seen)
        assert counted == pytest.approx(processor_seconds(pid), abs=0.1)


async def test_utilization_is_the_systems(three: Mesh, caller: Client) -> None:
    """Over one window a busy, a half-busy and an idle worker agree with their clocks.

    Busy seconds grow during a run.
    """
    started = tree(three.dispatcher_service.pid)
    workers = {process.pid for process in started if "forkserver" in process.command} & set(three.workers)
    assert len(workers) == 3
    seconds = WINDOW_SECONDS + 1.5
    calls = [
        asyncio.ensure_future(caller.burns(seconds=seconds)),
        asyncio.ensure_future(caller.half_busy(seconds=seconds + 0.5, share=0.5)),
    ]
    try:
        idle_at_first = Scrape(three.dispatcher_metrics)
        await until(lambda: Scrape(three.dispatcher_metrics).sum(BUSY) > idle_at_first.sum(BUSY), "they run")
        machine, own = machine_seconds(), {process: processor_seconds(process.pid) for process in started}
        asked = time.monotonic()
        first, began = Scrape(three.dispatcher_metrics), time.monotonic()
        gateway = processor_seconds(three.gateway_service.pid) + processor_seconds(os.getpid())
        await until(lambda: time.monotonic() - began >= WINDOW_SECONDS, "a window has passed", WINDOW_SECONDS + 1)
        least = time.monotonic() - began
        last, took = Scrape(three.dispatcher_metrics), time.monotonic() - began
        used = {process: processor_seconds(process.pid) - before for process, before in own.items()}
        gateway = processor_seconds(three.gateway_service.pid) + processor_seconds(os.getpid()) - gateway
        others = machine_seconds() - machine - sum(used.values()) - gateway
        by_clock = sorted(used[process] / took for process in started if process.pid in workers)
        by_metric = sorted(last.sum(RATIO, process=f"worker-{slot}") for slot in range(3))
        busy = sorted(last.sum(BUSY, worker=f"{slot}") - first.sum(BUSY, worker=f"{slot}") for slot in range(3))
        print(f"by clock {by_clock}, by metric {by_metric}, busy {busy} of {took:.2f} s, other load {others:.2f} s")
        assert by_metric == pytest.approx(by_clock, abs=0.05)
        # Each reading was made at some moment between its request and its answer.
        assert busy[0] == pytest.approx(0.0, abs=0.05)
        assert least - 0.05 <= busy[1] <= busy[2] <= took + (began - asked) + 0.05
        assert by_metric[0] < 0.02
        if others / took > 0.1:
            print(f"not held against 1 and 0.5: something else used {others / took:.2f} cores meanwhile")
        else:
            assert 0.95 <= by_metric[2] <= 1.0 + 0.005
            assert by_metric[1] == pytest.approx(0.5, abs=0.08)
    finally:
        await asyncio.gather(*calls)
    assert not Scrape(three.dispatcher_metrics).fell_since(last)


def machine_seconds() -> float:
    """Read the processor time that all processes and the kernel have used together."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    idle, iowait = int(fields[3]), int(fields[4])
    # The last two fields are guests', and are part of the first ones.
    return (sum(map(int, fields[:8])) - idle - iowait) / os.sysconf("SC_CLK_TCK")
