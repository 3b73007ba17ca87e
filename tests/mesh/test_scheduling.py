"""The order of calls under load: a real mesh whose worker is held at a gate while calls queue up.

These tenants have no names from authentication: their calls come on a lane to the replica itself.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2

from tests.conftest import StartMesh
from tests.support.doors import LaneEnd, Oip, descriptor, request
from tests.support.mesh import Mesh, running_mesh
from tests.support.watching import Gate, Scrape, until
from unlatch import Client
from unlatch.common.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted
from unlatch.protos.unlatch_pb2 import Frames, Priority

# gRPC wants one event loop in a process.
pytestmark = pytest.mark.asyncio(loop_scope="session")

PRIORITIES = ("interactive", "normal", "background")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh with one worker."""
    with running_mesh(tmp_path_factory.mktemp("single"), dispatcher=["--workers", "1"]) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def client(single: Mesh) -> AsyncIterator[Client]:
    async with Client(single.gateway, timeout=30.0) as opened:
        yield opened


def waiting(mesh: Mesh) -> float:
    """Return how many calls wait, at the replica and at the gateway."""
    return sum(
        Scrape(metrics).sum("unlatch_queue_depth") for metrics in (mesh.dispatcher_metrics, mesh.gateway_metrics)
    )


class Held:
    """The only worker, held until the test lets it go on."""

    def __init__(self, client: Client, gate: Gate) -> None:
        self._client = client
        self._gate = gate
        self._call: asyncio.Future[object] | None = None

    async def __aenter__(self) -> None:
        self._call = asyncio.ensure_future(self._client.waits_for(path=str(self._gate)))
        await until(lambda: self._gate.reached, "the worker is held")

    async def __aexit__(self, *_: object) -> None:
        assert self._call is not None
        if self._gate.reached:
            self._gate.open()
        await self._call


@pytest.fixture
def held(client: Client, tmp_path: Path) -> Held:
    return Held(client, Gate(tmp_path / "gate"))


async def test_priorities_run_in_their_order(single: Mesh, client: Client, held: Held) -> None:
    """Waiting calls run interactive first, then normal, then background, in any order of arrival."""
    async with held:
        staged = asyncio.ensure_future(client.turn())
        ranks = (2, 1, 0, 2, 0)
        calls = [(rank, asyncio.ensure_future(client.turn(priority=PRIORITIES[rank]))) for rank in ranks]
        await until(lambda: waiting(single) >= len(calls), "all wait")
    first = int(await staged)
    turns = sorted([(int(await call), rank) for rank, call in calls])
    assert [rank for turn, rank in turns if turn > first] == sorted(rank for turn, rank in turns if turn > first)
    assert [rank for _, rank in turns][-2:] == [2, 2]


async def test_earliest_deadline_runs_first(single: Mesh, client: Client, held: Held) -> None:
    """Of one tenant's calls with one priority, the call with the least time left runs first."""
    times = (20.0, 5.0, 15.0, 10.0)
    async with held:
        staged = asyncio.ensure_future(client.turn(timeout=1000.0, priority="interactive"))
        await until(lambda: waiting(single) <= 1, "one is staged")
        calls = [asyncio.ensure_future(client.turn(timeout=seconds)) for seconds in times]
        await until(lambda: waiting(single) >= len(calls), "all wait")
    await staged
    turns = [int(turn) for turn in await asyncio.gather(*calls)]
    assert [times[turns.index(turn)] for turn in sorted(turns)] == sorted(times)


@pytest.mark.parametrize("said", ["urgent", "", -1, 1.5, True])
async def test_wrong_priority_is_refused(client: Client, said: object) -> None:
    """An unknown priority is INVALID_ARGUMENT, and the message lists the known ones."""
    with pytest.raises(InvalidArgument, match="priority: wanted interactive or normal or background") as refused:
        await client.turn(priority=said)
    assert refused.value.field == "priority"


def tenants_call(lane: LaneEnd, number: int, tenant: str, seconds: float, priority: str = "normal") -> None:
    frame = descriptor(number, request("turn", seconds=seconds))
    frame.tenant, frame.priority = tenant, Priority.Value(priority.upper())
    lane.send(Frames(calls=[frame]))


