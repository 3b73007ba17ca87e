"""Identical calls of a pure kernel share a run: each caller gets its own answer, and none affects the others."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import pytest_asyncio

from tests.conftest import StartMesh
from tests.mesh.faults.conftest import FAULT_KERNELS
from tests.mesh.faults.test_losses import left_in
from tests.support.doors import arrays_of, request
from tests.support.mesh import Mesh, running_mesh
from tests.support.watching import Gate, Scrape, until
from unlatch import Client
from unlatch.common.errors import DeadlineExceeded, InvalidArgument
from unlatch.protos.inference_pb2 import ModelInferRequest, ModelInferResponse

pytestmark = pytest.mark.asyncio(loop_scope="session")

SHARED = "unlatch_coalesced_calls_total"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh of two workers, whose gateway has not learned yet how long kernels run."""
    with running_mesh(tmp_path_factory.mktemp("coalescing"), dispatcher=["--kernels", str(FAULT_KERNELS)]) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def client(mesh: Mesh) -> AsyncIterator[Client]:
    """A client of this mesh."""
    async with Client(mesh.gateway, timeout=60.0) as opened:
        yield opened


async def learned(client: Client, kernel: str, size: int) -> None:
    """Let the gateway learn that this kernel takes half a second for this many values."""
    await client.call(kernel, np.full(size, -1.0), seconds=0.5)


async def learned_to_wait(client: Client, size: int, directory: Path) -> None:
    """Let the gateway learn that the kernel that waits for a file takes long for this many values."""
    there, record = directory / "first there", directory / "first record"
    x = np.full(size, -1.0)
    call = asyncio.create_task(client.call("repeats_when", x, times=2, there=str(there), record=str(record)))
    await until(lambda: left_in(record), "it has begun")
    await asyncio.sleep(0.5)
    there.touch()
    await call


@asynccontextmanager
async def held(client: Client, gate: Callable[[str], Gate]) -> AsyncIterator[None]:
    """Hold both workers inside the `with` block: no run ends before all calls have come."""
    gates = [gate("one"), gate("two")]
    calls = [asyncio.ensure_future(client.waits(np.zeros(1), gate=str(each))) for each in gates]
    await until(lambda: all(each.reached for each in gates), "both workers are held")
    yield
    for each in gates:
        each.open()
    await asyncio.gather(*calls)


def shared(mesh: Mesh, kernel: str = "doubles") -> float:
    return Scrape(mesh.gateway_metrics).sum(SHARED, kernel=kernel)


def runs(mesh: Mesh, kernel: str = "doubles") -> float:
    """Return the number of runs by the workers' own count."""
    return Scrape(mesh.dispatcher_metrics).sum("unlatch_worker_calls_total", kernel=kernel)


async def test_identical_calls_cost_one_run(mesh: Mesh, client: Client, gate: Callable[[str], Gate]) -> None:
    """64 calls through both doors are one run and 64 answers, each with its own id."""
    x = np.arange(1.0, 101.0)
    await learned(client, "doubles", x.size)
    ran, joined = runs(mesh), shared(mesh)
    message = request("doubles", {"x": x}, seconds=0.5)

    async with grpc.aio.insecure_channel(mesh.gateway) as channel:
        rpc: Any = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=ModelInferRequest.SerializeToString,
            response_deserializer=ModelInferResponse.FromString,
        )

        async def infer(number: int) -> ModelInferResponse:
            own = ModelInferRequest()
            own.CopyFrom(message)
            own.id = f"call {number}"
            answer: ModelInferResponse = await rpc(own)
            return answer

        async with held(client, gate):
            by_oip = [asyncio.create_task(infer(number)) for number in range(32)]
            by_lane = [asyncio.create_task(client.call("doubles", x, seconds=0.5)) for _ in range(32)]
            await until(lambda: shared(mesh) - joined == 63, "all share a run")
        for number, response in enumerate(await asyncio.gather(*by_oip)):
            assert response.id == f"call {number}"
            np.testing.assert_array_equal(arrays_of(response)[0], x * 2.0)
        for y in await asyncio.gather(*by_lane):
            np.testing.assert_array_equal(y, x * 2.0)
    assert runs(mesh) - ran == 1
    assert shared(mesh) - joined == 63


