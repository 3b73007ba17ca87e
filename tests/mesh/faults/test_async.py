"""Async workers: many calls at once, and what a cancel, a fault or a death does to one of them and to the others."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
import pytest_asyncio

from tests.support.doors import arrays_of, vector
from tests.support.mesh import MESHES as KINDS
from tests.support.mesh import ROOT, Mesh, Service
from tests.support.watching import Scrape, until
from unlatch import Client
from unlatch.common.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
)
from unlatch.protos.inference_pb2 import ModelInferResponse

pytestmark = pytest.mark.asyncio(loop_scope="session")

KERNELS = ROOT / "tests" / "support" / "async_kernels.py"
X = np.arange(3.0)


@pytest.fixture(scope="module", params=["apart", "unit"])
def waiting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh that serves the async kernels. It must survive every fault, and end cleanly."""
    flags = ["--kernels", str(KERNELS), "--worker-memory-bytes", str(2**30)]
    with KINDS[request.param](tmp_path_factory.mktemp("async"), dispatcher=flags) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def client(waiting: Mesh) -> AsyncIterator[Client]:
    """A client of the mesh."""
    async with Client(waiting.gateway, timeout=30.0) as opened:
        yield opened


def flags_in(directory: Path) -> list[str]:
    """Return the flags of a compute service with one worker and the async kernels."""
    listen = ["--listen", f"unix:{directory}/compute", "--metrics-listen", "127.0.0.1:0"]
    return [*listen, "--health-listen", "127.0.0.1:0", "--workers", "1", "--kernels", str(KERNELS)]


async def pid_of(client: Client) -> int:
    """Return the pid of the async worker."""
    return int(await client.call("async_pid"))


async def lines(record: Path, count: int, what: str = "") -> None:
    """Wait until a file has this many lines that contain `what`."""

    def there() -> bool:
        found = record.read_text().splitlines() if record.exists() else []
        return sum(what in line for line in found) >= count

    await until(there, f"{count} lines {what!r} in {record.name}")


async def ended(waiting: Mesh) -> None:
    """Wait until the async worker has no call, and all workers are up."""
    scraped = waiting.dispatcher_metrics
    await until(lambda: Scrape(scraped).sum("unlatch_worker_calls_in_flight") == 0, "no call runs")
    await until(lambda: Scrape(scraped).sum("unlatch_worker_up") == 3, "all workers are up")


async def test_calls_wait_beside_one_another(client: Client) -> None:
    """Calls of 0.5 s that would take 100 s one after another are answered within their 10 s."""
    calls = [client.call("waits_once", X * factor, seconds=0.5, timeout=10.0) for factor in range(200)]
    for factor, y in enumerate(await asyncio.gather(*calls)):
        np.testing.assert_array_equal(y, X * factor * 3)


async def test_worker_runs_no_more_calls_than_the_kernel_allows(client: Client) -> None:
    """Of a kernel with `concurrency=4`, four calls run at once and never five, however many come."""
    most = await asyncio.gather(*(client.call("at_most_four", seconds=0.05) for _ in range(40)))
    assert max(map(int, most)) == 4


@pytest.mark.parametrize("count", [0, 1, 2048, 2049, 300_000, 4 << 20])
async def test_results_of_any_size(client: Client, count: int) -> None:
    """Replies come whole, whether they fit in a frame (16 KiB) or need a segment, and many of them at once."""
    sent = [np.arange(count) + factor for factor in range(4)]
    for x, y in zip(sent, await asyncio.gather(*(client.call("returns", x) for x in sent)), strict=True):
        np.testing.assert_array_equal(y, x)


async def test_several_outputs(client: Client) -> None:
    """A result of several arrays, one of byte strings."""
    found = await client.call("pairs", X)
    np.testing.assert_array_equal(found.twice, X * 2)
    assert found.names.tolist() == [b"0.0", b"1.0", b"2.0"]


@pytest.mark.parametrize("count", [100, 4096, 500_000])
async def test_array_that_calls_share(client: Client, count: int) -> None:
    """A reply has the array as it was when the coroutine returned, whatever other calls write to it then."""
    sent = [np.full(count, float(number)) for number in range(12)]
    for x, y in zip(sent, await asyncio.gather(*(client.call("shares", x) for x in sent)), strict=True):
        np.testing.assert_array_equal(y, x)


async def test_timer_that_cancels_a_call_that_has_returned(client: Client) -> None:
    """A reply is written to its end, even if something in the worker cancels its task meanwhile."""
    for number in range(60):
        x = np.full(1_000_000, float(number))
        one, other = client.call("leaves_a_timer", x, seconds=number * 0.0002), client.call("returns", -x)
        y, z = await asyncio.gather(one, other, return_exceptions=True)
        if not isinstance(y, Internal):  # cancelled before it had returned
            np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(z, -x)