@pytest.mark.parametrize(("weights", "share"), [("", 1.0), ("light=3", 3.0)])
async def test_tenants_share_the_processor(start_mesh: StartMesh, tmp_path: Path, weights: str, share: float) -> None:
    """A tenant with ten times as many calls, and longer ones, gets no more processor time than its weight allows."""
    flags = ("--tenant-weights", weights) if weights else ()
    mesh, gate = start_mesh(dispatcher=["--workers", "1", *flags]), Gate(tmp_path / "gate")
    with grpc.insecure_channel(mesh.dispatcher) as channel, LaneEnd(channel, within=50.0) as lane:
        for number in range(1, 4):
            tenants_call(lane, number, "heavy", 0.01)
        for number in range(1, 4):
            lane.reply(number)
        lane.call(1000, request("waits_for", path=str(gate)))
        await until(lambda: gate.reached, "the worker is held")
        for number in range(100, 180):
            tenants_call(lane, number, "heavy", 0.01)
        for number in range(200, 350):
            tenants_call(lane, number, "light", 0.002)
        # Else one tenant would run alone until the other's calls have come. One call is staged.
        await until(lambda: Scrape(mesh.dispatcher_metrics).sum("unlatch_queue_depth") >= 80 + 150 - 1, "all wait")
        gate.open()
        light = max(np.frombuffer(lane.reply(number)[1], "i8")[0] for number in range(200, 350))
        heavy = [np.frombuffer(lane.reply(number)[1], "i8")[0] for number in range(100, 180)]
    # This happened while the light tenant's 0.3 s ran.
    beside = 0.01 * sum(turn < light for turn in heavy)
    assert 0.3 / beside == pytest.approx(share, rel=0.4)


def retry_milliseconds(error: Any) -> tuple[int, int]:
    """Return the times in RetryInfo and in gRPC's own push-back."""
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return info.retry_delay.ToMilliseconds(), int(trailers["grpc-retry-pushback-ms"])


async def test_full_queue_refuses_at_once_and_says_when_to_come_back(start_mesh: StartMesh, tmp_path: Path) -> None:
    """A full queue is RESOURCE_EXHAUSTED with the bound, RetryInfo and gRPC's push-back. Waiting calls are answered."""
    flags = ["--workers", "1", "--max-queued-calls", "3", "--ahead-seconds", "3600"]
    # One of four calls is staged, however long they take to come.
    mesh = start_mesh(dispatcher=[*flags, "--long-call-seconds", "3600"])
    gate = Gate(tmp_path / "gate")
    async with Client(mesh.gateway, timeout=30.0) as client, Held(client, gate):
        calls = [asyncio.ensure_future(client.turn()) for _ in range(4)]
        await until(lambda: waiting(mesh) == 3, "the queue is full")
        with pytest.raises(ResourceExhausted, match="max_queued_calls=3") as refused:
            await client.turn()
        assert refused.value.retry_after_milliseconds >= 1
        with grpc.insecure_channel(mesh.gateway) as channel, pytest.raises(grpc.RpcError) as error:
            await asyncio.to_thread(Oip(channel).infer, request("turn"))
        told, pushed = retry_milliseconds(error.value)
        assert told == pushed >= 1
        # A call of higher priority takes the place of the last waiting one.
        urgent = asyncio.ensure_future(client.turn(priority="interactive"))
        done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION, timeout=10)
        assert [type(call.exception()) for call in done] == [ResourceExhausted]
        left = [call for call in (*calls, urgent) if call not in done]
        gate.open()
        assert len({int(await call) for call in left}) == 4


async def four_seconds_of_work(client: Client, mesh: Mesh) -> Sequence["asyncio.Future[object]"]:
    """Have calls of this length wait behind the held worker: far longer than a refusal takes on a busy machine."""
    calls = [asyncio.ensure_future(client.sleeps(seconds=0.05, priority="interactive")) for _ in range(80)]
    await until(lambda: waiting(mesh) >= 79, "four seconds' work waits")
    return calls


async def leave(calls: Sequence["asyncio.Future[object]"]) -> None:
    """Cancel calls."""
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_what_cannot_be_done_in_time_is_refused_on_arrival(client: Client, single: Mesh, held: Held) -> None:
    """A call is refused at once if the waiting calls are known to take longer than its deadline allows."""
    for _ in range(3):
        await client.sleeps(seconds=0.05)
    async with held:
        calls = await four_seconds_of_work(client, single)
        with pytest.raises(ResourceExhausted, match="deadline") as refused:
            await client.sleeps(seconds=0.05, timeout=2.0)
        assert 100 < refused.value.retry_after_milliseconds < 10_000
        # With enough time it may wait.
        patient = asyncio.ensure_future(client.sleeps(seconds=0.05, timeout=25.0))
        await until(lambda: waiting(single) >= 80, "it waits too")
        await leave(calls[20:])
    await asyncio.gather(patient, *calls[:20])


