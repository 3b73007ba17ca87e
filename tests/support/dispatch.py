"""A dispatcher on its own: the real backlog, pool and runs, over worker processes, a lane and a clock that are not."""

import asyncio
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, TypeVar, cast

import numpy as np
import pytest

from unlatch.common.errors import UnlatchError
from unlatch.common.kernel.spec import ArraySpec, KernelSpec, ScalarSpec
from unlatch.common.kernel.tensors import Array
from unlatch.common.lane.body import Body
from unlatch.common.lane.replies import failed
from unlatch.common.lane.server import LaneServer
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.processes import ProcessWatch
from unlatch.common.telemetry.recorder import Recorder
from unlatch.common.telemetry.tracing import Tracing
from unlatch.common.waiting import backlog as backlog_module
from unlatch.common.waiting.demand import Estimate
from unlatch.common.waiting.order import Policy
from unlatch.compute import call as call_module
from unlatch.compute.call import Call
from unlatch.compute.dispatch import poison as poison_module
from unlatch.compute.dispatch.dispatcher import Dispatcher
from unlatch.compute.dispatch.poison import Poison
from unlatch.compute.intake.arguments import check
from unlatch.compute.ipc.arena import InputArena
from unlatch.compute.ipc.frames import (
    PLAIN,
    Cancel,
    Done,
    Failed,
    Forget,
    Learn,
    Loaded,
    Ready,
    Result,
    RunFrame,
    Tensor,
    ToDispatcher,
    ToWorker,
)
from unlatch.compute.ipc.memory_limits import MemoryLimits
from unlatch.compute.metrics import ComputeMetrics
from unlatch.compute.pool import exits
from unlatch.compute.pool import in_flight as in_flight_module
from unlatch.compute.pool import slot as slot_module
from unlatch.compute.pool.exits import Exit
from unlatch.compute.pool.forkserver import ForkServer, Spawned
from unlatch.compute.pool.in_flight import InFlight
from unlatch.compute.pool.occupancy import Occupancy
from unlatch.compute.pool.pool import Pool, sweep
from unlatch.compute.pool.slot import Slot
from unlatch.compute.readiness import Readiness
from unlatch.compute.settings import ComputeSettings
from unlatch.protos.unlatch_pb2 import Descriptor, Reply

Result_ = TypeVar("Result_")

NO_LIMITS = MemoryLimits(memory_bytes=0, recycle_calls=0, recycle_growth_bytes=0)
# Tensors of so many bytes do not go beside a reply's frame: their segment is kept until they are sent.
LARGE_REPLY_BYTES = 128 * 1024


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when it is told to. `failures` are exceptions that no code has caught."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        # How much time passes with each look at the clock.
        self.tick = 0.0
        self.failures: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.failures.append(context))

    def time(self) -> float:
        return self.now

    def clock(self) -> float:
        """The clock that the product's code reads."""
        self.now += self.tick
        return self.now

    def rounds(self, count: int = 8) -> None:
        """Let the loop do what is due."""
        for _ in range(count):
            self.call_soon(self.stop)
            self.run_forever()

    def advance(self, seconds: float) -> None:
        """Let time pass, and what is due be done."""
        self.now += seconds
        self.rounds()

    def do(self, work: Callable[[], Result_]) -> Result_:
        """Do something in the loop; what comes of it."""

        async def done() -> Result_:
            return work()

        result = self.run_until_complete(done())
        self.rounds()
        return result


def kernel(name: str = "k", arrays: Sequence[str] = ("a",), version: str = "1", **given: Any) -> KernelSpec:
    """A kernel that takes arrays of any shape and a scalar k, and gives nothing; with `given` otherwise."""
    rest: dict[str, Any] = {
        "pure": False,
        "batch": False,
        "max_batch_size": 1,
        "timeout_seconds": None,
        "memory_bytes": None,
        "outputs": (),
        **given,
    }
    return KernelSpec(
        name=name,
        version=version,
        doc="",
        inputs=tuple(ArraySpec(name=array, dtypes=(), dims=("...",)) for array in arrays),
        scalars=(ScalarSpec(name="k", type="float", required=True, default=None),),
        **rest,
    )