async def test_kernel_that_ends_the_loops_threads(client: Client) -> None:
    """Large replies need no thread that a kernel can end."""
    await client.call("ends_the_loops_threads")
    x = np.arange(500_000.0)
    np.testing.assert_array_equal(await client.call("returns", x), x)


async def test_worker_without_a_file_descriptor(waiting: Mesh, client: Client) -> None:
    """A worker that cannot take a segment for lack of descriptors ends. The call that needed it runs again."""
    x = np.arange(700_000.0)
    eats = asyncio.ensure_future(client.call("opens_all_files", seconds=1.0))
    await asyncio.sleep(0.5)
    for factor in range(3):
        np.testing.assert_array_equal(await client.call("returns", x * factor), x * factor)
    await asyncio.gather(eats, return_exceptions=True)
    np.testing.assert_array_equal(await client.call("returns", x), x)
    await ended(waiting)


async def test_signatures_of_all_forms(client: Client) -> None:
    """Choices, lists and optional arrays reach a coroutine as they reach any kernel."""
    np.testing.assert_array_equal(await client.call("scaled", X), X)
    np.testing.assert_array_equal(await client.call("scaled", X, by=10, add=[0.5, 1.5]), X * 10 + 2)
    np.testing.assert_array_equal(await client.call("scaled", X, X, by=10), X * X * 10)


async def test_clients_of_the_protocol(waiting: Mesh) -> None:
    """A client of the Open Inference Protocol calls an async kernel like any other."""
    async with grpc.aio.insecure_channel(waiting.gateway) as channel:
        infer: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        answer = await infer(vector("waits", *X).SerializeToString())
    (y,) = arrays_of(ModelInferResponse.FromString(answer))
    np.testing.assert_array_equal(y, X * 2)


FAULTS = {
    "refuses": (InvalidArgument, "x: wanted another vector"),
    "raises": (Internal, "kernel misbehaves failed"),
    "cancels itself": (Internal, "kernel misbehaves failed"),
    "exits": (Internal, "kernel misbehaves failed"),
    "shape": (Internal, "returned shape"),
    "writes": (Internal, "inputs are read-only"),
    "nothing": (Internal, "returned a NoneType"),
    "memory": (ResourceExhausted, "needed more memory than a worker may have"),
}


@pytest.mark.parametrize("how", FAULTS)
async def test_fault_fails_its_call_alone(waiting: Mesh, client: Client, how: str) -> None:
    """A coroutine that raises, or returns what it must not, fails its own call. The calls beside it are answered."""
    before = await pid_of(client)
    beside = [client.call("waits_once", X * factor, seconds=0.2) for factor in range(20)]
    kind, told = FAULTS[how]

    async def fails() -> None:
        with pytest.raises(kind, match=told) as raised:
            await client.call("misbehaves", X, how=how)
        assert "secret" not in str(raised.value)

    *answers, _ = await asyncio.gather(*beside, fails())
    for factor, y in enumerate(answers):
        np.testing.assert_array_equal(y, X * factor * 3)
    assert await pid_of(client) == before, str(waiting)
    await ended(waiting)


async def test_cancelled_coroutine_sees_it(waiting: Mesh, client: Client, tmp_path: Path) -> None:
    """When its caller leaves, or its deadline passes, the coroutine sees CancelledError. Its worker stays."""
    before = await pid_of(client)
    record = tmp_path / "record"
    left = asyncio.ensure_future(client.call("notices", record=str(record)))
    await lines(record, 1)
    left.cancel()
    await lines(record, 1, "cancelled True")
    with pytest.raises(DeadlineExceeded):
        await client.call("notices", record=str(record), timeout=0.5)
    await lines(record, 2, "cancelled True")
    await ended(waiting)
    assert await pid_of(client) == before, str(waiting)


async def test_many_cancels_free_their_places(waiting: Mesh, client: Client, tmp_path: Path) -> None:
    """500 callers who leave at once free 500 places. The calls that stay are answered."""
    before = await pid_of(client)
    record = tmp_path / "record"
    leaving = [
        asyncio.ensure_future(client.call("waits_once", X, seconds=3600.0, record=str(record), timeout=None))
        for _ in range(500)
    ]
    await lines(record, 500)
    staying = [client.call("waits_once", X * factor) for factor in range(50)]
    for call in leaving:
        call.cancel()
    for factor, y in enumerate(await asyncio.gather(*staying)):
        np.testing.assert_array_equal(y, X * factor * 3)
    await ended(waiting)
    assert await pid_of(client) == before, str(waiting)


