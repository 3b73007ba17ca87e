"""Deaths of workers: a way to die x a moment. A death affects the calls that its worker has, and nothing else."""

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from tests.mesh.faults.conftest import is_full, restarts
from tests.support.mesh import Mesh
from tests.support.watching import (
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
from unlatch import Client
from unlatch.common.errors import Aborted, InvalidArgument
from unlatch.common.kernel.tensors import Array

# gRPC wants one event loop in a process.
pytestmark = pytest.mark.asyncio(loop_scope="session")

MESHES = ("apart", "unit")

X = np.arange(3.0)
GateMaker = Callable[[str], Gate]

# The reason under which metrics count a worker that ends by itself, and whose text it does not choose.
DEATHS = {
    "sigkill": "killed",
    "sigsegv": "segmentation_fault",
    "sigbus": "bus_error",
    "exit": "exited",
    "abort": "aborted",
    "real-time signal": "signal",
    "stops": "stopped",
    "main thread ends": "main_thread_ended",
    "closes": "socket_closed",
    "garbage": "undecodable_frame",
    "empty map": "undecodable_frame",
    "unknown frame": "undecodable_frame",
    "other call": "unexpected_reply",
}
# The messages that callers get.
STORIES = {
    "sigkill": "the worker was killed by SIGKILL",
    "sigsegv": "the worker was killed by SIGSEGV",
    "sigbus": "the worker was killed by SIGBUS",
    "exit": "the worker exited with code 3",
    "abort": "the worker was killed by SIGABRT",
    "real-time signal": "the worker was killed by signal 35",
    "stops": "the worker was stopped",
    "main thread ends": "the worker's main thread ended, and its process did not",
    "closes": "the worker closed its socket",
    "garbage": "the worker sent an undecodable frame",
    "empty map": "the worker sent an undecodable frame",
    "unknown frame": "the worker sent an undecodable frame",
    "other call": "the worker answered a call that it was not running",
}
# The end of a thread is not the end of the process: nothing is wrong in an idle worker.
IDLE_DEATHS = DEATHS.keys() - {"main thread ends"}
# Some of these say nothing of what the worker does next: for the dispatcher it may have ended its run.
SAID = ("garbage", "empty map", "unknown frame", "other call")
LIES = (
    *("no output", "too many outputs", "outside", "before", "longer than segment", "negative length"),
    *("offsets overflow", "unserved dtype", "shape disagrees", "negative shape", "endless shape", "negative time"),
    *("endless time", "negative code", "endless code", "code of success", "another misfit", "another start"),
    "another kernel",
    *("grown beyond memory", "grown beyond limit"),
)


_made = count()


def fresh(size: int = 3) -> Array:
    """Make an array that no call has had before: a call that has caused two deaths is refused."""
    return np.full(size, float(next(_made)))


def is_dead(process: Process) -> bool:
    return not process.alive


@contextmanager
def replaced(mesh: Mesh, reason: str, times: int = 1) -> Iterator[None]:
    """Check that this many workers die for that reason inside the `with` block, and that the pool recovers."""
    before, ended = Scrape(mesh.dispatcher_metrics), restarts(mesh)
    yield
    wait_until(lambda: restarts(mesh) == ended + times, "restarts are counted")
    wait_until(lambda: is_full(mesh), "every slot has a worker")
    after = Scrape(mesh.dispatcher_metrics)
    assert not after.fell_since(before)
    name = "unlatch_worker_restarts_total"
    grown = {
        found: after.sum(name, reason=found) - before.sum(name, reason=found)
        for found in {labels["reason"] for labels in after.labels(name)}
    }
    assert sum(count for found, count in grown.items() if reason in ("", found)) == times, grown


async def busy(client: Client) -> None:
    """Let every worker end a call, so that replaced ones have proved themselves and starts do not back off."""
    echoes = [client.burns(seconds=0.002) for _ in range(8)]
    assert all(burnt >= 0.002 for burnt in await asyncio.gather(*echoes))


async def fails(call: asyncio.Task[object], reason: str) -> None:
    with pytest.raises(Aborted, match=reason):
        await call


@pytest.mark.parametrize("kernel", ["dies", "dies_replying"])
@pytest.mark.parametrize("how", DEATHS)
async def test_death_in_a_call_fails_that_call(faulty: Mesh, client: Client, kernel: str, how: str) -> None:
    """A worker that dies of its kernel, or with half of its reply written, fails that call alone, with the reason."""
    with replaced(faulty, DEATHS[how]):
        doomed = asyncio.ensure_future(client.call(kernel, fresh(1 << 18), how=how, timeout=5.0))
        # A worker that has said something false may have begun the call staged behind: only a pure one runs again.
        other = client.identity if how in SAID else client.echo
        others = [other(X * factor) for factor in range(50)]
        for factor, y in enumerate(await asyncio.gather(*others)):
            np.testing.assert_array_equal(y, X * factor)
        await fails(doomed, STORIES[how])
    await busy(client)


@pytest.mark.parametrize("how", LIES)
async def test_lie_about_a_reply_ends_the_worker(faulty: Mesh, client: Client, how: str) -> None:
    """A worker that sends a false answer is killed, its call ends ABORTED, and the dispatcher is unharmed."""
    with replaced(faulty, ""):
        await fails(asyncio.ensure_future(client.dies(fresh(), how=how, timeout=5.0)), "worker")
    assert resident_bytes(faulty.dispatcher_service.pid) < 400e6
    await busy(client)


@pytest.mark.parametrize("how", sorted(IDLE_DEATHS))
async def test_death_of_an_idle_worker_fails_nothing(faulty: Mesh, client: Client, gate: GateMaker, how: str) -> None:
    """A worker that dies between calls is replaced, and no call notices."""
    here = gate("idle")
    np.testing.assert_array_equal(await client.dies_idle(X, how=how, gate=str(here)), X)
    await until(lambda: here.reached, "the thread waits")
    # An idle worker takes the closing of its socket for the end of its work.
    with replaced(faulty, "exited" if how == "closes" else DEATHS[how]):
        here.open()
    await busy(client)


@pytest.mark.parametrize("how", [*(how for how in DEATHS if how not in SAID), "from outside"])
async def test_death_fails_no_call_that_was_not_begun(faulty: Mesh, client: Client, gate: GateMaker, how: str) -> None:
    """The call that a dead worker ran ends ABORTED. The staged one, and all others, are answered."""
    first, second = gate("first"), gate("second")
    with replaced(faulty, DEATHS.get(how, "killed")):
        # Ties go to the lowest slot: the staged calls go to the workers in the same order.
        outside = how == "from outside"
        kernel = client.waits(X, gate=str(first)) if outside else client.dies(fresh(), how=how, gate=str(first))
        doomed = asyncio.ensure_future(kernel)
        await until(lambda: first.reached, "the first call runs")
        running = asyncio.ensure_future(client.waits(X, gate=str(second)))
        await until(lambda: second.reached, "the second call runs")
        slots = {f"worker-{slot}": pid for slot, pid in enumerate((first.pid, second.pid))}
        assert len(set(slots.values())) == 2
        others = [asyncio.ensure_future(client.echo(X * factor)) for factor in range(12)]
        await until(lambda: Scrape(faulty.dispatcher_metrics).sum("unlatch_queue_depth") == 10, "the rest waits")
        if outside:
            os.kill(first.pid, signal.SIGKILL)
        else:
            first.open()
        await fails(doomed, "SIGKILL" if outside else STORIES[how])
        second.open()
        np.testing.assert_array_equal(await running, X)
        for factor, y in enumerate(await asyncio.gather(*others)):
            np.testing.assert_array_equal(y, X * factor)
    await busy(client)


@pytest.mark.parametrize("how", DEATHS)
async def test_death_in_its_grace_hurts_nobody(faulty: Mesh, client: Client, gate: GateMaker, how: str) -> None:
    """An abandoned run whose worker dies before it is killed costs one worker."""
    here = gate("here")
    before = Scrape(faulty.dispatcher_metrics).sum("unlatch_calls_total", code="CANCELLED")
    with replaced(faulty, ""):
        doomed = asyncio.ensure_future(client.dies(fresh(), how=how, gate=str(here)))
        await until(lambda: here.reached, "it runs")
        others = [asyncio.ensure_future(client.echo(X * factor)) for factor in range(12)]
        doomed.cancel()
        await until(
            lambda: Scrape(faulty.dispatcher_metrics).sum("unlatch_calls_total", code="CANCELLED") == before + 1,
            "the dispatcher knows",
        )
        # It may be too late for this. Either way it is one end.
        here.open()
        for factor, y in enumerate(await asyncio.gather(*others)):
            np.testing.assert_array_equal(y, X * factor)
    await busy(client)


@pytest.mark.parametrize("kernel", ["doubles", "doubles_once"])
@pytest.mark.parametrize("how", [*SAID, "no output", "negative code"])
async def test_worker_that_lies_may_have_gone_on(
    faulty: Mesh, client: Client, gate: GateMaker, tmp_path: Path, how: str, kernel: str
) -> None:
    """The worker is killed after beginning the staged call, which runs again if it is pure, and otherwise not."""
    first, second, record = gate("first"), gate("second"), tmp_path / "record"
    dispatcher = faulty.dispatcher_service
    with replaced(faulty, ""):
        liar = asyncio.ensure_future(client.lies(fresh(), how=how, gate=str(first)))
        await until(lambda: first.reached, "the first call runs")
        running = asyncio.ensure_future(client.waits(X, gate=str(second)))
        await until(lambda: second.reached, "the second call runs")
        x = fresh()
        staged = asyncio.ensure_future(client.call(kernel, x, record=str(record)))
        others = [asyncio.ensure_future(client.echo(X)) for _ in range(3)]
        await until(
            lambda: Scrape(faulty.dispatcher_metrics).sum("unlatch_queue_depth") == 2, "one is staged behind each"
        )
        # The dispatcher sees the false frame only when the next call has begun.
        dispatcher.signal(signal.SIGSTOP)
        try:
            first.open()
            await until(lambda: record.exists() and record.read_text(), "the staged call has begun")
        finally:
            dispatcher.signal(signal.SIGCONT)
        await fails(liar, "worker")
        if kernel == "doubles":
            np.testing.assert_array_equal(await staged, x * 2.0)
        else:
            await fails(staged, "may have begun the call")
        second.open()
        for y in await asyncio.gather(running, *others):
            np.testing.assert_array_equal(y, X)
    assert len(record.read_text().split()) == (2 if kernel == "doubles" else 1)
    await busy(client)


@pytest.mark.parametrize("how", DEATHS)
async def test_death_while_starting_is_tried_again(faulty: Mesh, client: Client, at_start: Path, how: str) -> None:
    """A replacement that dies before it is ready is replaced in turn, and meanwhile the other worker serves."""
    (at_start / f"{how}.start").touch()
    ended = restarts(faulty)
    await fails(asyncio.ensure_future(client.dies(fresh(), how="exit")), "code 3")
    while (at_start / f"{how}.start").exists() or not is_full(faulty):
        np.testing.assert_array_equal(await client.echo(X), X)
    assert 1 <= restarts(faulty) - ended <= 2
    await busy(client)


async def test_dead_worker_takes_one_call_at_most(faulty: Mesh, client: Client) -> None:
    """Of calls that come while an idle worker dies, the dispatcher gives it one at most before it notices."""
    for _ in range(10):
        victim = Process.of(faulty.workers[-1])
        with replaced(faulty, "killed"):
            os.kill(victim.pid, signal.SIGKILL)
            await until(partial(is_dead, victim), "it is dead")
            calls = [client.echo(X * factor) for factor in range(20)]
            answers = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(answer, Aborted) for answer in answers) <= 1
        await busy(client)