class Lane:
    """A lane that keeps what it is to send. `replies` are by the numbers of calls."""

    def __init__(self) -> None:
        self.replies: dict[int, list[Reply]] = {}
        self.unsent: list[Callable[[], None]] = []
        self.unheard: dict[int, Callable[[], None]] = {}

    def reply(self, number: int, reply: Reply, _: Body, sent: Callable[[], None] | None = None) -> None:
        self.replies.setdefault(number, []).append(reply)
        if sent is not None:
            self.unsent.append(sent)

    def fail(self, number: int, error: UnlatchError) -> None:
        self.reply(number, failed(error), Body((), []))

    def started(self, number: int, heard: Callable[[], None] | None = None) -> None:
        if heard is not None:
            self.unheard[number] = heard


class WorkerEnd:
    """The place of a worker's process: it keeps what it is sent, and says and does what a test wants."""

    def __init__(
        self,
        forked: "Forked",
        on_frame: Callable[[ToDispatcher], None],
        on_exit: Callable[[Exit], None],
        **__: object,
    ) -> None:
        self.pid = os.getpid()
        self.ending = False
        self.teardown_seconds = 0.0
        self.cpu_seconds = 0.0
        self.runs: deque[RunFrame] = deque()
        self.cancelled: set[int] = set()
        self.reply_segments: set[int] = set()
        self.cause: Exit | None = None
        self.exited = False
        self._kernels = {spec.name: spec for spec in forked.kernels}
        self._say = on_frame
        self._on_exit = on_exit
        forked.ends.append(self)
        for spec in forked.kernels:
            asyncio.get_running_loop().call_soon(self.say, Loaded(spec))
        asyncio.get_running_loop().call_soon(self.say, Ready())

    def send(self, frame: ToWorker, _: int | None = None) -> None:
        if self.ending:
            return
        if isinstance(frame, RunFrame):
            self.runs.append(frame)
        elif isinstance(frame, Learn) and frame.writable:
            self.reply_segments.add(frame.segment)
        elif isinstance(frame, Forget):
            self.reply_segments.difference_update(frame.replies)
        elif isinstance(frame, Cancel):
            self.cancelled.update(frame.calls)

    def hear(self) -> None:
        """Do nothing: every frame of this worker is heard at once."""

    def kill(self, cause: Exit) -> None:
        if not self.exited:
            self.cause = self.cause or cause
            self.ending = True

    def end(self, cause: Exit) -> None:
        """End as a worker without teardowns does."""
        self.kill(cause)

    def say(self, frame: ToDispatcher) -> None:
        """Say a frame to the dispatcher."""
        if not self.ending:
            self._say(frame)

    def exit(self, code: int = 0) -> None:
        """Exit as it was told to, or by itself."""
        self.ending = self.exited = True
        self._on_exit(self.cause or exits.by_itself(code))

    def done(self, seconds: float = 0.01) -> None:
        """Answer the first run, as far as it is not cancelled."""
        run = self.runs.popleft()
        self.cpu_seconds += seconds
        called = [member.call for member in run.members if member.call not in self.cancelled]
        if not called:
            self.say(Failed(run.members[0].call, 1, "cancelled", "", "", 0))
            return
        tensors = tuple(
            Tensor("uint8", (LARGE_REPLY_BYTES,), 0, LARGE_REPLY_BYTES) for _ in self._kernels[run.kernel].outputs
        )
        self.say(Done(tuple(Result(call, tensors) for call in called), round(seconds * 1e9)))

    def fail(self, seconds: float = 0.01) -> None:
        """Answer the first run with an error."""
        run = self.runs.popleft()
        self.cpu_seconds += seconds
        self.say(Failed(run.members[-1].call, 3, "no", "a", "", round(seconds * 1e9)))


@dataclass
class Forked:
    """A forkserver that has workers at once. `ends` are those that it has forked."""

    kernels: Sequence[KernelSpec]
    ends: list[WorkerEnd]
    parent: int = 1

    async def spawn_within(self, _: float, __: str, **___: object) -> Spawned:
        return cast("Spawned", self)


def stand_in(patch: pytest.MonkeyPatch, loop: Loop) -> None:
    """Put worker ends in the place of worker processes, and the loop's time in the place of the clock's."""
    for module in (call_module, poison_module, backlog_module, in_flight_module):
        patch.setattr(module, "monotonic", loop.clock)
    patch.setattr(slot_module, "WorkerProcess", WorkerEnd)