async def test_coroutine_that_swallows_a_cancel_loses_its_worker(waiting: Mesh, client: Client, tmp_path: Path) -> None:
    """After the grace its worker is killed. Pure calls beside it run again, others end ABORTED, the next are served."""
    before = await pid_of(client)
    record, beside = tmp_path / "record", tmp_path / "beside"
    swallowing = asyncio.ensure_future(client.call("swallows", record=str(record)))
    pure = [asyncio.ensure_future(client.call("waits", X * f, seconds=1.0, record=str(beside))) for f in range(10)]
    once = [asyncio.ensure_future(client.call("waits_once", X, seconds=60.0, record=str(beside))) for _ in range(10)]
    await lines(record, 1)
    await lines(beside, 20)
    swallowing.cancel()
    for factor, y in enumerate(await asyncio.gather(*pure)):
        np.testing.assert_array_equal(y, X * factor * 2)
    for lost in await asyncio.gather(*once, return_exceptions=True):
        assert isinstance(lost, Aborted)
        assert "the worker ran a call that no caller waited for" in lost.message
    assert await pid_of(client) != before
    await ended(waiting)


async def test_coroutine_that_blocks_is_told(waiting: Mesh, client: Client) -> None:
    """A coroutine that blocks its event loop for more than 100 ms is counted, and logged with its line."""
    name, service = "unlatch_worker_loop_blocked_total", waiting.dispatcher_service
    before, after = Scrape(waiting.dispatcher_metrics).sum(name), len(service.lines)
    await client.call("blocks", seconds=0.5)
    entry = service.wait_for("coroutine blocks its event loop", after=after, kernel="blocks")
    file, line, _ = entry["place"].replace(" in ", ":").split(":")
    assert Path(file) == KERNELS
    assert "time.sleep(seconds)" in KERNELS.read_text().splitlines()[int(line) - 1]
    assert Scrape(waiting.dispatcher_metrics).sum(name) == before + 1


async def test_coroutine_that_never_yields_costs_its_worker(waiting: Mesh, client: Client, tmp_path: Path) -> None:
    """When a call beside it cannot be cancelled, its worker is killed. It fails, and pure calls beside it run again."""
    before = await pid_of(client)
    record, beside = tmp_path / "record", tmp_path / "beside"
    leaving = asyncio.ensure_future(client.call("waits", X, seconds=60.0, record=str(beside)))
    pure = [asyncio.ensure_future(client.call("waits", X * f, seconds=2.0, record=str(beside))) for f in range(1, 9)]
    await lines(beside, 9)
    after = len(waiting.dispatcher_service.lines)
    blocking = asyncio.ensure_future(client.call("blocks", seconds=3600.0, record=str(record)))
    await lines(record, 1)
    waiting.dispatcher_service.wait_for("coroutine blocks its event loop", after=after)
    leaving.cancel()
    with pytest.raises(Internal, match="kernel blocks blocked the event loop of its worker"):
        await blocking
    for factor, y in enumerate(await asyncio.gather(*pure), start=1):
        np.testing.assert_array_equal(y, X * factor * 2)
    assert await pid_of(client) != before
    await ended(waiting)


async def test_caller_of_a_coroutine_that_blocks_may_leave(waiting: Mesh, client: Client, tmp_path: Path) -> None:
    """The core of a coroutine that never yields is freed when its caller leaves, as of any other kernel."""
    before = await pid_of(client)
    record = tmp_path / "record"
    after = len(waiting.dispatcher_service.lines)
    blocking = asyncio.ensure_future(client.call("blocks", seconds=3600.0, record=str(record)))
    await lines(record, 1)
    waiting.dispatcher_service.wait_for("coroutine blocks its event loop", after=after)
    blocking.cancel()
    # No call is given to a worker whose loop is blocked, so this one waits for the next worker.
    assert await pid_of(client) != before
    await ended(waiting)


@pytest.mark.parametrize("how", ["exit", "segfault", "kill", "child exits", "loop stops"])
async def test_death_beside_others(waiting: Mesh, client: Client, tmp_path: Path, how: str) -> None:
    """A call that kills its workers is found and refused. Pure calls beside it are answered, however often it kills."""
    record, beside = tmp_path / "record", tmp_path / "beside"
    pure = [asyncio.ensure_future(client.call("waits", X * f, seconds=0.3, record=str(beside))) for f in range(20)]
    once = [asyncio.ensure_future(client.call("waits_once", X, seconds=60.0, record=str(beside))) for _ in range(5)]
    await lines(beside, 25)
    with pytest.raises(FailedPrecondition, match="2 workers ended while they ran this call"):
        await client.call("dies", X + hash(how), how=how, record=str(record))
    for factor, y in enumerate(await asyncio.gather(*pure)):
        np.testing.assert_array_equal(y, X * factor * 2)
    for lost in await asyncio.gather(*once, return_exceptions=True):
        assert isinstance(lost, Aborted)
    # Twice beside all others, then in companies of at most 11, 6, 3, 2 and 1 calls, and once more alone.
    assert len(record.read_text().splitlines()) <= 8
    await ended(waiting)


