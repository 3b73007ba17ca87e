"""A unit without its doors: the gateway's calls and fleet, and a compute service with real workers, in this process."""

import asyncio
import gc
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.mesh import KERNELS
from tests.support.replicas import Answer
from tests.support.watching import Gate, descriptors, until
from unlatch.common.errors import Aborted, InvalidArgument
from unlatch.common.kernel.tensors import Array
from unlatch.common.lane.body import Body
from unlatch.common.telemetry.processes import ProcessWatch
from unlatch.compute.server import ComputeService
from unlatch.compute.settings import ComputeSettings
from unlatch.gateway.calls.calls import LiveCall
from unlatch.gateway.server import Gateway
from unlatch.gateway.settings import GatewaySettings
from unlatch.protos.unlatch_pb2 import Descriptor, Reply
from unlatch.unit.replica import LocalCompute
from unlatch.unit.settings import LOCAL

MEBIBYTE = 1024 * 1024


class Caller(Answer):
    """A caller that keeps a copy of its reply's bytes, as a door does."""

    def replied(self, reply: Reply, body: Body) -> None:
        super().replied(reply, body)
        self.bytes = b"".join(body.buffers)


class Slow(Answer):
    """A caller that reads its reply later."""

    def replied(self, reply: Reply, body: Body) -> None:
        super().replied(reply, body)
        self.cursor = body.subscribe(lambda: None)


class Unit:
    """A gateway and a compute service joined as in a unit."""

    def __init__(self, compute: LocalCompute, **settings: Any) -> None:
        self.compute = compute
        self.gateway = Gateway(GatewaySettings(replicas=(LOCAL,), **settings), None, compute.replica)
        self.tenant = self.gateway._tenants.of("")

    @property
    def service(self) -> ComputeService:
        assert self.compute._service is not None
        return self.compute._service

    def begin(self, kernel: str, body: Body, caller: Answer, *arrays: Array, **scalars: float | str) -> LiveCall:
        """Begin a call, whose bytes may still be fed."""
        descriptor = Descriptor()
        descriptor.request.kernel, descriptor.request.id = kernel, "mine"
        for name, value in scalars.items():
            field = "string_param" if isinstance(value, str) else "double_param"
            setattr(descriptor.request.parameters[name], field, value)
        for array in arrays:
            descriptor.request.tensors.add(name="x", datatype=f"FP{8 * array.itemsize}", shape=array.shape)
        return self.gateway.calls.begin(descriptor, body, 60.0, caller, self.tenant)

    async def identity(self, x: Array) -> None:
        """Make a call, and check its answer."""
        caller = Caller()
        call = self.begin("identity", Body([x.nbytes], [x.tobytes()]), caller, x)
        await until(lambda: caller.replies or caller.errors, "it is answered")
        assert caller.errors == []
        assert caller.bytes == x.tobytes()
        call.leave()

    async def at_rest(self) -> None:
        """Check that nothing is held for any call."""

        def rests() -> bool:
            gateway, service = self.gateway, self.service
            held = self.tenant.held.held, self.tenant.in_flight, gateway.fleets.held, len(gateway.calls)
            return (*held, len(service.dispatcher), service.arena.used_bytes, service.pool.busy_ratio) == (0,) * 7

        await until(rests, "nothing is held")


@asynccontextmanager
async def running(**compute: Any) -> AsyncIterator[Unit]:
    """Run such a unit with one worker."""
    settings = ComputeSettings(workers=1, kernels=(str(KERNELS),), drain_seconds=1.0, **compute)
    with ProcessWatch(reaper="forkserver") as processes:
        replica = LocalCompute(settings, processes)
        try:
            await replica.start()
            # Longer than a busy machine takes to start a worker.
            unit = Unit(replica, hold_seconds=60.0)
            unit.gateway.start()
            try:
                await until(lambda: unit.gateway.fleets.take_calls, "the replica takes calls")
                yield unit
            finally:
                await unit.gateway.close()
        finally:
            await replica.close()


