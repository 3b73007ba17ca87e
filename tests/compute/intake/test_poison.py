"""What makes two calls the same call, and what of those that killed is kept, for how long."""

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from tests.support.guards import unexpected
from tests.support.watching import until
from unlatch.common.errors import FailedPrecondition, Unavailable
from unlatch.common.kernel.spec import ArraySpec, KernelSpec, ScalarSpec
from unlatch.common.kernel.tensors import Array
from unlatch.common.lane.server import LaneServer
from unlatch.common.telemetry.processes import ProcessWatch
from unlatch.common.telemetry.recorder import Recorder
from unlatch.common.telemetry.tracing import Tracing
from unlatch.common.waiting.demand import Estimate
from unlatch.common.waiting.order import Policy
from unlatch.compute.call import Call
from unlatch.compute.dispatch.queue import Queue
from unlatch.compute.intake.arguments import check
from unlatch.compute.intake.poison import Suspects
from unlatch.compute.ipc.arena import InputArena
from unlatch.compute.metrics import ComputeMetrics
from unlatch.compute.pool import exits as ends
from unlatch.protos.unlatch_pb2 import Descriptor

SIGKILL = ends.by_itself(-9)
# Read by a thread.
LARGE = 1 << 19


class Ward:
    """A queue without workers, what stands before it, and what calls need."""

    def __init__(self, poison_seconds: float = 600.0) -> None:
        self.arena = InputArena(1 << 30)
        self.policy = Policy[Call]()
        self.queue = Queue(self.policy, 10_000, 0.1)
        self.suspects = Suspects(self.queue, poison_seconds)
        self._metrics = ComputeMetrics(Recorder(), ProcessWatch(), self.queue.__len__)
        self._lane = LaneServer(lambda *_: None, unexpected)

    def sent(
        self,
        a: Array,
        b: Array | None = None,
        *,
        k: float = 1.0,
        version: str = "1",
        identity: str = "",
        cost_seconds: float = 0.0,
        remaining_microseconds: int = 0,
    ) -> Call:
        """A call that has landed."""
        arrays = {"a": a} if b is None else {"a": a, "b": b}
        descriptor = Descriptor(call=1, remaining_microseconds=remaining_microseconds)
        descriptor.request.id = identity
        descriptor.request.parameters["k"].double_param = k
        for name, array in arrays.items():
            datatype = {"f": "FP", "i": "INT"}[array.dtype.kind] + str(8 * array.itemsize)
            descriptor.request.tensors.add(name=name, datatype=datatype, shape=array.shape)
            descriptor.lengths.append(array.nbytes)
        spec = kernel(arrays, version)
        suspects = self.suspects
        beside = self.arena, self._metrics, Tracing()
        arguments = check(spec, descriptor)
        call = Call(self._lane, descriptor, spec, arguments, *beside, suspects.offer, suspects.withdraw)
        call.estimate = Estimate(cost_seconds)
        call.make_room()
        call.land([memoryview(array.tobytes()) for array in arrays.values()])
        return call

    def taken(self) -> Call:
        """The one call that waits, as a worker gets it."""
        (call,) = self.queue.take_back(lambda _: True, 2)
        return call

    async def struck(self, call: Call) -> FailedPrecondition | None:
        """What comes of a worker's death of it."""
        heard: asyncio.Future[FailedPrecondition | None] = asyncio.get_running_loop().create_future()
        self.suspects.strike(call, SIGKILL, heard.set_result)
        error = await heard
        call.release()
        return error


def kernel(arrays: Mapping[str, Array], version: str) -> KernelSpec:
    rest: dict[str, Any] = {"batch": False, "max_batch_size": 1, "timeout_seconds": None, "memory_bytes": None}
    return KernelSpec(
        name="k",
        version=version,
        doc="",
        inputs=tuple(ArraySpec(name=name, dtypes=(), dims=("...",)) for name in arrays),
        scalars=(ScalarSpec(name="k", type="float", required=True, default=None),),
        outputs=(),
        pure=False,
        **rest,
    )