async def test_call_that_was_not_begun_teaches_nothing(start_mesh: StartMesh, tmp_path: Path) -> None:
    """Callers that leave while their calls are staged do not make their kernel look fast."""
    mesh = start_mesh(dispatcher=["--workers", "1", "--long-call-seconds", "3600"])

    def in_flight() -> float:
        return Scrape(mesh.gateway_metrics).sum("unlatch_calls_in_flight")

    async with Client(mesh.gateway, timeout=30.0) as client:
        for _ in range(3):
            await client.sleeps(seconds=0.05)
        for number in range(12):
            async with Held(client, Gate(tmp_path / str(number))):
                staged = asyncio.ensure_future(client.sleeps(seconds=0.05))
                await until(lambda: in_flight() == 2 and waiting(mesh) == 0, "it is staged")
                staged.cancel()
                await until(lambda: in_flight() == 1, "it has left")
        async with Held(client, Gate(tmp_path / "gate")):
            calls = await four_seconds_of_work(client, mesh)
            with pytest.raises(ResourceExhausted, match="deadline"):
                await client.sleeps(seconds=0.05, timeout=2.0)
            await leave(calls[20:])
        await asyncio.gather(*calls[:20])


async def test_idle_worker_tries_whatever_is_expected(start_mesh: StartMesh) -> None:
    """A call that is expected to take too long runs if nothing else waits: otherwise nothing would be learned."""
    mesh = start_mesh(dispatcher=["--workers", "1"])
    async with Client(mesh.gateway) as client:
        await client.sleeps(seconds=2.2)
        assert float(await client.sleeps(seconds=0.0, timeout=2.0)) == 0.0


async def test_deadline_that_passes_in_the_queue_frees_its_place(client: Client, single: Mesh, held: Held) -> None:
    """A call whose deadline passes while it waits is failed, and takes no worker's time."""
    async with held:
        calls = [asyncio.ensure_future(client.turn()) for _ in range(2)]
        late = asyncio.ensure_future(client.turn(timeout=0.2))
        with pytest.raises((DeadlineExceeded, ResourceExhausted)):
            await late
        await until(lambda: waiting(single) <= 2, "its place is free")
    await asyncio.gather(*calls)


async def test_long_calls_leave_workers_to_others(start_mesh: StartMesh, tmp_path: Path) -> None:
    """With two workers, one of them reserved, calls known to be long take only one, and others pass them."""
    mesh = start_mesh(dispatcher=["--workers", "2", "--reserved-workers", "1", "--long-call-seconds", "2"])
    gates = [Gate(tmp_path / str(number)) for number in range(3)]
    async with Client(mesh.gateway, timeout=60.0) as client:
        # The kernel becomes known as long by having been held for longer than that.
        first = asyncio.ensure_future(client.waits_for(path=str(gates[0])))
        await until(lambda: gates[0].reached, "it runs")
        await until(
            lambda: Scrape(mesh.dispatcher_metrics).sum("unlatch_worker_running_seconds", kernel="waits_for") > 2.5,
            "for long",
        )
        gates[0].open()
        await first
        # Both workers run calls that are not known to be long, so that a long one can be staged behind them.
        both = [Gate(tmp_path / name) for name in ("one", "other")]
        unknown = [asyncio.ensure_future(client.waits_too(path=str(gate))) for gate in both]
        await until(lambda: all(gate.reached for gate in both), "both run")
        long = [asyncio.ensure_future(client.waits_for(path=str(gate))) for gate in gates[1:]]
        await until(lambda: waiting(mesh) == 1, "one is staged, the other waits")
        for gate in both:
            gate.open()
        await asyncio.gather(*unknown)
        await until(lambda: any(gate.reached for gate in gates[1:]), "one runs")
        for _ in range(20):
            await client.turn()
        assert sum(gate.reached for gate in gates[1:]) == 1
        assert waiting(mesh) == 1
        for gate in gates[1:]:
            await until(lambda gate=gate: gate.reached, "its turn")  # type: ignore[misc]
            gate.open()
        await asyncio.gather(*long)


@pytest.mark.parametrize("how", ["served", "told"])
async def test_priority_belongs_to_no_kernel(client: Client, how: str) -> None:
    """A kernel without any parameters can be called with a priority, and does not see it."""
    if how == "served":
        assert (await client.identity(np.arange(3.0), priority="background")).tolist() == [0.0, 1.0, 2.0]
    else:
        async for y in client.map("identity", [np.arange(3.0)] * 3, priority="background"):
            assert y.tolist() == [0.0, 1.0, 2.0]