class Desk:
    """A dispatcher with so many workers. To be made within an event loop; workers serve once it is started."""

    def __init__(
        self,
        workers: int = 0,
        *,
        kernels: Sequence[KernelSpec] = (),
        poison_seconds: float = 600.0,
        reserved_workers: int = 0,
        max_calls: int = 10_000,
        clock: Callable[[], float] = monotonic,
        settings: dict[str, Any] | None = None,
        slots: Sequence[Slot] | None = None,
    ) -> None:
        self.loop = cast("Loop", asyncio.get_running_loop())
        self.arena = InputArena(1 << 30)
        self.recorder = Recorder()
        self.errors = InternalErrors(self.recorder)
        self.metrics = ComputeMetrics(self.recorder, ProcessWatch(), lambda: len(self.dispatcher))
        self.poison = Poison(poison_seconds, self.errors)
        self.lane = Lane()
        self.ends: list[WorkerEnd] = []
        self.numbers = 0
        self.readiness = Readiness(lambda _: None)
        given = {"workers": max(1, workers), "max_queued_calls": max_calls, **(settings or {})}
        found = ComputeSettings.model_validate(given)
        self.occupancy = Occupancy(len(slots) if slots else workers)
        self.slots = slots or [
            Slot(
                number,
                PLAIN,
                cast("ForkServer", Forked(kernels, self.ends)),
                self.occupancy,
                self.metrics.worker(number),
                self.readiness,
                lambda _: NO_LIMITS,
                found,
                self.errors,
            )
            for number in range(workers)
        ]
        self.pool = Pool(self.slots, self.occupancy, self.arena, self.errors, reserved_workers=reserved_workers)
        self.dispatcher = Dispatcher(self.pool, self.poison, self.metrics, self.errors, found, clock=clock)

    async def start(self) -> None:
        """Start the workers, and give idle memory back as a service does."""
        self.sweeping = self.loop.create_task(sweep(self.arena, lambda: [self.pool], self.errors))
        await self.dispatcher.start()

    async def stop(self) -> None:
        """Stop the workers."""
        self.sweeping.cancel()
        await self.pool.stop()

    @property
    def backlog(self) -> Policy[Call]:
        """The calls that wait."""
        return self.dispatcher._backlog._policy

    @property
    def living(self) -> list[WorkerEnd]:
        """The workers that have not exited."""
        return [end for end in self.ends if not end.exited]

    @property
    def in_flight(self) -> list[InFlight]:
        """The runs that the slots' workers hold."""
        return [slot.in_flight for slot in self.slots if isinstance(slot.in_flight, InFlight)]

    def caught(self, place: str) -> float:
        """How many exceptions were caught in a place."""
        return float(self.errors._caught.labels(place).value)

    def sent(
        self,
        a: Array,
        b: Array | None = None,
        *,
        k: float = 1.0,
        identity: str = "",
        cost_seconds: float | None = None,
        remaining_microseconds: int = 0,
        tenant: str = "",
        attempt: int = 0,
        spec: KernelSpec | None = None,
        version: str = "1",
    ) -> Call:
        """A call that has landed. It is estimated as any is, or to be `cost_seconds`."""
        arrays = {"a": a} if b is None else {"a": a, "b": b}
        self.numbers += 1
        descriptor = Descriptor(
            call=self.numbers, remaining_microseconds=remaining_microseconds, tenant=tenant, attempt=attempt
        )
        descriptor.request.id = identity
        descriptor.request.parameters["k"].double_param = k
        for name, array in arrays.items():
            datatype = {"f": "FP", "i": "INT"}[array.dtype.kind] + str(8 * array.itemsize)
            descriptor.request.tensors.add(name=name, datatype=datatype, shape=array.shape)
            descriptor.lengths.append(array.nbytes)
        spec = spec or kernel(arrays=tuple(arrays), version=version)
        beside = self.arena, self.metrics, Tracing(), self.dispatcher.offer
        call = Call(cast("LaneServer", self.lane), descriptor, spec, check(spec, descriptor), *beside)
        if cost_seconds is None:
            self.dispatcher.admit(call)
        else:
            call.estimate = Estimate(cost_seconds)
        call.make_room()
        call.land([memoryview(array.tobytes()) for array in arrays.values()])
        return call

    def replies(self, call: Call) -> list[Reply]:
        """The replies that the call's caller has been sent."""
        return self.lane.replies.get(call._descriptor.call, [])

    def nothing_is_held(self) -> None:
        """Fail where memory, numbers or places are held although no call is."""
        assert not len(self.backlog)
        assert not self.arena.used_bytes
        assert not any(segment.blocks_out for segment in self.arena._segments)
        for flight in self.in_flight:
            assert not len(flight)
            assert len(flight.segments._free) == len(cast("Any", flight._process).reply_segments)


def array(size: int = 3, value: float = 0.0) -> Array:
    """An array of floats."""
    return np.full(size, value)