async def test_many_deaths_leave_nothing(faulty: Mesh, client: Client) -> None:
    """After many deaths the dispatcher has the same descriptors and memory as before, and there is no zombie."""
    dispatcher, forkserver = faulty.dispatcher_service.pid, faulty.pids["forkserver"]

    async def deaths(count: int) -> None:
        for number in range(count):
            how = ("sigkill", "sigsegv", "exit", "garbage")[number % 4]
            with replaced(faulty, DEATHS[how]):
                await fails(asyncio.ensure_future(client.dies(fresh(100_000), how=how)), STORIES[how])
            await busy(client)

    await deaths(8)
    files, memory = sorted(descriptors(dispatcher).values()), resident_bytes(dispatcher)
    await deaths(24)
    assert len(descriptors(dispatcher)) <= len(files) + 2, sorted(descriptors(dispatcher).values())
    assert resident_bytes(dispatcher) - memory < 4e6
    wait_until(lambda: not children(dispatcher, zombies=True) and not children(forkserver, zombies=True), "no zombies")


async def test_forkserver_killed(faulty: Mesh, client: Client, gate: GateMaker) -> None:
    """When the forkserver dies its workers go on, calls included. A worker killed later still gets a successor."""
    here = gate("here")
    running = asyncio.ensure_future(client.waits(X, gate=str(here)))
    await until(lambda: here.reached, "a call runs")
    workers, forkserver = set(faulty.workers), faulty.pids["forkserver"]
    processes = [Process.of(pid) for pid in workers]
    before, ended = Scrape(faulty.dispatcher_metrics), restarts(faulty)
    os.kill(forkserver, signal.SIGKILL)
    others = [asyncio.ensure_future(client.echo(X)) for _ in range(20)]
    # One of them is staged behind the call that waits.
    await until(lambda: sum(other.done() for other in others) == 19, "the other worker serves")
    assert len(alive(processes)) == 2
    assert restarts(faulty) == ended
    here.open()
    np.testing.assert_array_equal(await running, X)
    await asyncio.gather(*others)
    await renew(faulty, client, processes)
    assert faulty.pids["forkserver"] != forkserver
    assert not workers & set(faulty.workers)
    assert not Scrape(faulty.dispatcher_metrics).fell_since(before)


