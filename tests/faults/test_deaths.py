"""Deaths of workers: a way to die x a moment. One death hurts the calls in that worker's hands and nothing else."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from common.errors import InvalidArgument, Unavailable
from tests.faults.watching import (
    Gate,
    Process,
    Scrape,
    alive,
    children,
    descriptors,
    resident_bytes,
    until,
    wait_until,
)
from tests.mesh import Mesh
from unlatch import Client

# gRPC wants one event loop a process.
pytestmark = pytest.mark.asyncio(loop_scope="session")

X = np.arange(3.0)
GateMaker = Callable[[str], Gate]

# How a worker that ends by itself is remembered.
DEATHS = {
    "sigkill": "SIGKILL",
    "sigsegv": "SIGSEGV",
    "sigbus": "SIGBUS",
    "exit": "code 3",
    "abort": "SIGABRT",
    "closes": "closed its socket",
    "garbage": "frame",
    "empty map": "frame",
    "unknown frame": "frame",
    "other call": "a call that it was not running",
}
LIES = (
    *("no output", "too many outputs", "outside", "before", "longer than segment", "negative length"),
    *("offsets overflow", "unserved dtype", "shape disagrees", "negative shape", "endless shape", "negative time"),
    *("endless time", "negative code", "endless code", "code of success", "another misfit"),
    *("grown beyond memory", "grown beyond limit"),
)


def restarts(scrape: Scrape) -> float:
    return scrape.sum("unlatch_worker_restarts_total")


def is_full(mesh: Mesh) -> bool:
    return Scrape(mesh.front_metrics).sum("unlatch_worker_up") == 2


def is_dead(process: Process) -> bool:
    return not process.alive


@contextmanager
def replaced(mesh: Mesh, reason: str, times: int = 1) -> Iterator[None]:
    """Within, so many workers die for that reason; afterwards the pool is as it was, and has counted right."""
    before = Scrape(mesh.front_metrics)
    yield
    wait_until(lambda: restarts(Scrape(mesh.front_metrics)) == restarts(before) + times, "restarts are counted")
    wait_until(lambda: is_full(mesh), "every slot has a worker")
    after = Scrape(mesh.front_metrics)
    assert not after.fell_since(before)
    name = "unlatch_worker_restarts_total"
    grown = {
        found: after.sum(name, reason=found) - before.sum(name, reason=found)
        for found in {labels["reason"] for labels in after.labels(name)}
    }
    assert sum(count for found, count in grown.items() if reason in found) == times, grown


async def busy(client: Client) -> None:
    """Have every worker end a call: one that was replaced has then proved itself, and backs off no more."""
    echoes = [client.burns(seconds=0.002) for _ in range(8)]
    assert all(burnt >= 0.002 for burnt in await asyncio.gather(*echoes))


async def fails(call: asyncio.Task[object], reason: str) -> None:
    with pytest.raises(Unavailable, match=reason):
        await call


@pytest.mark.parametrize("how", DEATHS)
async def test_death_in_a_call_fails_that_call(faulty: Mesh, client: Client, how: str) -> None:
    """A worker that dies of its kernel fails that call, with the reason, and no other."""
    with replaced(faulty, DEATHS[how]):
        doomed = asyncio.ensure_future(client.dies(X, how=how, timeout=5.0))
        others = [client.echo(X * factor) for factor in range(50)]
        for factor, y in enumerate(await asyncio.gather(*others, return_exceptions=True)):
            # One may have been staged behind the call that kills.
            if not isinstance(y, Unavailable):
                np.testing.assert_array_equal(y, X * factor)
        await fails(doomed, DEATHS[how])
    await busy(client)


@pytest.mark.parametrize("how", LIES)
async def test_lie_about_a_reply_ends_the_worker(faulty: Mesh, client: Client, how: str) -> None:
    """A worker that answers what cannot be is killed, its call ends UNAVAILABLE, and the front is none the worse."""
    with replaced(faulty, ""):
        await fails(asyncio.ensure_future(client.dies(X, how=how, timeout=5.0)), "worker")
    assert resident_bytes(faulty.front_service.pid) < 400e6
    await busy(client)


@pytest.mark.parametrize("how", DEATHS)
async def test_death_of_an_idle_worker_fails_nothing(faulty: Mesh, client: Client, gate: GateMaker, how: str) -> None:
    """A worker that dies between calls is replaced, and no call knows."""
    here = gate("idle")
    np.testing.assert_array_equal(await client.dies_idle(X, how=how, gate=str(here)), X)
    await until(lambda: here.reached, "the thread waits")
    # A worker that is not in a call takes the end of its socket for the end of its work.
    with replaced(faulty, "code 0" if how == "closes" else DEATHS[how]):
        here.open()
    await busy(client)


@pytest.mark.parametrize("how", [*DEATHS, "from outside"])
async def test_death_fails_the_staged_call_too(faulty: Mesh, client: Client, gate: GateMaker, how: str) -> None:
    """What the dead worker held, running and staged, ends UNAVAILABLE; what others hold and what waits is answered."""
    first, second = gate("first"), gate("second")
    reason = DEATHS.get(how, "SIGKILL")
    with replaced(faulty, reason):
        # Ties go to the lowest slot: the staged calls go to the workers in the same order.
        kernel = client.waits(X, gate=str(first)) if how == "from outside" else client.dies(X, how=how, gate=str(first))
        doomed = asyncio.ensure_future(kernel)
        await until(lambda: first.reached, "the first call runs")
        running = asyncio.ensure_future(client.waits(X, gate=str(second)))
        await until(lambda: second.reached, "the second call runs")
        slots = {f"worker-{slot}": pid for slot, pid in enumerate((first.pid, second.pid))}
        assert len(set(slots.values())) == 2
        others = [asyncio.ensure_future(client.echo(X * factor)) for factor in range(12)]
        await until(lambda: Scrape(faulty.front_metrics).sum("unlatch_queue_depth") == 10, "the rest waits")
        if how == "from outside":
            os.kill(first.pid, signal.SIGKILL)
        else:
            first.open()
        await fails(doomed, reason)
        second.open()
        np.testing.assert_array_equal(await running, X)
        lost = 0
        for factor, y in enumerate(await asyncio.gather(*others, return_exceptions=True)):
            if isinstance(y, Unavailable):
                lost += 1
                assert reason in str(y)
            else:
                np.testing.assert_array_equal(y, X * factor)
        assert lost == 1
    await busy(client)


@pytest.mark.parametrize("how", ["sigkill", "sigsegv", "exit", "abort", "closes", "garbage"])
async def test_death_while_starting_is_tried_again(faulty: Mesh, client: Client, at_start: Path, how: str) -> None:
    """A replacement that dies before it is ready is replaced in turn, and meanwhile the other worker serves."""
    (at_start / f"{how}.start").touch()
    before = Scrape(faulty.front_metrics)
    await fails(asyncio.ensure_future(client.dies(X, how="exit")), "code 3")
    while (at_start / f"{how}.start").exists() or not is_full(faulty):
        np.testing.assert_array_equal(await client.echo(X), X)
    assert 1 <= restarts(Scrape(faulty.front_metrics)) - restarts(before) <= 2
    await busy(client)


async def test_dead_worker_takes_one_call_at_most(faulty: Mesh, client: Client) -> None:
    """Of calls that come while an idle worker dies, the front gives it one at most before it knows."""
    for _ in range(10):
        victim = Process.of(faulty.workers[-1])
        with replaced(faulty, "SIGKILL"):
            os.kill(victim.pid, signal.SIGKILL)
            await until(partial(is_dead, victim), "it is dead")
            calls = [client.echo(X * factor) for factor in range(20)]
            answers = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(answer, Unavailable) for answer in answers) <= 1
        await busy(client)


async def test_many_deaths_leave_nothing(faulty: Mesh, client: Client) -> None:
    """After many deaths the front has the descriptors and memory that it had, and no zombie is left anywhere."""
    front, forkserver = faulty.front_service.pid, faulty.pids["forkserver"]

    async def deaths(count: int) -> None:
        for number in range(count):
            how = ("sigkill", "sigsegv", "exit", "garbage")[number % 4]
            with replaced(faulty, DEATHS[how]):
                await fails(asyncio.ensure_future(client.dies(np.ones(100_000), how=how)), DEATHS[how])
            await busy(client)

    await deaths(4)
    files, memory = sorted(descriptors(front).values()), resident_bytes(front)
    await deaths(24)
    assert len(descriptors(front)) <= len(files) + 2, sorted(descriptors(front).values())
    assert resident_bytes(front) - memory < 4e6
    wait_until(lambda: not children(front, zombies=True) and not children(forkserver, zombies=True), "no zombies")


async def test_forkserver_killed(faulty: Mesh, client: Client, gate: GateMaker) -> None:
    """When the forkserver dies its workers go on, calls included; a worker killed later still gets a successor."""
    here = gate("here")
    running = asyncio.ensure_future(client.waits(X, gate=str(here)))
    await until(lambda: here.reached, "a call runs")
    workers, forkserver = set(faulty.workers), faulty.pids["forkserver"]
    processes = [Process.of(pid) for pid in workers]
    before = Scrape(faulty.front_metrics)
    os.kill(forkserver, signal.SIGKILL)
    others = [asyncio.ensure_future(client.echo(X)) for _ in range(20)]
    # One of them is staged behind the call that waits.
    await until(lambda: sum(other.done() for other in others) == 19, "the other worker serves")
    assert len(alive(processes)) == 2
    assert restarts(Scrape(faulty.front_metrics)) == restarts(before)
    here.open()
    np.testing.assert_array_equal(await running, X)
    await asyncio.gather(*others)
    # Their parent is gone: nobody but the pidfd tells of their end. Both die, so both successors are the new one's.
    for process in processes:
        with replaced(faulty, ""):
            os.kill(process.pid, signal.SIGKILL)
        await busy(client)
    assert faulty.pids["forkserver"] != forkserver
    assert len(faulty.workers) == 2
    assert not workers & set(faulty.workers)
    assert not children(faulty.front_service.pid, zombies=True)
    assert not Scrape(faulty.front_metrics).fell_since(before)


async def test_child_of_a_kernel_ends_with_its_worker(faulty: Mesh, client: Client, tmp_path: Path) -> None:
    """What a kernel has started goes when its worker goes."""
    record = tmp_path / "child"
    await client.leaves_child(X, record=str(record))
    child = Process.of(int(record.read_text()))
    assert child.alive
    parent = next(pid for pid in faulty.workers if child.pid in children(pid))
    with replaced(faulty, "SIGKILL"):
        os.kill(parent, signal.SIGKILL)
    wait_until(lambda: not child.alive, "the child has ended")
    await busy(client)


SEALED = {
    "truncate input": "EPERM",
    "grow input": "EPERM",
    "write input": "EPERM",
    "punch input": "EPERM",
    "map input": "EPERM",
    "unprotect input": "EACCES",
    "seal input": "EPERM",
    "truncate reply": "EPERM",
    "shorten reply": "EPERM",
    "write-seal reply": "EBUSY",
}


@pytest.mark.parametrize("how", SEALED)
async def test_shared_memory_is_sealed(faulty: Mesh, client: Client, how: str) -> None:
    """A worker can write no input segment, and shrink no segment at all: the system refuses, and calls go on."""
    assert str(await client.tampers(X, how=how)) == repr(SEALED[how].encode())
    np.testing.assert_array_equal(await client.echo(X), X)


async def test_scribbling_worker_spoils_its_own_reply_alone(faulty: Mesh, client: Client) -> None:
    """Noise written over a worker's reply segments while the front reads them reaches nobody else's reply."""
    with replaced(faulty, "SIGKILL"):
        spoilt = asyncio.ensure_future(client.scribbles(megabytes=64, seconds=1.5))
        await until(lambda: Scrape(faulty.front_metrics).sum("unlatch_worker_busy_seconds_total"), "it runs")
        for factor in range(100):
            y = await client.echo(np.full(1000, float(factor)))
            # The scribbler may be who answers this, and then it may be noise too.
            assert y.shape == (1000,)
        assert (await spoilt).shape == (64 << 17,)
        scribbler = max(faulty.workers, key=lambda pid: Path(f"/proc/{pid}/task").stat().st_nlink)
        os.kill(scribbler, signal.SIGKILL)
    await busy(client)
    np.testing.assert_array_equal(await client.echo(X), X)


@pytest.mark.parametrize("size", [1 << 30, 1 << 46])
async def test_huge_reply_segment_costs_the_front_nothing(faulty: Mesh, client: Client, size: int) -> None:
    """A reply segment that its worker has made enormous, with a fair reply in it, is read as far as the reply goes."""
    x = np.arange(1 << 18, dtype="f8")
    np.testing.assert_array_equal(await client.grows(x, size=size), x)
    assert resident_bytes(faulty.front_service.pid) < 400e6
    np.testing.assert_array_equal(await client.echo(x), x)


async def test_wrong_call_after_deaths_is_refused_as_ever(client: Client) -> None:
    """The pool that has outlived all this still tells a caller's fault from its own."""
    with pytest.raises(InvalidArgument):
        await client.waits(X.astype("f4"), gate="")
