"""Guards: an exception that no code expected, wherever it is raised, loses no call, and the next one is served."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from tests.compute.dispatch.test_machine import KERNELS, stopped
from tests.support.dispatch import Desk, Lane, Loop, WorkerEnd, array, stand_in
from unlatch.common.lane.server import LaneServer
from unlatch.common.telemetry.tracing import Tracing
from unlatch.common.waiting.backlog import Backlog
from unlatch.common.waiting.forecast import Forecast
from unlatch.common.waiting.order import Policy
from unlatch.compute.call import Call
from unlatch.compute.dispatch import dispatcher as dispatcher_module
from unlatch.compute.dispatch import poison as poison_module
from unlatch.compute.dispatch.dispatcher import Dispatcher
from unlatch.compute.dispatch.poison import Poison
from unlatch.compute.intake import intake as intake_module
from unlatch.compute.intake.intake import CallIntake
from unlatch.compute.ipc.arena import InputArena, WorkerSegments
from unlatch.compute.metrics import ComputeMetrics, WorkerMetrics
from unlatch.compute.pool.in_flight import InFlight
from unlatch.compute.pool.occupancy import Occupancy
from unlatch.compute.pool.pool import Pool
from unlatch.compute.pool.run import Run
from unlatch.compute.pool.slot import Slot
from unlatch.compute.readiness import Readiness
from unlatch.compute.reports import Reports
from unlatch.compute.settings import ComputeSettings
from unlatch.protos.unlatch_pb2 import Descriptor

ONCE, PURE, BATCHED, _, TIMED, TIMED_BATCHED, LARGE = KERNELS
LARGE_ARRAY = array(16 * 1024)

# What fails, once; and where that is caught.
FAULTS: list[tuple[Any, str, str]] = [
    (Poison, "suspects", "offer"),
    (Policy, "add", "offer"),
    (Policy, "one_too_many", "offer"),
    (Pool, "opening", "offer"),
    (InFlight, "has_room", "offer"),
    (InFlight, "held", "offer"),
    (Occupancy, "first", "offer"),
    (Backlog, "next", "assign"),
    (Policy, "first", "assign"),
    (Policy, "take", "assign"),
    (Policy, "alike", "assign"),
    (Dispatcher, "_seconds_until_done", "assign"),
    (dispatcher_module, "companions", "assign"),
    (Pool, "run", "assign"),
    (WorkerSegments, "lend", "assign"),
    (Run, "announce", "assign"),
    (Occupancy, "changed", "assign"),
    (InFlight, "_send_next", "assign"),
    (InFlight, "_send", "assign"),
    (WorkerSegments, "input", "assign"),
    (WorkerEnd, "send", "assign"),
    (WorkerMetrics, "begins", "assign"),
    (WorkerMetrics, "waited", "assign"),
    (InFlight, "heard", "worker_frame"),
    (InFlight, "_is_whole", "worker_frame"),
    (InFlight, "_used", "worker_frame"),
    (InFlight, "_go_on", "worker_frame"),
    (InFlight, "_count", "worker_frame"),
    (WorkerMetrics, "rests", "worker_frame"),
    (WorkerMetrics, "ran", "worker_frame"),
    (dispatcher_module, "outcomes", "outcomes"),
    (Forecast, "learn", "account"),
    (Call, "answer", "settle"),
    (Call, "fail", "settle"),
    (Call, "release", "settle"),
    (Call, "_end", "settle"),
    (ComputeMetrics, "stages", "settle"),
    (InputArena, "free", "settle"),
    (Policy, "put_back", "settle"),
    (Poison, "strike", "settle"),
    (Poison, "_remember", "settle"),
    (poison_module, "_digest", "settle"),
    (InFlight, "_timed_out", "timeout"),
    (InFlight, "_has_ended", "grace"),
    (InFlight, "_grace_over", "grace"),
    (InFlight, "kill", "grace"),
    (InFlight, "_not_heard", "not_heard"),
    (InFlight, "_confirmed", "caller_heard"),
    (InFlight, "_withdraw", "withdraw"),
    (Run, "take_out", "withdraw"),
    (Policy, "remove", "assign"),
    (InFlight, "_tell_cancelled", "cancel"),
    (WorkerSegments, "close", "worker_exit"),
    (WorkerMetrics, "ended", "worker_exit"),
    (Readiness, "down", "worker_exit"),
    (Readiness, "up", "worker_start"),
    (WorkerMetrics, "started", "worker_start"),
    (Slot, "look", "look_after"),
    (Pool, "_retire_one", "look_after"),
    (InputArena, "wipe", "look_after"),
    (InputArena, "drop_idle", "sweep"),
    (Slot, "sweep", "sweep"),
]


class Fault:
    """Raises the first time that what it stands for is called with the fault armed."""

    def __init__(self, patch: pytest.MonkeyPatch, where: Any, name: str) -> None:
        self.armed, self.raised = False, 0
        real = getattr(where, name)

        def faulty(*given: Any, **named: Any) -> Any:
            if self.armed:
                self.armed = False
                self.raised += 1
                raise RuntimeError(f"{name} fails")
            return real(*given, **named)

        patch.setattr(where, name, faulty)


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    """A loop with a time of its own, which calls go by too."""
    loop = Loop()
    stand_in(monkeypatch, loop)
    return loop


def a_desk(loop: Loop) -> Desk:
    """A dispatcher with two workers that are up."""
    settings = {"stopped_worker_seconds": 0}
    desk = loop.do(lambda: Desk(2, kernels=KERNELS, clock=loop.clock, settings=settings, max_calls=30))
    started = loop.create_task(desk.start())
    loop.rounds()
    assert started.done()
    return desk


class Day:
    """All that may happen to calls, one thing after another."""

    def __init__(self, loop: Loop, desk: Desk) -> None:
        self.loop, self.desk = loop, desk
        self.calls: list[Call] = []
        self.left: set[Call] = set()

    def send(self, *, large: bool = False, **given: Any) -> Call:
        x = LARGE_ARRAY if large else array(2, float(len(self.calls)))
        call = self.loop.do(lambda: self.desk.sent(x, **given))
        self.calls.append(call)
        return call

    def leave(self, call: Call) -> None:
        if not call.ended:
            self.left.add(call)
        self.loop.do(call.abandon)

    def work(self, *, failing: bool = False) -> None:
        """Workers exit that were killed, the others answer, callers say that they know of their calls' beginning."""
        for number in sorted(self.desk.lane.unheard):
            self.loop.do(self.desk.lane.unheard.pop(number))
        for end in self.desk.living:
            if end.ending:
                self.loop.do(end.exit)
            elif end.runs:
                self.loop.do(end.fail if failing else end.done)
        unsent, self.desk.lane.unsent = self.desk.lane.unsent, []
        for sent in unsent:
            self.loop.do(sent)
        self.loop.advance(0.01)

    def until_idle(self) -> None:
        for _ in range(300):
            if all(call.ended for call in self.calls) and not any(map(len, self.desk.in_flight)):
                return
            self.work()
            self.loop.advance(0.5)

    def pass_by(self) -> None:
        """The whole day."""
        for step in (self.answers, self.batches, self.leaving, self.beginnings, self.limits, self.deaths, self.rest):
            step()
            self.until_idle()

    def answers(self) -> None:
        for spec in (ONCE, PURE, LARGE, ONCE):
            self.send(spec=spec)
        self.work()
        self.work(failing=True)

    def batches(self) -> None:
        for _ in range(16):
            self.send(spec=BATCHED)
        self.work()
        self.work(failing=True)
        for _ in range(40):
            self.send(spec=ONCE, remaining_microseconds=1_000_000)

    def leaving(self) -> None:
        """Calls that wait, that are staged and sent, and that run."""
        for call in [self.send(spec=ONCE) for _ in range(6)]:
            self.leave(call)
        self.loop.advance(1.0)

    def beginnings(self) -> None:
        """Calls whose callers must know first: one does, one does not, one leaves."""
        first, second = self.send(spec=ONCE, attempt=1), self.send(spec=ONCE, attempt=1)
        others = [self.send(spec=ONCE, attempt=1) for _ in range(3)]
        self.leave(first)
        self.loop.advance(6.0)
        self.leave(second)
        self.leave(others[0])

    def limits(self) -> None:
        for spec in (TIMED, TIMED_BATCHED, ONCE):
            self.send(spec=spec)
        self.loop.advance(0.6)
        self.loop.advance(0.6)

    def deaths(self) -> None:
        for spec in (PURE, ONCE, PURE, ONCE):
            self.send(spec=spec)
        for end in self.desk.living:
            self.loop.do(lambda end=end: end.exit(-11))  # type: ignore[misc]
        self.loop.advance(6.0)
        self.send(spec=PURE)

    def rest(self) -> None:
        for _ in range(3):
            self.loop.advance(11.0)


