"""A cancel frees the core: an abandoned call is dropped, or its kernel notices, or it loses its worker."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.mesh.faults.conftest import gone, is_full, restarts
from tests.mesh.faults.test_client import in_flight
from tests.mesh.faults.test_deaths import DEATHS
from tests.support.mesh import Mesh
from tests.support.watching import Gate, Scrape, until
from unlatch import Client
from unlatch.common.errors import Aborted, DeadlineExceeded, FailedPrecondition

pytestmark = pytest.mark.asyncio(loop_scope="session")

MESHES = ("apart", "unit")

X = np.arange(3.0)
ABANDONED = "abandoned"
TIMED_OUT = "timed_out"
# This is far longer than any test: the tests are about ends that come before.
EVER = 600.0


def wasted(mesh: Mesh) -> float:
    return Scrape(mesh.dispatcher_metrics).sum("unlatch_wasted_cpu_seconds_total")


def runs(mesh: Mesh, kernel: str) -> bool:
    return Scrape(mesh.dispatcher_metrics).sum("unlatch_worker_running_seconds", kernel=kernel) > 0


async def left(task: "asyncio.Future[object]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("how", ["cancelled", "expired", "disconnected"])
async def test_core_of_a_call_that_nobody_waits_for_is_freed(
    faulty: Mesh, client: Client, tmp_path: Path, how: str
) -> None:
    """A loop that never asks loses its worker when its caller has left, and another call runs on that core."""
    before, lost, records = restarts(faulty, ABANDONED), wasted(faulty), [tmp_path / "one", tmp_path / "two"]
    async with Client(faulty.gateway) as leaver:
        # Both calls must begin before this, on a busy machine too.
        limit = 2.0 if how == "expired" else EVER
        calls = [
            asyncio.ensure_future(leaver.call("spins", seconds=EVER, record=str(record), timeout=limit))
            for record in records
        ]
        await until(lambda: all(record.exists() for record in records), "both cores are taken")
        waiting = asyncio.ensure_future(client.echo(X))
        if how == "cancelled":
            for call in calls:
                await left(call)
        elif how == "disconnected":
            await leaver.close()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    kinds = {"cancelled": asyncio.CancelledError, "expired": DeadlineExceeded, "disconnected": Aborted}
    assert all(isinstance(outcome, kinds[how]) for outcome in outcomes), outcomes
    np.testing.assert_array_equal(await asyncio.wait_for(waiting, 5), X)
    await until(lambda: restarts(faulty, ABANDONED) == before + 2, "both workers were replaced, and counted")
    await until(lambda: is_full(faulty), "the pool is at full width again")
    assert wasted(faulty) > lost
    await until(lambda: in_flight(faulty) == 0, "nothing is in flight")


async def test_kernel_that_notices_keeps_its_worker(faulty: Mesh, client: Client, tmp_path: Path) -> None:
    """A kernel that asks `cancelled()` stops by itself. What it had used by then counts as wasted."""
    pids, lost = set(faulty.workers), wasted(faulty)
    record = tmp_path / "noticed"
    call = asyncio.ensure_future(client.notices(seconds=EVER, record=str(record)))
    await until(
        lambda: Scrape(faulty.dispatcher_metrics).sum("unlatch_worker_running_seconds", kernel="notices") > 0, "runs"
    )
    await left(call)
    await until(record.exists, "it has noticed")
    np.testing.assert_array_equal(await client.echo(X), X)
    await until(lambda: wasted(faulty) > lost, "what it used is counted")
    assert set(faulty.workers) == pids


async def test_call_that_was_not_begun_never_is(
    faulty: Mesh, client: Client, gate: Callable[[str], Gate], tmp_path: Path
) -> None:
    """A call that is queued or staged behind a run is dropped when its caller leaves, and no worker is lost."""
    pids = set(faulty.workers)
    gates = [gate("one"), gate("two")]
    busy = [asyncio.ensure_future(client.waits(X, gate=str(each))) for each in gates]
    await until(lambda: all(each.reached for each in gates), "both run")
    before, records = gone(faulty), [tmp_path / str(number) for number in range(4)]
    calls = [asyncio.ensure_future(client.spins(seconds=EVER, record=str(record))) for record in records]
    await until(lambda: Scrape(faulty.dispatcher_metrics).sum("unlatch_queue_depth") == 2, "two are staged, two wait")
    for call in calls:
        await left(call)
    await until(lambda: gone(faulty) == before + len(calls), "the dispatcher knows")
    for each in gates:
        each.open()
    for y in await asyncio.gather(*busy):
        np.testing.assert_array_equal(y, X)
    await asyncio.gather(*(client.echo(X) for _ in range(8)))
    assert not [record for record in records if record.exists()]
    assert set(faulty.workers) == pids


async def test_kernels_timeout_ends_its_run(faulty: Mesh, client: Client) -> None:
    """The call ends DEADLINE_EXCEEDED with the kernel's name and limit, and the core is free."""
    before = restarts(faulty, TIMED_OUT)
    with pytest.raises(DeadlineExceeded, match=r"kernel timed ran for longer than its timeout of 0\.5 s"):
        await client.timed(seconds=EVER)
    assert await client.timed(seconds=0.01) == 0.01
    await until(lambda: restarts(faulty, TIMED_OUT) == before + 1, "its worker was replaced")
    await until(lambda: is_full(faulty), "the pool is at full width again")


