"""Memory of workers: a limit that fails one call alone, replacement that no call notices, and freed memory."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from tests.mesh.faults.conftest import ANY_PORTS, restarts
from tests.mesh.faults.memory_kernels import DECLARED_BYTES
from tests.support.mesh import Mesh, Service, running_mesh
from tests.support.watching import Gate, Process, Scrape, resident_bytes, until
from unlatch import Client
from unlatch.common.errors import InvalidArgument, ResourceExhausted

pytestmark = pytest.mark.asyncio(loop_scope="session")

KERNELS = ("--kernels", str(Path(__file__).with_name("memory_kernels.py")))
MiB = 1024 * 1024
LIMIT_BYTES = 256 * MiB
OF_WORKER = f"worker_memory_bytes={LIMIT_BYTES}"
OF_KERNEL = f"memory={DECLARED_BYTES}"
OVER_LIMIT = "memory_limit_exceeded"
GROWN = "recycled_after_growth"
HAS_RUN = "recycled_after_calls"
EVER = 600.0


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A single worker with a limit: the next call runs on the worker that met the limit, or on its successor.

    Its runs never count as long: a call can be staged behind a run that began long before, on a busy machine.
    """
    flags = (*KERNELS, "--workers", "1", "--worker-memory-bytes", str(LIMIT_BYTES), "--long-call-seconds", "3600")
    with running_mesh(tmp_path_factory.mktemp("limited"), dispatcher=flags) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def client(limited: Mesh) -> AsyncIterator[Client]:
    """A client of the mesh with the limit."""
    async with Client(limited.gateway, timeout=30.0) as opened:
        yield opened


async def pid_of(client: Client) -> int:
    return int(await client.own_pid())


async def fresh(mesh: Mesh, client: Client) -> int:
    """Replace the worker, whose heap earlier calls have fragmented; return the new one's pid."""
    killed = Process.of(await pid_of(client))
    os.kill(killed.pid, signal.SIGKILL)
    await until(lambda: not killed.alive and Scrape(mesh.dispatcher_metrics).sum("unlatch_worker_up"), "it is replaced")
    return await pid_of(client)


def taken_bytes(mesh: Mesh) -> float:
    return Scrape(mesh.dispatcher_metrics).sum("unlatch_worker_memory_bytes")


@asynccontextmanager
async def replaced(mesh: Mesh, client: Client, reason: str) -> AsyncIterator[None]:
    """Check that the only worker is replaced for that reason alone, and that its successor serves."""
    before, all_before, pid = restarts(mesh, reason), restarts(mesh), await pid_of(client)
    yield
    await until(lambda: restarts(mesh, reason) == before + 1, "the worker is replaced")
    assert restarts(mesh) == all_before + 1
    assert await pid_of(client) != pid


@pytest.mark.parametrize(
    ("kernel", "megabytes", "limit"),
    [
        ("allocates", 300, OF_WORKER),
        ("fills", None, OF_WORKER),
        ("declares", 40, OF_KERNEL),
        ("declares", 300, OF_KERNEL),
    ],
    ids=["one array", "small objects", "declared", "declared, over both"],
)
async def test_run_that_needs_too_much_fails_alone(
    limited: Mesh, client: Client, kernel: str, megabytes: int | None, limit: str
) -> None:
    """The call ends RESOURCE_EXHAUSTED with the limit. The same worker serves the next call, which needs much too."""
    pid, before = await pid_of(client), restarts(limited)
    arguments = {} if megabytes is None else {"megabytes": megabytes}
    for _ in range(3):
        with pytest.raises(ResourceExhausted, match=f"(?m)^kernel {kernel} needed more memory than .*: {limit}$"):
            await client.call(kernel, **arguments)
        assert int(await client.allocates(megabytes=100)) == pid
    assert restarts(limited) == before