async def test_worker_killed_again_and_again_from_outside(waiting: Mesh, client: Client) -> None:
    """Calls that only happen to be there when workers die are never refused for that."""

    async def keeps_calling(caller: int) -> int:
        answered = 0
        for number in range(20):
            # No two calls are equal: equal ones would share a run.
            x = X + 100 * caller + number
            np.testing.assert_array_equal(await client.call("waits", x, seconds=0.1), x * 2)
            answered += 1
        return answered

    async def keeps_killing() -> None:
        for _ in range(6):
            await asyncio.sleep(0.25)
            os.kill(await pid_of(client), signal.SIGKILL)

    *answered, _ = await asyncio.gather(*map(keeps_calling, range(20)), keeps_killing())
    assert answered == [20] * 20
    await ended(waiting)


async def test_kernels_timeout_ends_its_run(waiting: Mesh, client: Client) -> None:
    """A run that reaches its kernel's timeout ends DEADLINE_EXCEEDED. The worker, and the calls beside it, stay."""
    before = await pid_of(client)
    beside = asyncio.ensure_future(client.call("waits_once", X, seconds=1.0))
    with pytest.raises(DeadlineExceeded, match=r"longer than its timeout of 0\.3 s"):
        await client.call("limited", seconds=3600.0)
    np.testing.assert_array_equal(await beside, X * 3)
    assert await pid_of(client) == before, str(waiting)
    await ended(waiting)


async def test_setups_run_once_in_each_worker(client: Client) -> None:
    """An async worker runs all setups of the module in their order, and any other worker the plain ones."""
    assert (await client.call("hooks_of_async_worker")).tolist() == [b"async setup", b"plain setup"]
    for _ in range(4):
        assert (await client.call("hooks_of_plain_worker")).tolist() == [b"plain setup"]


async def test_async_worker_loads_no_grpc(client: Client) -> None:
    """The modules of an async worker are those of an event loop, and none of gRPC, metrics or protobuf."""
    names = {name.split(b".")[0] for name in (await client.call("async_module_names")).tolist()}
    assert b"uvloop" in names
    assert not names & {b"grpc", b"google", b"prometheus_client", b"structlog"}


@pytest.mark.parametrize("kind", ["apart", "unit"])
async def test_stop_answers_calls_and_runs_teardowns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A service that is told to stop answers its calls first. Then each worker runs its teardowns, from the last."""
    hooks, record = tmp_path / "hooks", tmp_path / "record"
    monkeypatch.setenv("HOOKS_RECORD", str(hooks))
    with KINDS[kind](tmp_path, dispatcher=["--kernels", str(KERNELS)]) as mesh:
        async with Client(mesh.gateway, timeout=30.0) as caller:
            pid = await pid_of(caller)
            calls = [
                asyncio.ensure_future(caller.call("waits_once", X, seconds=1.0, record=str(record))) for _ in range(5)
            ]
            await lines(record, 5)
            mesh.dispatcher_service.signal(signal.SIGTERM)
            for y in await asyncio.gather(*calls):
                np.testing.assert_array_equal(y, X * 3)
        mesh.dispatcher_service.wait()
    noted = hooks.read_text().splitlines()
    of_async = [line.removesuffix(f" {pid}") for line in noted if line.endswith(f" {pid}")]
    assert of_async == ["async setup", "plain setup", "async teardown", "plain teardown"]
    assert sum("plain teardown" in line for line in noted) == 3


async def test_setup_that_fails_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service whose setup raises does not start, and says in which line."""
    monkeypatch.setenv("HOOKS_FAIL", "1")
    flags = (
        "--listen",
        f"unix:{tmp_path}/compute",
        "--metrics-listen",
        "127.0.0.1:0",
        "--health-listen",
        "127.0.0.1:0",
    )
    with Service("compute", *flags, "--workers", "1", "--kernels", str(KERNELS)) as service:
        assert service.wait() != 0
        line = next(
            number for number, text in enumerate(KERNELS.read_text().splitlines(), 1) if "ConnectionError(" in text
        )
        assert f"{KERNELS}:{line}: ConnectionError: no such host (in connect)" in str(service)


async def test_no_async_workers(tmp_path: Path) -> None:
    """A service that is to have no async worker does not start with an async kernel, and names both."""
    flags = (
        "--listen",
        f"unix:{tmp_path}/compute",
        "--metrics-listen",
        "127.0.0.1:0",
        "--health-listen",
        "127.0.0.1:0",
    )
    with Service("compute", *flags, "--workers", "1", "--kernels", str(KERNELS), "--async-workers", "0") as service:
        assert service.wait() != 0
        assert "async_workers: kernel" in str(service)