async def test_timeout_is_the_kernels_and_not_the_dispatchers(faulty: Mesh, client: Client) -> None:
    """A run that ended in time is answered, though the dispatcher was stopped until long after the kernel's timeout."""
    pids = set(faulty.workers)
    for _ in range(3):
        call = asyncio.ensure_future(client.timed(seconds=0.1))
        await until(lambda: runs(faulty, "timed") or call.done(), "it runs")  # noqa: B023 (awaited here)
        os.kill(faulty.dispatcher_service.pid, signal.SIGSTOP)
        try:
            end = time.monotonic() + 0.9
            await until(lambda: time.monotonic() > end, "its timeout has passed")  # noqa: B023 (awaited here)
        finally:
            os.kill(faulty.dispatcher_service.pid, signal.SIGCONT)
        assert float(await call) == 0.1
    assert set(faulty.workers) == pids


@pytest.mark.parametrize("how", DEATHS)
async def test_pure_call_outlives_its_worker(client: Client, tmp_path: Path, how: str) -> None:
    """A pure kernel's call runs once more when its worker dies, for any reason, and its caller sees a result."""
    record = tmp_path / "deaths"
    np.testing.assert_array_equal(await client.dies_at_first(X, record=str(record), how=how), X)
    assert len(record.read_bytes()) == 1


@pytest.mark.parametrize("how", DEATHS)
async def test_call_that_kills_twice_is_not_run_again(faulty: Mesh, client: Client, tmp_path: Path, how: str) -> None:
    """After two workers the call ends FAILED_PRECONDITION, and all others are served."""
    record = tmp_path / "deaths"
    with pytest.raises(FailedPrecondition, match="2 workers ended while they ran this call"):
        await client.dies_at_first(X, record=str(record), times=100, how=how)
    assert len(record.read_bytes()) == 2
    np.testing.assert_array_equal(await client.echo(X), X)
    await until(lambda: is_full(faulty), "the pool is at full width again")


async def test_many_cancels_lose_nobody_elses_call(faulty: Mesh, client: Client, tmp_path: Path) -> None:
    """Runs are abandoned again and again while others call: every other call gets its own answer."""
    for number in range(8):
        record = tmp_path / str(number)
        doomed = asyncio.ensure_future(client.spins(seconds=EVER, record=str(record)))
        await until(record.exists, "it has begun")
        others = [asyncio.ensure_future(client.echo(X * factor)) for factor in range(20)]
        await left(doomed)
        for factor, y in enumerate(await asyncio.gather(*others)):
            np.testing.assert_array_equal(y, X * factor)
    await until(lambda: is_full(faulty), "the pool is at full width again")