async def test_large_calls_are_told_apart_by_their_last_byte(
    mesh: Mesh, client: Client, gate: Callable[[str], Gate]
) -> None:
    """Tensors that come in pieces share a run if they are equal, and the reply's pieces go to every caller."""
    x = np.arange(2.0**18)
    other = x.copy()
    other[-1] += 1.0
    await learned(client, "doubles", x.size)
    ran, joined = runs(mesh), shared(mesh)
    async with held(client, gate):
        calls = [asyncio.create_task(client.call("doubles", each, seconds=0.5)) for each in (x, other, x, other, x)]
        await until(lambda: shared(mesh) - joined == 3, "those that are equal share a run")
    for each, y in zip((x, other, x, other, x), await asyncio.gather(*calls), strict=True):
        assert np.array_equal(y, each * 2.0)
    assert runs(mesh) - ran == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda message: message.parameters["seconds"].MergeFrom(type(message.parameters["seconds"])(double_param=0.51)),
        lambda message: message.inputs[0].shape.__setitem__(0, 1),
        lambda message: setattr(message, "model_version", "1"),
        lambda message: message.outputs.add(name="output0"),
    ],
    ids=["parameter", "shape", "version", "outputs"],
)
async def test_what_is_not_the_same_does_not_share(
    change: Callable[[ModelInferRequest], None], mesh: Mesh, client: Client
) -> None:
    """Every field of a call counts, except its id."""
    x = np.array([3.0, 3.0])
    await learned(client, "doubles", x.size)
    message, changed = (request("doubles", {"x": x}, seconds=0.5) for _ in range(2))
    change(changed)
    before = shared(mesh)
    async with grpc.aio.insecure_channel(mesh.gateway) as channel:
        rpc: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        one, two = rpc(message.SerializeToString()), rpc(changed.SerializeToString())
        await one
        # A refused call was not identical either.
        with suppress(grpc.aio.AioRpcError):
            await two
    assert shared(mesh) == before


async def test_kernels_that_are_not_pure_share_nothing(mesh: Mesh, client: Client, tmp_path: Path) -> None:
    """Each call of a kernel that is not pure runs, and so does each of a kernel whose runs are short."""
    await learned(client, "doubles_once", 1)
    record, x = tmp_path / "record", np.array([7.0])
    calls = [client.call("doubles_once", x, seconds=0.1, record=str(record)) for _ in range(4)]
    await asyncio.gather(*calls)
    assert left_in(record) == {7.0: 4}


async def test_one_who_leaves_spoils_it_for_nobody(mesh: Mesh, client: Client, tmp_path: Path) -> None:
    """The first caller leaves, and another's time runs out: the others are answered by the same run."""
    x, record, there = np.array([11.0]), tmp_path / "record", tmp_path / "there"
    before = shared(mesh, "repeats_when")

    def call(**given: float) -> asyncio.Task[Any]:
        calling = client.call("repeats_when", x, times=2, there=str(there), record=str(record), **given)
        return asyncio.create_task(calling)

    await learned_to_wait(client, x.size, tmp_path)
    first = call()
    await until(lambda: left_in(record), "it has begun")
    hurried, patient = call(timeout=2.0), call()
    await until(lambda: shared(mesh, "repeats_when") == before + 2, "the others share its run")
    first.cancel()
    with pytest.raises(DeadlineExceeded):
        await hurried
    there.touch()
    np.testing.assert_array_equal(await patient, np.tile(x, 2))
    assert left_in(record) == {11.0: 1}


async def test_when_all_have_left_the_core_is_free(start_mesh: StartMesh, tmp_path: Path) -> None:
    """When the last caller leaves, the run is cancelled at the worker."""
    mesh = start_mesh(dispatcher=["--kernels", str(FAULT_KERNELS), "--workers", "1", "--kill-grace-seconds", "0.1"])
    x, record = np.array([13.0]), tmp_path / "record"
    async with Client(mesh.gateway, timeout=60.0) as client:
        await learned(client, "doubles", x.size)
        calls = [asyncio.create_task(client.call("doubles", x, seconds=3600.0, record=str(record))) for _ in range(3)]
        await until(lambda: shared(mesh) == 2, "they share a run")
        await until(lambda: left_in(record), "it has begun")
        for call in calls:
            call.cancel()
        np.testing.assert_array_equal(await client.call("doubles", np.array([14.0])), [28.0])
    await until(lambda: Scrape(mesh.gateway_metrics).sum("unlatch_calls_in_flight") == 0, "nothing is in flight")


async def test_a_failure_is_everybodys(mesh: Mesh, client: Client) -> None:
    """Each caller gets the run's error."""
    x = np.array([17.0])
    await learned(client, "doubles", x.size)
    calls = [asyncio.create_task(client.call("doubles", x, seconds=-1.0)) for _ in range(3)]
    told = await asyncio.gather(*calls, return_exceptions=True)
    assert len(told) == 3
    assert all(isinstance(error, Exception) for error in told), told
    assert not any(isinstance(error, InvalidArgument | DeadlineExceeded) for error in told)
