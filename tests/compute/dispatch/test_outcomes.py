"""Outcomes of a run's calls: each row of the failure table of docs/architecture.md, by the code that decides it."""

from dataclasses import replace
from typing import Any, cast

import pytest

from unlatch.common.errors import DeadlineExceeded, FailedPrecondition, Internal, ResourceExhausted, UnlatchError
from unlatch.common.waiting.demand import UNKNOWN
from unlatch.compute.call import Ran
from unlatch.compute.dispatch.outcomes import (
    Answer,
    Drop,
    Fail,
    FailRunning,
    Outcome,
    Requeue,
    RunAlone,
    Strike,
    outcomes,
    unexpected,
    verdict,
)
from unlatch.compute.ipc.frames import Done, Failed, Result
from unlatch.compute.pool import exits
from unlatch.compute.pool.run import (
    Event,
    LimitReached,
    Replied,
    Run,
    RunState,
    TakenOut,
    Usage,
    WorkerExited,
)

USAGE = Usage(2.0, 1.5, finished=True)
SEGFAULT, NONSENSE = exits.by_itself(-11), exits.NO_FRAME
WENT_ON = replace(exits.ABANDONED, may_have_begun_next=True)


class Spec:
    """A kernel."""

    name = "k"
    timeout_seconds = 0.5
    concurrency = None

    def __init__(self, *, pure: bool) -> None:
        self.pure = pure


class Call:
    """A call of it."""

    estimate = UNKNOWN
    must_be_known = False

    def __init__(self, *, pure: bool, ended: bool) -> None:
        self.spec = Spec(pure=pure)
        self.ended = ended


def a_run(kind: str, state: RunState) -> Run:
    """A run of a call for each word: `pure` or `once` (not pure), with a `-` before it where its caller has left."""
    calls = [Call(pure=word.endswith("pure"), ended=word.startswith("-")) for word in kind.split()]
    numbers = cast("Any", {call: number for number, call in enumerate(calls, start=1)})
    run = Run(7, numbers, cast("Any", None), cast("Any", None), 0.0)
    run.state = state
    return run


def done(*numbers: int) -> Event:
    results = {number: Result(number, ()) for number in numbers}
    return Replied(Done(tuple(results.values()), 0), results, USAGE)


def died(cause: exits.Exit, *, stopping: bool = False) -> Event:
    return WorkerExited(cause, stopping, USAGE)


FAILED = Replied(Failed(1, 3, "no", "a", "", 0), {}, USAGE)
STOPPED_POOL = died(exits.POOL_STOPS, stopping=True)
LATE, OVER = LimitReached(DeadlineExceeded("late"), 0.5), LimitReached(ResourceExhausted("took 9 bytes"), 3.0)
STAGED, ANNOUNCED, SENT, RUNNING = RunState.STAGED, RunState.ANNOUNCED, RunState.SENT, RunState.RUNNING