@pytest.mark.parametrize(("where", "name", "place"), FAULTS)
def test_fault_loses_no_call(loop: Loop, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, place: str) -> None:
    """The fault is counted where it is caught, each call ends once, ended calls hold nothing, and work goes on."""
    fault = Fault(monkeypatch, where, name)
    desk = a_desk(loop)
    day = Day(loop, desk)
    with stopped(desk, loop):
        day.answers()
        day.until_idle()
        fault.armed = True
        day.pass_by()
        assert fault.raised == 1
        assert not loop.failures, loop.failures
        assert desk.caught(place) == 1
        assert sum(series.value for series in desk.errors._caught._series.values()) == 1
        for call in day.calls:
            assert call.ended
            assert len(desk.replies(call)) == (call not in day.left)
        assert not len(desk.backlog)
        assert not desk.arena.used_bytes
        assert not any(map(len, desk.in_flight))
        # Both workers serve.
        served = [day.send(spec=ONCE) for _ in range(2)]
        assert sum(bool(end.runs) for end in desk.living) == 2
        day.until_idle()
        assert all(desk.replies(call)[0].HasField("response") for call in served)


def test_day_without_a_fault_has_none(loop: Loop) -> None:
    """The same day with nothing failing catches nothing, and leaves nothing."""
    desk = a_desk(loop)
    day = Day(loop, desk)
    with stopped(desk, loop):
        day.pass_by()
        assert not desk.errors._caught._series
        assert not loop.failures
        desk.nothing_is_held()