async def renew(faulty: Mesh, client: Client, processes: list[Process]) -> None:
    """The workers' parent is gone: only the pidfd tells of their end.

    All die, and the new one runs the next two calls.
    """
    for process in processes:
        ours = process.pid in faulty.workers
        with replaced(faulty, "killed" if ours else "unknown"):
            os.kill(process.pid, signal.SIGKILL)
        await busy(client)
    assert len(faulty.workers) == 2
    assert not children(faulty.dispatcher_service.pid, zombies=True)


@pytest.mark.parametrize("moment", ["start", "fork"])
async def test_forkserver_killed_while_it_starts_a_worker(
    faulty: Mesh, client: Client, at_start: Path, gate: GateMaker, moment: str
) -> None:
    """A forkserver that dies in the middle of a start is replaced, and so is the worker. The other serves meanwhile.

    At the fork it has not reported its child; at the child's start it may have, and then that child serves.
    """
    forkserver = Process.of(faulty.pids["forkserver"])
    (at_start / f"forkserver.{moment}").touch()
    await fails(asyncio.ensure_future(client.dies(fresh(), how="exit")), "code 3")
    while (at_start / f"forkserver.{moment}").exists() or not is_full(faulty):
        np.testing.assert_array_equal(await client.echo(X), X)
    assert not forkserver.alive
    gates = [gate("one"), gate("two")]
    calls = [asyncio.ensure_future(client.waits(X, gate=str(each))) for each in gates]
    await until(lambda: all(each.reached for each in gates), "both workers run a call")
    processes = [Process.of(each.pid) for each in gates]
    for each in gates:
        each.open()
    await asyncio.gather(*calls)
    await renew(faulty, client, processes)
    # A child that was forked, and not reported to the dispatcher, has ended by itself.
    ours = {faulty.pids["forkserver"], *faulty.workers}
    wait_until(lambda: forked(at_start) == ours, "no worker is left that nobody knows")


