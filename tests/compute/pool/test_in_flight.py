"""Runs in flight on their own: what callers are told of limits, by workers that are a test's."""

from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from tests.compute.dispatch.test_machine import stopped
from tests.support.dispatch import Desk, Loop, array, kernel, stand_in
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.telemetry import log_ration
from unlatch.compute.ipc.frames import Failed
from unlatch.compute.pool import exits

ONCE, TIMED = kernel("once"), kernel("timed", timeout_seconds=0.5)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A dispatcher with one worker that is up, and a loop with a time of its own."""
    loop = Loop()
    stand_in(monkeypatch, loop)
    settings = {"stopped_worker_seconds": 0}
    desk = loop.do(lambda: Desk(1, kernels=[ONCE, TIMED], clock=loop.clock, settings=settings))
    loop.create_task(desk.start())
    loop.rounds()
    with stopped(desk, loop):
        yield desk


def test_caller_is_told_of_a_limit(desk: Desk) -> None:
    """A run that reaches its kernel's timeout, or the memory limit, fails with the limit in the message."""
    loop, messages = desk.loop, []
    for cause in ("timeout", "memory"):
        call = loop.do(lambda: desk.sent(array(), spec=TIMED))
        (flight,) = desk.in_flight
        if cause == "timeout":
            loop.advance(0.6)
        else:
            loop.do(lambda flight=flight: flight.refuse("took 9 bytes of memory", exits.OVER_LIMIT))  # type: ignore[misc]
        (reply,) = desk.replies(call)
        messages.append((reply.failure.code, reply.failure.message))
        loop.advance(1.0)
        (end,) = desk.living
        assert end.ending
        loop.do(end.exit)
        loop.advance(1.0)
    assert messages == [
        (4, "kernel timed ran for longer than its timeout of 0.5 s"),
        (8, "kernel timed took 9 bytes of memory"),
    ]


def test_no_stage_takes_less_than_no_time(desk: Desk) -> None:
    """A worker begins a staged run before its last reply is read. The run is then longer than the wait for it."""
    loop = desk.loop
    calls = [loop.do(lambda: desk.sent(array(), spec=ONCE)) for _ in range(2)]
    (end,) = desk.living
    loop.advance(0.05)
    loop.do(lambda: end.done(0.01))
    loop.advance(0.01)
    loop.do(lambda: end.done(0.05))
    assert all(call.ended for call in calls)
    stages = desk.metrics._stages._series
    assert {labels: series.sum for labels, series in stages.items() if series.sum < 0} == {}
    assert stages["once", "run"].sum == pytest.approx(0.06)


def test_flood_of_failures_fills_no_log(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten tracebacks a second of a kernel are logged. The next line has how many were left out."""
    now = 1000.0
    monkeypatch.setattr(log_ration, "monotonic", lambda: now)
    (end,) = desk.living

    def fail(spec: KernelSpec) -> None:
        desk.loop.do(lambda: desk.sent(array(), spec=spec))
        run = end.runs.popleft()
        desk.loop.do(lambda: end.say(Failed(run.members[0].call, 13, "it failed", "", "Traceback", 0)))

    with capture_logs([log_ration.LogRations()]) as lines:
        for _ in range(400):
            fail(ONCE)
        fail(TIMED)
        now += 1.0
        fail(ONCE)
    assert [line["kernel"] for line in lines] == ["once"] * 10 + ["timed", "once"]
    assert [line.get("left_out") for line in lines] == [None] * 11 + [390]
    assert all(line["exception"] == "Traceback" for line in lines)
    assert desk.metrics.worker_calls.labels("0", "once", "error").value == 401