async def test_calls_of_every_size_are_answered() -> None:
    """Bytes are those that were sent: none, beside the frame, in one piece, by turns. Nothing is held afterwards."""
    async with running() as unit:
        for size in (0, 1, 8_000, 8_193, MEBIBYTE // 8, MEBIBYTE // 8 + 1, MEBIBYTE):
            await unit.identity(np.arange(float(size)))
        await asyncio.gather(*(unit.identity(np.full(200_000, float(number))) for number in range(20)))
        await unit.at_rest()


async def test_call_whose_bytes_come_in_pieces() -> None:
    """A call is begun by its descriptor, and runs when its last bytes have come."""
    async with running() as unit:
        x = np.arange(300_000.0)
        caller, body = Caller(), Body([x.nbytes])
        call = unit.begin("identity", body, caller, x)
        sent = memoryview(x.tobytes())
        for at in range(0, len(sent), 100_000):
            body.feed(sent[at : at + 100_000])
            await asyncio.sleep(0)
        await until(lambda: caller.replies, "it is answered")
        assert caller.bytes == bytes(sent)
        call.leave()
        await unit.at_rest()


async def test_refusal_names_its_field_after_the_call_is_begun() -> None:
    """A refusal by the replica is not told within `begin`, and the next call is served."""
    async with running() as unit:
        caller = Caller()
        unit.begin("identity", Body([24], [bytes(24)]), caller, np.zeros(3), eps=1.0)
        assert caller.errors == []
        await until(lambda: caller.errors, "it is refused")
        (error,) = caller.errors
        assert isinstance(error, InvalidArgument)
        assert error.field == "eps"
        await unit.identity(np.zeros(3))
        await unit.at_rest()


async def test_caller_that_leaves_frees_the_worker(tmp_path: Path) -> None:
    """A running call is cancelled, its worker is replaced after the grace, and one that waits is never begun."""
    async with running(kill_grace_seconds=0.05) as unit:
        gate = Gate(tmp_path / "gate")
        first, second = Caller(), Caller()
        running_call = unit.begin("waits_for", Body((), []), first, path=str(gate))
        await until(lambda: gate.reached, "it runs")
        waiting_call = unit.begin("waits_for", Body((), []), second, path=str(tmp_path / "never"))
        waiting_call.leave()
        running_call.leave()
        await unit.identity(np.zeros(3))
        assert (first.errors, second.errors, first.replies, second.replies) == ([], [], [], [])
        await unit.at_rest()


async def test_slow_reader_keeps_its_bytes() -> None:
    """The worker does not write over a reply that is still read. Its segment is used again afterwards."""
    async with running() as unit:
        x = np.arange(100_000.0)
        slow = Slow()
        call = unit.begin("identity", Body([x.nbytes], [x.tobytes()]), slow, x)
        await until(lambda: slow.replies, "it is answered")
        for number in range(4):
            await unit.identity(np.full(100_000, float(number)))
        piece = slow.cursor.next(x.nbytes)
        assert piece is not None
        assert bytes(piece) == x.tobytes()
        slow.cursor.close()
        call.leave()
        await unit.at_rest()


async def test_replaced_service_is_used_by_the_same_gateway(tmp_path: Path) -> None:
    """Calls in flight end ABORTED after the drain. Then the gateway takes calls again; metrics are the new ones."""
    async with running() as unit:
        await unit.identity(np.zeros(3))
        before, gate, caller = unit.service, Gate(tmp_path / "gate"), Caller()
        unit.begin("waits_for", Body((), []), caller, path=str(gate))
        await until(lambda: gate.reached, "it runs")
        await unit.compute.replace()
        (error,) = caller.errors
        assert isinstance(error, Aborted)
        await until(lambda: unit.gateway.fleets.take_calls, "the replica takes calls")
        assert unit.service is not before
        assert list(unit.compute.collectors) == list(unit.service.collectors)
        await unit.identity(np.zeros(3))
        await unit.at_rest()


async def test_calls_wait_while_the_service_is_replaced() -> None:
    """Calls that begin during the drain or the start are held in the gateway, and answered by the next service."""
    async with running() as unit:
        replacing, callers = asyncio.ensure_future(unit.compute.replace()), list[Caller]()
        while not replacing.done():
            callers.append(Caller())
            unit.begin("identity", Body([24], [bytes(24)]), callers[-1], np.zeros(3))
            await asyncio.sleep(0.02)
        await replacing
        await until(lambda: all(caller.replies or caller.errors for caller in callers), "all are answered")
        assert [error for caller in callers for error in caller.errors] == []


# Kinds of files that a compute service opens, beside sockets without a peer's name.
KINDS = ("memfd:unlatch", "/proc/", "pipe:", "[pidfd]")


def open_files() -> Counter[str]:
    """Return how many files of each of these kinds this process has open.

    Other sockets, polls and events are gRPC's, of tests that ran here before, and gRPC opens and closes them later.
    """
    gc.collect()
    found = Counter[str]()
    for number, target in descriptors(os.getpid()).items():
        if target.startswith("socket:"):
            with suppress(OSError), socket.socket(fileno=os.dup(number)) as opened:
                found["socket"] += opened.family is socket.AF_UNIX and not has_named_peer(opened)
        else:
            found.update(kind for kind in KINDS if kind in target)
    return found


def has_named_peer(opened: socket.socket) -> bool:
    try:
        return bool(opened.getpeername())
    except OSError:
        # It listens.
        return False


async def test_service_leaves_the_environment_as_it_is() -> None:
    """Variables for the forkserver are set for it alone."""
    before = dict(os.environ)
    async with running():
        assert os.environ == before


@pytest.mark.usefixtures("own_garbage")
async def test_replaced_services_leave_no_descriptor() -> None:
    """However often the service is replaced, the unit has as many open files as after the first time."""
    async with running() as unit:

        async def replaced() -> Counter[str]:
            await unit.compute.replace()
            await until(lambda: unit.gateway.fleets.take_calls, "the replica takes calls")
            await unit.identity(np.zeros(3))
            return open_files()

        first = await replaced()
        for _ in range(2):
            await replaced()
            # The files of a process are closed soon after its end.
            await until(lambda: not open_files() - first, f"no more are open than {first}")


@pytest.mark.parametrize("calls", [1, 50])
async def test_gateway_that_closes_abandons_its_calls(calls: int, tmp_path: Path) -> None:
    """When the gateway ends, what it had sent is abandoned at the replica, and the replica ends."""
    async with running(kill_grace_seconds=0.05) as unit:
        gate, callers = Gate(tmp_path / "gate"), [Caller() for _ in range(calls)]
        unit.begin("waits_for", Body((), []), callers[0], path=str(gate))
        for caller in callers[1:]:
            unit.begin("sleeps", Body((), []), caller, seconds=5.0)
        await until(lambda: gate.reached, "it runs")
        await unit.gateway.close()
        await until(lambda: not len(unit.service.dispatcher), "none waits")