def forked(mark: Path) -> set[int]:
    """Return the forkservers and workers of meshes whose environment names that directory."""
    found = set()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            process = Process.of(int(name))
            environment = Path(f"/proc/{name}/environ").read_bytes()
            if str(mark).encode() in environment and "worker.forkserver" in process.command and process.alive:
                found.add(process.pid)
    return found


async def test_kernel_that_prints_to_nobody_hangs_alone(faulty: Mesh, client: Client, tmp_path: Path) -> None:
    """Megabytes on an unread stderr stop the kernel that prints them, until its timeout, and no other."""
    record = tmp_path / "prints"
    with faulty.dispatcher_service.unread():
        printing = asyncio.ensure_future(client.prints(fresh(), megabytes=4, record=str(record)))
        await until(record.exists, "it prints")
        for _ in range(4):
            # The dispatcher logs each of these ends to the same stderr.
            with replaced(faulty, "killed"):
                await fails(asyncio.ensure_future(client.dies(fresh(), how="sigkill")), "SIGKILL")
            np.testing.assert_array_equal(await client.echo(X), X)
        assert not printing.done()
        reason = {"reason": "abandoned"}
        before = Scrape(faulty.dispatcher_metrics).sum("unlatch_worker_restarts_total", **reason)
        printing.cancel()
        await until(
            lambda: Scrape(faulty.dispatcher_metrics).sum("unlatch_worker_restarts_total", **reason) == before + 1,
            "it is ended",
        )
    await busy(client)
    with replaced(faulty, "killed"):
        await fails(asyncio.ensure_future(client.dies(fresh(), how="sigkill")), "SIGKILL")


