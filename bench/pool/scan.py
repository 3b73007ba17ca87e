"""The dispatcher's processor time for a call with 64 stub workers, against two: `python -m bench.pool.scan`.

    descriptor ──> CallIntake ──> Dispatcher ──> Pool ──> InFlight ──> a stub takes the run, and answers it later

Intake, dispatcher, pool and runs in flight are the product's own. Lanes and worker processes are stubs, so that 64
workers need no cores. One JSON line on stdin asks for the rounds, and one on stdout answers.
"""

import json
import sys
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from time import thread_time
from typing import Any, cast

import uvloop

from bench.bounds import Bound, Figures
from unlatch.common.kernel.spec import ArraySpec, KernelSpec
from unlatch.common.lane.server import LaneServer
from unlatch.common.service.gc_pauses import GcPauses
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.processes import ProcessWatch
from unlatch.common.telemetry.recorder import Recorder
from unlatch.common.telemetry.tracing import Tracing
from unlatch.compute.dispatch.dispatcher import Dispatcher
from unlatch.compute.dispatch.poison import Poison
from unlatch.compute.intake.intake import CallIntake
from unlatch.compute.ipc.arena import InputArena
from unlatch.compute.ipc.frames import Done, Result, RunFrame, ToWorker
from unlatch.compute.metrics import ComputeMetrics
from unlatch.compute.pool.exits import Exit
from unlatch.compute.pool.in_flight import InFlight
from unlatch.compute.pool.occupancy import Occupancy
from unlatch.compute.pool.pool import Pool
from unlatch.compute.pool.process import WorkerProcess
from unlatch.compute.pool.slot import Slot
from unlatch.compute.settings import ComputeSettings
from unlatch.protos.unlatch_pb2 import Descriptor

FEW, MANY = 2, 64
# Calls in flight by the number of workers: a single one, one in each worker, and another staged behind each of those.
LOADS: dict[str, Callable[[int], int]] = {
    "single": lambda _: 1,
    "busy": lambda workers: workers,
    "staged": lambda workers: 2 * workers,
}
# The aim is 1.05.
BOUNDS = (Bound(name="pool_scan_64_vs_2_workers", at_most=1.2),)

_KERNEL = KernelSpec(
    name="k",
    version="1",
    doc="",
    inputs=(ArraySpec(name="x", dtypes=(), dims=("...",)),),
    scalars=(),
    outputs=(),
    pure=True,
    batch=False,
    max_batch_size=1,
    timeout_seconds=None,
    memory_bytes=None,
)
_BODY = memoryview(bytes(1024))
# As a gateway sends it for a caller without a deadline.
_REMAINING_MICROSECONDS = 3_600_000_000
_RUN_NANOSECONDS = 1_000_000


class StubLane:
    """A lane that drops its replies, and counts failures."""

    def __init__(self) -> None:
        self.failed = 0

    def reply(self, _: int, reply: Any, __: object, ___: object = None) -> None:
        self.failed += reply.HasField("failure")

    def fail(self, _: int, __: object) -> None:
        self.failed += 1


class StubProcess:
    """A worker process that does nothing. `sent` gets its runs, in the order of all workers' runs."""

    ending = False
    cpu_seconds = 0.0

    def __init__(self, sent: "deque[tuple[StubProcess, RunFrame]]") -> None:
        self.in_flight: InFlight
        self._sent = sent

    def send(self, frame: ToWorker, _: int | None = None) -> None:
        if isinstance(frame, RunFrame):
            self._sent.append((self, frame))

    def kill(self, cause: Exit) -> None:
        raise AssertionError(f"a stub worker is killed: {cause}")


class StubSlot:
    """A slot whose worker is up."""

    def __init__(self, in_flight: InFlight) -> None:
        self.in_flight = in_flight


class Replica:
    """A dispatcher and its pool of stub workers. Make it within an event loop."""

    def __init__(self, workers: int) -> None:
        recorder = Recorder()
        errors = InternalErrors(recorder)
        given = ComputeSettings.model_construct(workers=workers)
        arena, occupancy, slots = InputArena(1 << 28), Occupancy(workers), list[StubSlot]()
        metrics = ComputeMetrics(recorder, ProcessWatch(), lambda: len(self._dispatcher))
        reserved = given.workers_reserved
        pool = Pool(cast("Sequence[Slot]", slots), occupancy, arena, errors, reserved_workers=reserved)
        self._sent: deque[tuple[StubProcess, RunFrame]] = deque()
        self._dispatcher = Dispatcher(pool, Poison(0.0, errors), metrics, errors, given)
        for number in range(workers):
            stub = StubProcess(self._sent)
            beside = self._dispatcher, occupancy, metrics.worker(number), errors, given
            stub.in_flight = InFlight(number, cast("WorkerProcess", stub), *beside)
            stub.in_flight.serve()
            slots.append(StubSlot(stub.in_flight))
        self._intake = CallIntake(
            {_KERNEL.name: _KERNEL}, arena, lambda _: self._dispatcher, metrics, Tracing(), errors, 1 << 20
        )
        self._lane = StubLane()
        self._numbers = 0

    def send(self) -> None:
        """Take in a call whose bytes have come with it."""
        self._numbers += 1
        descriptor = Descriptor(call=self._numbers, remaining_microseconds=_REMAINING_MICROSECONDS)
        descriptor.request.kernel = _KERNEL.name
        descriptor.request.tensors.add(name="x", datatype="FP64", shape=[128])
        descriptor.lengths.append(len(_BODY))
        self._intake.accept(cast("LaneServer", self._lane), descriptor, [_BODY])

    def answer(self) -> None:
        """Answer the run that was sent first."""
        process, frame = self._sent.popleft()
        if process.in_flight.heard(Done((Result(frame.members[0].call, ()),), _RUN_NANOSECONDS)):
            self._dispatcher.assign()

    def microseconds(self, in_flight: int, calls: int) -> float:
        """Return the processor time of a call while `in_flight` calls are in flight."""
        for _ in range(in_flight):
            self.send()
        began = thread_time()
        for _ in range(calls):
            self.answer()
            self.send()
        took = thread_time() - began
        for _ in range(in_flight):
            self.answer()
        if self._lane.failed or self._sent:
            raise AssertionError(f"{self._lane.failed} calls failed, {len(self._sent)} were not answered")
        return took / calls * 1e6


def measure(rounds: int, calls: int) -> Figures:
    """Return the processor time of a call by load and workers, and the ratio: the mean of the loads' medians."""
    replicas = {workers: Replica(workers) for workers in (FEW, MANY)}
    found: dict[tuple[str, int], list[float]] = {(load, workers): [] for load in LOADS for workers in replicas}
    for _ in range(rounds):
        # By turns, so that whatever else the machine does concerns both alike.
        for (load, workers), each in found.items():
            each.append(replicas[workers].microseconds(LOADS[load](workers), calls))
    ratios = [
        median(many / few for few, many in zip(found[load, FEW], found[load, MANY], strict=True)) for load in LOADS
    ]
    figures = {f"pool_scan_{load}_{workers}_cpu_us": median(each) for (load, workers), each in found.items()}
    return {"pool_scan_64_vs_2_workers": sum(ratios) / len(ratios), **figures}


async def _answer() -> None:
    # Garbage is collected as in a service.
    with GcPauses(lambda: 0):
        for line in sys.stdin:
            print(json.dumps(measure(**json.loads(line))), flush=True)


if __name__ == "__main__":
    uvloop.run(_answer())