# The calls, how far their run had come, what happens; then what becomes of each. "+ refund": its tenant pays nothing.
TABLE: list[tuple[str, RunState, Event, str]] = [
    # The worker answers.
    ("pure", RUNNING, done(1), "answer"),
    ("once", RUNNING, done(1), "answer"),
    ("-pure", RUNNING, done(1), "drop"),
    ("-once", RUNNING, done(1), "drop"),
    ("pure pure", RUNNING, done(1, 2), "answer, answer"),
    ("pure -pure", RUNNING, done(1, 2), "answer, drop"),
    ("pure -pure", RUNNING, done(1), "answer, drop + refund"),
    ("-once once -once", RUNNING, done(2, 3), "drop + refund, answer, drop"),
    # The kernel raises.
    ("pure", RUNNING, FAILED, "INVALID_ARGUMENT"),
    ("once", RUNNING, FAILED, "INVALID_ARGUMENT"),
    ("-once", RUNNING, FAILED, "drop"),
    ("pure pure", RUNNING, FAILED, "alone, alone"),
    ("once once", RUNNING, FAILED, "alone, alone"),
    ("pure -pure pure", RUNNING, FAILED, "alone, drop, alone"),
    ("-pure -pure", RUNNING, FAILED, "drop, drop"),
    # The worker dies of the call that it runs: whether that is poison is to be found out.
    ("pure", RUNNING, died(SEGFAULT), "strike"),
    ("once", RUNNING, died(SEGFAULT), "strike"),
    ("-pure", RUNNING, died(SEGFAULT), "drop"),
    ("once", RUNNING, died(NONSENSE), "strike"),
    ("once", RUNNING, died(exits.STOPPED), "strike"),
    ("once", RUNNING, died(exits.HUNG_UP), "strike"),
    # Of several it is not known which it was.
    ("pure pure", RUNNING, died(SEGFAULT), "alone + death, alone + death"),
    ("once once", RUNNING, died(SEGFAULT), "ABORTED, ABORTED"),
    ("pure -pure", RUNNING, died(SEGFAULT), "alone + death, drop"),
    ("-once once", RUNNING, died(NONSENSE), "drop, ABORTED"),
    # The worker is killed for a reason that is not the call's doing.
    ("pure", RUNNING, died(exits.TIMED_OUT), "alone"),
    ("once", RUNNING, died(exits.TIMED_OUT), "ABORTED"),
    ("-once", RUNNING, died(exits.TIMED_OUT), "drop"),
    ("pure pure", RUNNING, died(exits.TIMED_OUT), "alone, alone"),
    ("pure", RUNNING, died(exits.OVER_LIMIT), "alone"),
    ("-once", RUNNING, died(exits.OVER_LIMIT), "drop"),
    ("-pure", RUNNING, died(exits.ABANDONED), "drop"),
    ("pure", RUNNING, died(exits.INTERNAL_ERROR), "alone"),
    ("once", RUNNING, died(exits.INTERNAL_ERROR), "ABORTED"),
    # What was staged behind goes back.
    ("pure", STAGED, died(SEGFAULT), "requeue + refund"),
    ("once", STAGED, died(SEGFAULT), "requeue + refund"),
    ("once", ANNOUNCED, died(SEGFAULT), "requeue + refund"),
    ("once", SENT, died(SEGFAULT), "requeue + refund"),
    ("-once", SENT, died(SEGFAULT), "drop + refund"),
    ("once once", SENT, died(exits.ABANDONED), "requeue + refund, requeue + refund"),
    ("pure", SENT, died(exits.TIMED_OUT), "requeue + refund"),
    # But for what the worker may have begun unseen, and must not run twice.
    ("pure", SENT, died(NONSENSE), "requeue + refund"),
    ("once", SENT, died(NONSENSE), "ABORTED + refund"),
    ("once", SENT, died(exits.OTHER_CALL), "ABORTED + refund"),
    ("once", SENT, died(exits.UNSOUND_REPLY), "ABORTED + refund"),
    ("once", SENT, died(exits.INTERNAL_ERROR), "ABORTED + refund"),
    ("once", SENT, died(WENT_ON), "ABORTED + refund"),
    ("-once once", SENT, died(NONSENSE), "drop + refund, ABORTED + refund"),
    ("once", ANNOUNCED, died(NONSENSE), "requeue + refund"),
    ("once", STAGED, died(WENT_ON), "requeue + refund"),
    # The pool stops.
    ("pure", RUNNING, STOPPED_POOL, "UNAVAILABLE"),
    ("-pure", RUNNING, STOPPED_POOL, "drop"),
    ("pure", STAGED, STOPPED_POOL, "UNAVAILABLE + refund"),
    ("once", SENT, STOPPED_POOL, "UNAVAILABLE + refund"),
    ("pure", RUNNING, died(SEGFAULT, stopping=True), "UNAVAILABLE"),
    ("once", RUNNING, STOPPED_POOL, "ABORTED"),
    ("once", RUNNING, died(SEGFAULT, stopping=True), "ABORTED"),
    ("once", SENT, died(WENT_ON, stopping=True), "ABORTED + refund"),
    ("pure", SENT, died(WENT_ON, stopping=True), "UNAVAILABLE + refund"),
    # The kernel's timeout: the caller hears of it now, its memory is the worker's until that exits or answers.
    ("pure", RUNNING, LATE, "told DEADLINE_EXCEEDED"),
    ("once", RUNNING, LATE, "told DEADLINE_EXCEEDED"),
    ("-once", RUNNING, LATE, ""),
    ("once -once once", RUNNING, LATE, "told DEADLINE_EXCEEDED, told DEADLINE_EXCEEDED"),
    ("pure pure", RUNNING, LATE, ""),
    # The memory limit.
    ("pure", RUNNING, OVER, "told RESOURCE_EXHAUSTED"),
    ("once once", RUNNING, OVER, "told RESOURCE_EXHAUSTED, told RESOURCE_EXHAUSTED"),
    ("-pure", RUNNING, OVER, ""),
    ("pure pure", RUNNING, OVER, ""),
]