A, B = np.arange(6.0), np.ones(6)
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one element": ({"a": A}, {"a": A + (A == 5)}),
    "the sign of zero": ({"a": B * 0.0}, {"a": B * -0.0}),
    "the dtype": ({"a": A}, {"a": A.view("i8")}),
    "the shape": ({"a": A.reshape(2, 3)}, {"a": A.reshape(3, 2)}),
    "which array it is": ({"a": A, "b": B}, {"a": B, "b": A}),
    "a parameter": ({"a": A, "k": 1.0}, {"a": A, "k": 1.5}),
    "the version": ({"a": A, "version": "1"}, {"a": A, "version": "2"}),
    "a large one's last element": ({"a": np.zeros(LARGE)}, {"a": np.arange(LARGE) // (LARGE - 1) * 1.0}),
    "nothing in it": ({"a": np.zeros(0), "k": 1.0}, {"a": np.zeros(0), "k": 2.0}),
}


@pytest.mark.parametrize("what", CALLS)
async def test_calls_are_told_apart(what: str) -> None:
    """A call that killed twice is refused under any id; one that differs in anything a kernel sees is let through."""
    ward, (deadly, harmless) = Ward(), CALLS[what]
    ward.sent(**deadly, identity="one")
    assert await ward.struck(ward.taken()) is None
    ward.sent(**deadly, identity="two")
    await until(lambda: len(ward.queue), "it waits for a worker")
    poison = await ward.struck(ward.taken())
    assert poison is not None
    assert poison.message.startswith(
        "2 workers ended while they ran this call, the last time because the worker was killed by SIGKILL"
    )
    refused = ward.sent(**deadly, identity="three")
    waiting = ward.sent(**harmless)
    await until(lambda: len(ward.queue) and refused.ended, "one is let through and one is not")
    assert ward.taken() is waiting
    assert not waiting.ended
    waiting.release()
    assert not ward.arena.used_bytes


async def test_what_waits_is_held_against_what_is_known_now() -> None:
    """Calls like one that turns out to be poison leave the queue, whenever they came; others wait on."""
    ward = Ward()
    calls = [ward.sent(A + 1 if number % 3 else A) for number in range(100)]
    deadly, *_ = ward.queue.take_back(lambda _: True, 1)
    assert await ward.struck(deadly) is None
    # These are read when they come, as the others were not.
    calls += [ward.sent(A + 1 if number % 3 else A) for number in range(100)]
    deadly, *_ = ward.queue.take_back(lambda call: bool(call.digest), 1)
    assert await ward.struck(deadly) is not None
    alike = [call for number, call in enumerate(calls) if not number % 100 % 3][1:]
    await until(lambda: all(call.ended for call in alike if call is not deadly), "they are refused")
    await until(lambda: len(ward.queue) == 132, "the rest waits")
    assert {call.ended for call in ward.queue.take_back(lambda _: True, 200)} == {False}


@pytest.mark.parametrize("how", ["strike", "offer"])
async def test_caller_who_leaves_while_the_call_is_read(how: str) -> None:
    """Its memory is given back when the reading is over, not before, and the call goes nowhere."""
    ward, x = Ward(), np.zeros(LARGE)
    ward.sent(x)
    call = ward.taken()
    heard: list[FailedPrecondition | None] = []
    ward.suspects.strike(call, SIGKILL, heard.append)
    leaver = call
    if how == "offer":
        await until(lambda: heard, "it is read")
        call.release()
        leaver = ward.sent(x)
    leaver.abandon()
    assert ward.arena.used_bytes == x.nbytes
    if how == "strike":
        await until(lambda: heard, "it is read")
        assert heard == [None]
        call.release()
    await until(lambda: not ward.arena.used_bytes, "its memory is free")
    assert not len(ward.queue)


async def test_what_is_remembered_is_bounded() -> None:
    """Of many that killed once the oldest are forgotten first."""
    ward = Ward()
    for number in range(1100):
        ward.sent(np.array([float(number)]))
        assert await ward.struck(ward.taken()) is None
    for number, is_known in ((0, False), (1099, True)):
        ward.sent(np.array([float(number)]))
        assert (await ward.struck(ward.taken()) is not None) == is_known
    assert len(ward.suspects._remembered) == sum(ward.suspects._kinds.values()) == 1024


async def test_what_did_no_harm_is_forgotten() -> None:
    """A call that was run to its end clears those like it, and nothing is read any more."""
    ward = Ward()
    ward.sent(A)
    await ward.struck(ward.taken())
    again = ward.sent(A)
    assert again.digest
    ward.suspects.clear(again)
    assert not ward.sent(A).digest


async def test_strike_is_forgotten_in_time() -> None:
    """One that killed long ago and kills again is not poison."""
    ward = Ward(poison_seconds=1e-9)
    for _ in range(3):
        ward.sent(A)
        assert await ward.struck(ward.taken()) is None


async def test_nothing_is_remembered_where_nothing_is_to_be() -> None:
    """With `poison_seconds=0` a call that is run again by us is still run twice at most, and one like it is let in."""
    ward = Ward(poison_seconds=0.0)
    ward.sent(A)
    call = ward.taken()
    heard: list[FailedPrecondition | None] = []
    for _ in range(2):
        ward.suspects.strike(call, SIGKILL, heard.append)
    first, second = heard
    assert first is None
    assert second is not None
    assert not ward.sent(A).ended


async def test_queue_that_is_shut_keeps_nothing() -> None:
    """Where there will be no worker all that waits, comes or comes back is refused, until there is one again."""
    ward = Ward()
    calls = [ward.sent(A) for _ in range(100)]
    ward.queue.shut(Unavailable("the kernels do not load"))
    await until(lambda: all(call.ended for call in calls), "what waited is refused")
    assert ward.sent(A).ended
    ward.queue.shut(None)
    ward.sent(A)
    call = ward.taken()
    ward.queue.shut(Unavailable("the kernels do not load"))
    ward.queue.put_back(call)
    assert call.ended
    assert not ward.arena.used_bytes
    assert not len(ward.queue)