async def test_thread_that_a_kernel_leaves_holds_nobody_up(faulty: Mesh, client: Client, gate: GateMaker) -> None:
    """A thread that goes on after the reply takes turns with later calls, and ends with its worker."""
    here = gate("here")
    np.testing.assert_array_equal(await client.leaves_thread(X, gate=str(here)), X)
    await until(lambda: here.reached, "its thread waits")
    for factor in range(10):
        np.testing.assert_array_equal(await client.echo(X * factor), X * factor)
    host = Process.of(here.pid)
    with replaced(faulty, "terminated"):
        os.kill(host.pid, signal.SIGTERM)
    assert not host.alive
    await busy(client)


@pytest.mark.parametrize("how", ["exit", "sigsegv"])
async def test_child_that_keeps_the_socket_open_hides_no_death(
    faulty: Mesh, client: Client, tmp_path: Path, how: str
) -> None:
    """A worker's end is seen though a child keeps its socket open. That child ends too."""
    record = tmp_path / "child"
    with replaced(faulty, DEATHS[how]):
        doomed = client.leaves_child(fresh(), record=str(record), how=how, timeout=5.0)
        await fails(asyncio.ensure_future(doomed), STORIES[how])
    child = int(await asyncio.to_thread(record.read_text))
    wait_until(lambda: not Path(f"/proc/{child}/exe").exists(), "the child has ended")
    await busy(client)


async def test_child_of_a_kernel_ends_with_its_worker(faulty: Mesh, client: Client, tmp_path: Path) -> None:
    """A process that a kernel has started is killed with its worker."""
    record = tmp_path / "child"
    await client.leaves_child(X, record=str(record))
    child = Process.of(int(record.read_text()))
    assert child.alive
    parent = next(pid for pid in faulty.workers if child.pid in children(pid))
    with replaced(faulty, "killed"):
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
    """A worker can write to no input segment, and can shrink no segment: the system refuses, and calls go on."""
    assert str(await client.tampers(X, how=how)) == repr(SEALED[how].encode())
    np.testing.assert_array_equal(await client.echo(X), X)


async def test_scribbling_worker_spoils_its_own_reply_alone(faulty: Mesh, client: Client) -> None:
    """Noise written over a worker's reply segments while the dispatcher reads them reaches no other reply."""
    with replaced(faulty, "killed"):
        spoilt = asyncio.ensure_future(client.scribbles(megabytes=64, seconds=1.5))
        await until(lambda: Scrape(faulty.dispatcher_metrics).sum("unlatch_worker_busy_seconds_total"), "it runs")
        for factor in range(100):
            y = await client.echo(np.full(1000, float(factor)))
            # The scribbling worker may be the one that answers this, and then the answer may be noise too.
            assert y.shape == (1000,)
        assert (await spoilt).shape == (64 << 17,)
        scribbler = max(faulty.workers, key=lambda pid: Path(f"/proc/{pid}/task").stat().st_nlink)
        os.kill(scribbler, signal.SIGKILL)
    await busy(client)
    np.testing.assert_array_equal(await client.echo(X), X)


@pytest.mark.parametrize("size", [1 << 30, 1 << 46])
async def test_huge_reply_segment_costs_the_dispatcher_nothing(faulty: Mesh, client: Client, size: int) -> None:
    """An enormous reply segment with a valid reply in it is read only as far as the reply goes."""
    x = np.arange(1 << 18, dtype="f8")
    np.testing.assert_array_equal(await client.grows(x, size=size), x)
    assert resident_bytes(faulty.dispatcher_service.pid) < 400e6
    np.testing.assert_array_equal(await client.echo(x), x)


async def test_wrong_call_after_deaths_is_refused_as_ever(client: Client) -> None:
    """The pool that has survived all this still tells a caller's fault from its own."""
    with pytest.raises(InvalidArgument):
        await client.waits(X.astype("c16"), gate="")