@pytest.mark.parametrize("name", ["check", "Call"])
def test_fault_as_a_call_comes(loop: Loop, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Its caller hears INTERNAL with an id, the lane goes on, and the next call is taken."""
    fault = Fault(monkeypatch, intake_module, name)
    desk = a_desk(loop)
    lane, beside = Lane(), (desk.metrics, Tracing(), desk.errors)
    kernels = {spec.name: spec for spec in KERNELS}
    with stopped(desk, loop):
        intake = CallIntake(kernels, desk.arena, lambda _: desk.dispatcher, *beside, 1 << 20)
        fault.armed = True
        for number in (1, 2):
            descriptor = Descriptor(call=number)
            descriptor.request.kernel = "once"
            descriptor.request.parameters["k"].double_param = 1.0
            descriptor.request.tensors.add(name="a", datatype="FP64", shape=[1])
            descriptor.lengths.append(8)
            loop.do(
                lambda descriptor=descriptor: intake.accept(  # type: ignore[misc]
                    cast("LaneServer", lane), descriptor, [memoryview(bytes(8))]
                )
            )
        assert desk.caught("lane_accept") == 1
        ((told,),) = lane.replies.values()
        assert (told.failure.code, "an internal error in lane_accept" in told.failure.message) == (13, True)
        (end,) = (end for end in desk.living if end.runs)
        loop.do(end.done)
        assert [len(replies) for replies in lane.replies.values()] == [1, 1]
        desk.nothing_is_held()


def test_fault_as_a_call_is_read(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that cannot read a large call fails that call alone."""
    fault = Fault(monkeypatch, poison_module, "_digest")
    desk = a_desk(loop)
    day = Day(loop, desk)
    with stopped(desk, loop):
        call = day.send(spec=PURE, large=True)
        fault.armed = True
        (end,) = (end for end in desk.living if end.runs)
        loop.do(lambda: end.exit(-11))
        wait_for(loop, lambda: call.ended)
        assert desk.caught("poison_read") == 1
        assert desk.replies(call)[0].failure.code == 13
        assert not desk.poison._kinds
        day.until_idle()
        desk.nothing_is_held()


def test_fault_of_a_report(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes are told how much there is to do the next time."""
    fault = Fault(monkeypatch, Reports, "is_due")
    desk = a_desk(loop)
    reports: list[int] = []

    class Lanes:
        def report(self) -> None:
            reports.append(1)

    with stopped(desk, loop):
        settings = ComputeSettings.model_validate({"workers": 2})
        found = loop.do(lambda: Reports(desk.pool, desk.dispatcher, settings, desk.errors))
        task = loop.create_task(found.run(cast("Any", Lanes())))
        fault.armed = True
        for _ in range(40):
            loop.advance(0.025)
        task.cancel()
        loop.rounds()
        assert desk.caught("report") == 1
        assert reports


def wait_for(loop: Loop, condition: Callable[[], bool]) -> None:
    """Give a thread the time that it takes."""

    async def until() -> None:
        while not condition():
            await asyncio.to_thread(lambda: None)

    loop.run_until_complete(until())
