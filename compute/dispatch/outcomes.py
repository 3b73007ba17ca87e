"""Decide the outcome of each call of a run after an event: the failure table of docs/architecture.md as code.

    outcomes(run, event) ──> [(call, outcome, refund)]        pure: it touches no event loop, socket or metric
    Dispatcher.settle carries each outcome out

`refund` means that the call was not run, so its tenant gets back what it was charged in advance. When an event ends a
run, the rows without a refund share the cost of the run.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from unlatch.common.errors import DeadlineExceeded, ResourceExhausted, Unavailable, UnlatchError, from_code
from unlatch.compute.call import Call, Ran
from unlatch.compute.ipc.frames import Failed, Tensor
from unlatch.compute.pool.run import (
    Event,
    MemoryExceeded,
    NotHeard,
    Replied,
    Run,
    RunState,
    TimedOut,
    Withdrawn,
    WorkerExited,
)


class Answer(msgspec.Struct, frozen=True):
    """Send the call's results from the run's reply segment."""

    tensors: Sequence[Tensor]
    ran: Ran


class Fail(msgspec.Struct, frozen=True):
    """End the call with an error."""

    error: UnlatchError
    ran: Ran | None = None


class FailRunning(msgspec.Struct, frozen=True):
    """Send the caller an error, but keep the call's memory until the worker replies or exits: it may still read it."""

    error: UnlatchError
    ran: Ran | None = None


class Drop(msgspec.Struct, frozen=True):
    """Free a call that was answered already, or whose caller has left."""


class Requeue(msgspec.Struct, frozen=True):
    """Put back a call that was not begun, at the head of the backlog."""


class RunAlone(msgspec.Struct, frozen=True):
    """Put back a call that was begun, at the head of the backlog, to run alone. `died`: a worker died in its run."""

    died: bool = False


class Strike(msgspec.Struct, frozen=True):
    """Check whether the call is poison, then apply `verdict`: a worker died while it ran this call alone."""

    why: str
    lost: Unavailable


Outcome = Answer | Fail | FailRunning | Drop | Requeue | RunAlone | Strike

DROP, REQUEUE, RUN_ALONE = Drop(), Requeue(), RunAlone()


class Settled(NamedTuple):
    """A call, its outcome, and whether its tenant gets back what it was charged for it."""

    call: Call
    outcome: Outcome
    refund: bool = False


def outcomes(run: Run, event: Event) -> list[Settled]:
    """Return the outcomes of a run's calls after an event. Calls without a row stay in the run."""
    match event:
        case Replied():
            return _replied(run, event)
        case WorkerExited():
            return _exited(run, event)
        case TimedOut():
            return _timed_out(run)
        case MemoryExceeded():
            return _memory_exceeded(run, event)
        case NotHeard():
            late = Unavailable("its caller has not said in time that it knows of its beginning")
            return [Settled(call, DROP if call.ended else Fail(late), refund=True) for call in event.calls]
        case Withdrawn():
            return [Settled(event.call, DROP, refund=True)]


def unexpected(run: Run, event: Event, error: UnlatchError) -> list[Settled]:
    """Return the outcomes after `outcomes` itself has raised: each call that the event concerns fails with `error`."""
    match event:
        case Replied() | WorkerExited():
            return [Settled(call, DROP if call.ended else Fail(error)) for call in run.numbers]
        case TimedOut() | MemoryExceeded():
            return [Settled(call, FailRunning(error)) for call in run.numbers if not call.ended]
        case NotHeard(calls=calls):
            return [Settled(call, Fail(error), refund=True) for call in calls]
        case Withdrawn(call=call):
            return [Settled(call, DROP, refund=True)]


def verdict(call: Call, strike: Strike, poison: UnlatchError | None) -> Outcome:
    """Return the outcome of a call whose run killed a worker. `poison` is the error if it is poison, else None."""
    if call.ended:
        return DROP
    if poison is None and call.spec.pure:
        return RUN_ALONE
    return Fail(poison or strike.lost)


def _replied(run: Run, event: Replied) -> list[Settled]:
    if isinstance(event.frame, Failed):
        return _failed(run, event, event.frame)
    ran = Ran(event.usage.seconds, run.worker, len(event.results))
    rows = []
    for call, number in run.numbers.items():
        result = event.results.get(number)
        if result is None:
            # The call was cancelled before the worker began it.
            rows.append(Settled(call, DROP, refund=True))
        else:
            rows.append(Settled(call, DROP if call.ended else Answer(result.tensors, ran)))
    return rows


def _failed(run: Run, event: Replied, failed: Failed) -> list[Settled]:
    if len(run.numbers) > 1:
        # Only the call at fault may fail, and it is unknown which one that is: each call runs again alone.
        return [Settled(call, DROP if call.ended else RUN_ALONE) for call in run.numbers]
    error = from_code(failed.code, failed.message, field=failed.field)
    ran = Ran(event.usage.seconds, run.worker)
    return [Settled(call, DROP if call.ended else Fail(error, ran)) for call in run.numbers]


def _exited(run: Run, event: WorkerExited) -> list[Settled]:
    begun = run.state is RunState.RUNNING
    outcome = _begun(run, event) if begun else _not_begun(run, event)
    return [Settled(call, DROP if call.ended else outcome, refund=not begun) for call in run.numbers]


def _begun(run: Run, event: WorkerExited) -> Outcome:
    """Return the outcome of each call of a run whose worker exited during the run."""
    if event.stopping:
        return Fail(Unavailable(f"worker {run.worker} ended: {event.exit}"))
    lost = Unavailable(f"worker {run.worker} ended while it ran the call: {event.exit}")
    alone = len(run.numbers) == 1
    if event.exit.blames_call and alone:
        return Strike(str(event.exit), lost)
    # It is unknown which of several calls killed the worker. Each runs again alone, which shows it.
    return RunAlone(died=event.exit.blames_call) if run.spec.pure else Fail(lost)


def _not_begun(run: Run, event: WorkerExited) -> Outcome:
    """Return the outcome of each call of a staged run whose worker exited."""
    if event.stopping:
        return Fail(Unavailable(f"worker {run.worker} ended: {event.exit}"))
    if run.is_sent and event.exit.may_have_begun_next and not run.spec.pure:
        # A call that must not run twice is not run again.
        return Fail(Unavailable(f"worker {run.worker} ended, and may have begun the call: {event.exit}"))
    return REQUEUE


def _timed_out(run: Run) -> list[Settled]:
    if run.runs_again_alone:
        # No outcome yet: the worker is killed, and its exit makes each call run again alone. That shows the slow one.
        return []
    limit = run.spec.timeout_seconds or 0.0
    error = DeadlineExceeded(f"kernel {run.spec.name} ran for longer than its timeout of {limit:.3g} s")
    return _tell(run, error, limit)


def _memory_exceeded(run: Run, event: MemoryExceeded) -> list[Settled]:
    if run.runs_again_alone:
        return []
    return _tell(run, ResourceExhausted(f"kernel {run.spec.name} {event.message}"), event.seconds)


def _tell(run: Run, error: UnlatchError, seconds: float) -> list[Settled]:
    ran = Ran(seconds, run.worker, len(run.numbers))
    return [Settled(call, FailRunning(error, ran)) for call in run.numbers if not call.ended]