async def test_call_that_needs_too_much_fails_alone_among_several(
    limited: Mesh, client: Client, gate: Callable[[str], Gate]
) -> None:
    """Of calls that ran as one and were refused memory together, only the one that needs too much fails."""
    await fresh(limited, client)
    here = gate("here")
    waiting = asyncio.ensure_future(client.waits(gate=str(here)))
    await until(lambda: here.reached, "the worker is taken")
    calls = [asyncio.ensure_future(client.allocates_together(np.array([size]))) for size in (50.0, 300.0, 60.0, 70.0)]
    # The first is staged, and runs alone.
    await until(lambda: Scrape(limited.dispatcher_metrics).sum("unlatch_queue_depth") == 3, "the others wait")
    here.open()
    await waiting
    _, large, *_ = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(large, ResourceExhausted)
    assert OF_WORKER in str(large)
    assert [float((await calls[index])[0]) for index in (0, 2, 3)] == [50.0, 60.0, 70.0]
    # One alone, three together, and each of the three alone.
    scrape = Scrape(limited.dispatcher_metrics)
    assert scrape.sum("unlatch_batch_calls_sum") == 1 + 3 + 3
    assert scrape.sum("unlatch_batch_calls_count") == 1 + 1 + 3


async def test_error_holds_no_memory(limited: Mesh, client: Client) -> None:
    """Memory that a kernel had in use when it raised is free for the next run."""
    await fresh(limited, client)
    for _ in range(5):
        with pytest.raises(InvalidArgument, match="all 13107200 of them"):
            await client.refuses(megabytes=100)