def told(outcome: Outcome) -> str:
    """An outcome in the table's words."""
    match outcome:
        case Fail(error=error):
            return error.status
        case FailRunning(error=error):
            return f"told {error.status}"
        case RunAlone(died=True):
            return "alone + death"
    return {Answer: "answer", Drop: "drop", Requeue: "requeue", RunAlone: "alone", Strike: "strike"}[type(outcome)]


@pytest.mark.parametrize(("calls", "state", "event", "expected"), TABLE)
def test_outcome(calls: str, state: RunState, event: Event, expected: str) -> None:
    """Each call of the run has the outcome that the table says, in the run's order."""
    rows = outcomes(a_run(calls, state), event)
    assert ", ".join(told(row.outcome) + " + refund" * row.refund for row in rows) == expected


@pytest.mark.parametrize(
    ("call", "poison", "expected"),
    [
        ("pure", None, "alone"),
        ("once", None, "ABORTED"),
        ("-pure", None, "drop"),
        ("-once", None, "drop"),
        ("pure", FailedPrecondition("poison"), "FAILED_PRECONDITION"),
        ("once", FailedPrecondition("poison"), "FAILED_PRECONDITION"),
        ("-pure", FailedPrecondition("poison"), "drop"),
        ("pure", Internal("it could not be read"), "INTERNAL"),
    ],
)
def test_verdict_on_a_call_that_a_worker_died_of(call: str, poison: UnlatchError | None, expected: str) -> None:
    """A pure kernel's call runs again, unless it is poison or its caller has left."""
    run = a_run(call, RUNNING)
    ((_, strike, _),) = outcomes(a_run(call.removeprefix("-"), RUNNING), died(SEGFAULT))
    assert isinstance(strike, Strike)
    assert told(verdict(run.first, strike, poison)) == expected


def test_calls_that_are_not_begun() -> None:
    """A caller who does not say that it knows, and one that leaves, cost their own calls alone, and no tenant."""
    run = a_run("once once", ANNOUNCED)
    silent, other = run.numbers
    ((call, outcome, refund),) = outcomes(run, TakenOut((silent,)))
    assert (call, told(outcome), refund) == (silent, "UNAVAILABLE", True)
    cast("Call", other).ended = True
    ((call, outcome, refund),) = outcomes(run, TakenOut((other,)))
    assert (call, told(outcome), refund) == (other, "drop", True)


@pytest.mark.parametrize("event", [done(1), died(SEGFAULT), LATE, OVER])
def test_no_outcome_loses_a_call(event: Event) -> None:
    """When deciding itself fails, each call of the run fails in its place."""
    rows = unexpected(a_run("pure once", RUNNING), event, Internal("it has an id"))
    assert [told(row.outcome).removeprefix("told ") for row in rows] == ["INTERNAL", "INTERNAL"]


def test_what_callers_are_told() -> None:
    """Messages name the worker and why; a reply's run is told by its seconds, its worker and its calls."""
    (row,) = outcomes(a_run("once", RUNNING), died(exits.TIMED_OUT))
    assert str(cast("Fail", row.outcome).error) == (
        "worker 7 ended while it ran the call: the kernel ran for longer than its timeout"
    )
    (row,) = outcomes(a_run("once", SENT), died(NONSENSE))
    assert str(cast("Fail", row.outcome).error) == (
        "worker 7 ended, and may have begun the call: the worker sent an undecodable frame"
    )
    (row,) = outcomes(a_run("once", RUNNING), LATE)
    assert cast("FailRunning", row.outcome) == FailRunning(LATE.error, Ran(0.5, 7))
    (row,) = outcomes(a_run("pure", RUNNING), OVER)
    assert cast("FailRunning", row.outcome) == FailRunning(OVER.error, Ran(3.0, 7))
    rows = outcomes(a_run("pure -pure pure", RUNNING), done(1, 3))
    assert {cast("Answer", row.outcome).ran for row in rows if not row.call.ended} == {Ran(2.0, 7, 2)}