async def test_declared_memory_bounds_a_run_whatever_ran_before(limited: Mesh, client: Client) -> None:
    """A run within its declaration is served and one beyond it is refused, also on a worker that keeps freed memory."""
    await fresh(limited, client)
    for _ in range(3):
        await client.declares(megabytes=DECLARED_BYTES // MiB)
        await client.allocates(megabytes=150)
        with pytest.raises(ResourceExhausted, match=OF_KERNEL):
            await client.declares(megabytes=40)


async def test_run_that_goes_around_the_limit_loses_its_worker(
    limited: Mesh, client: Client, gate: Callable[[str], Gate], tmp_path: Path
) -> None:
    """RssAnon counts what RLIMIT_DATA does not: the call ends RESOURCE_EXHAUSTED, and runs once though it is pure."""
    record, here = tmp_path / "runs", gate("here")
    await fresh(limited, client)
    async with replaced(limited, client, OVER_LIMIT):
        call = asyncio.ensure_future(client.escapes(megabytes=320, seconds=EVER, record=str(record), gate=str(here)))
        await until(lambda: here.reached and taken_bytes(limited) > 60 * MiB, "the dispatcher has looked at this run")
        here.open()
        with pytest.raises(ResourceExhausted, match=f"(?m)^kernel escapes took [0-9]+ bytes of memory, .*{OF_WORKER}$"):
            await call
    assert len(record.read_text().split()) == 1


async def test_run_is_not_blamed_for_what_another_has_left(
    limited: Mesh, client: Client, gate: Callable[[str], Gate]
) -> None:
    """The call behind the one that went around the limit is answered, whether that was noticed in time or not."""
    first, second = gate("first"), gate("second")
    before = restarts(limited, OVER_LIMIT)
    guilty = asyncio.ensure_future(client.escapes(megabytes=320, seconds=0.0, gate=str(first)))
    await until(lambda: first.reached, "it runs")
    innocent = asyncio.ensure_future(client.waits(gate=str(second)))
    await until(lambda: Scrape(limited.gateway_metrics).sum("unlatch_calls_in_flight") == 2, "the other has come")
    first.open()
    await until(lambda: second.reached, "the other runs")
    await until(
        lambda: restarts(limited, OVER_LIMIT) > before or taken_bytes(limited) > 1.1 * LIMIT_BYTES, "it is caught"
    )
    second.open()
    assert int(await innocent) > 0
    with suppress(ResourceExhausted):
        assert int(await guilty) > 0
    await until(lambda: restarts(limited, OVER_LIMIT) == before + 1, "its worker is replaced")


async def test_worker_that_cannot_shrink_is_replaced_between_calls(limited: Mesh, client: Client) -> None:
    """A call leaves the worker over the limit: the call is answered, and the worker is replaced."""
    await fresh(limited, client)
    async with replaced(limited, client, OVER_LIMIT):
        await client.escapes(megabytes=272, seconds=0.0)


async def test_worker_that_keeps_most_of_its_limit_is_replaced_when_it_runs_short(
    limited: Mesh, client: Client
) -> None:
    """A leak would fail every later call: the one that met the limit is the last."""
    await client.keeps(megabytes=150)
    assert int(await client.allocates(megabytes=80)) == await pid_of(client)
    async with replaced(limited, client, OVER_LIMIT):
        with pytest.raises(ResourceExhausted, match=OF_WORKER):
            await client.allocates(megabytes=120)
    await client.allocates(megabytes=200)


async def test_idle_worker_gives_memory_back(limited: Mesh, client: Client) -> None:
    """Seconds after its last call a worker has no more memory than at first, and goes on serving."""
    pid = await fresh(limited, client)
    before = resident_bytes(pid)
    await client.allocates(megabytes=200)
    assert resident_bytes(pid) - before > 150 * MiB
    await until(lambda: resident_bytes(pid) - before < 20 * MiB, "the memory is back")
    await until(lambda: taken_bytes(limited) < 20 * MiB, "the dispatcher has seen it")
    assert Scrape(limited.dispatcher_metrics).sum("unlatch_worker_memory_limit_bytes") == LIMIT_BYTES
    assert int(await client.allocates(megabytes=200)) == pid


@pytest.mark.parametrize(
    ("flag", "bound", "reason"),
    [("--recycle-growth-bytes", 32 * MiB, GROWN), ("--recycle-calls", 100, HAS_RUN)],
    ids=["growth", "calls"],
)
async def test_recycling_under_load_hurts_no_call(tmp_path: Path, flag: str, bound: int, reason: str) -> None:
    """With a leaking kernel at saturation workers are replaced, one at a time, and every call is answered."""
    with running_mesh(tmp_path, dispatcher=[*KERNELS, "--workers", "2", flag, str(bound)]) as mesh:
        first = [Process.of(pid) for pid in mesh.workers]
        calls = 0
        async with Client(mesh.gateway, timeout=30.0) as client:

            async def caller() -> None:
                nonlocal calls
                while restarts(mesh, reason) < 4 or any(process.alive for process in first):
                    assert Scrape(mesh.dispatcher_metrics).sum("unlatch_worker_up") >= 1
                    for _ in range(20):
                        assert int(await client.keeps(megabytes=0.125)) > 0
                        calls += 1

            await asyncio.gather(*(caller() for _ in range(8)))
            await until(lambda: Scrape(mesh.dispatcher_metrics).sum("unlatch_worker_up") == 2, "the pool is full")
        scrape = Scrape(mesh.dispatcher_metrics)
        name = "unlatch_worker_restarts_total"
        # Both from one scrape: another worker may be recycled at any moment.
        assert scrape.sum(name) == scrape.sum(name, reason=reason)
        assert scrape.sum("unlatch_worker_calls_total", kernel="keeps", outcome="ok") == calls
        assert scrape.sum("unlatch_calls_total", kernel="keeps", code="OK") == calls
        assert not any("calls_lost" in entry and entry["calls_lost"] for entry in mesh.dispatcher_service.entries)


async def test_kernel_that_declares_more_than_a_worker_has_is_not_served(tmp_path: Path) -> None:
    """The start is refused, with both numbers."""
    limit = ("--worker-memory-bytes", str(DECLARED_BYTES - MiB))
    listen = ("--listen", f"unix:{tmp_path / 'dispatcher.sock'}")
    with Service("compute", *listen, *ANY_PORTS, *KERNELS, *limit) as dispatcher:
        assert dispatcher.wait() == 2
        says = f"kernel declares declares memory={DECLARED_BYTES}, but a worker may have worker_memory_bytes="
        assert says in dispatcher.lines[-1]
