"""Decide the outcome of each call of a run after an event: the failure table of docs/architecture.md as code.

    outcomes(run, event) ──> [(call, outcome, refund)]        pure: it touches no event loop, socket or metric
    Dispatcher.settle carries each outcome out

`refund` means that the call was not run, so its tenant gets back what it was charged in advance. When an event ends a
run, the rows without a refund share the cost of the run.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from unlatch.common.errors import Aborted, Unavailable, UnlatchError, error_class
from unlatch.compute.call import Call, Ran
from unlatch.compute.ipc.frames import Failed, Tensor
from unlatch.compute.pool.run import Event, LimitReached, Replied, Run, RunState, TakenOut, WorkerExited


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
    lost: UnlatchError


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
        case LimitReached():
            if run.runs_again_alone:
                # No outcome yet: the worker is killed, and its exit makes each call run again alone. That shows which
                # call it was.
                return []
            ran = Ran(event.seconds, run.worker, len(run.numbers))
            return [Settled(call, FailRunning(event.error, ran)) for call in run.numbers if not call.ended]
        case TakenOut():
            late = Unavailable("the gateway did not confirm in time that it knows of the beginning of this call")
            return _each(event.calls, Fail(late), refund=True)


def unexpected(run: Run, event: Event, error: UnlatchError) -> list[Settled]:
    """Return the outcomes after `outcomes` itself has raised: each call that the event concerns fails with `error`."""
    match event:
        case Replied() | WorkerExited():
            return _each(run.numbers, Fail(error))
        case LimitReached():
            return [Settled(call, FailRunning(error)) for call in run.numbers if not call.ended]
        case TakenOut():
            return _each(event.calls, Fail(error), refund=True)


def verdict(call: Call, strike: Strike, poison: UnlatchError | None) -> Outcome:
    """Return the outcome of a call whose run killed a worker. `poison` is the error if it is poison, else None."""
    if call.ended:
        return DROP
    if poison is None and call.spec.pure:
        return RUN_ALONE
    return Fail(poison or strike.lost)


def _each(calls: Iterable[Call], outcome: Outcome, *, refund: bool = False) -> list[Settled]:
    """Return the same outcome for each call. A call that has ended is dropped."""
    return [Settled(call, DROP if call.ended else outcome, refund) for call in calls]


def _replied(run: Run, event: Replied) -> list[Settled]:
    if isinstance(event.frame, Failed):
        return _failed(run, event, event.frame)
    ran = _ran(run, event, len(event.results))
    rows = []
    for call, number in run.numbers.items():
        result = event.results.get(number)
        if result is None:
            # The call was cancelled before the worker began it.
            rows.append(Settled(call, DROP, refund=True))
        else:
            rows.append(Settled(call, DROP if call.ended else Answer(result.tensors, ran)))
    return rows


def _ran(run: Run, event: Replied, calls: int = 1) -> Ran:
    cpu_seconds = event.usage.cpu_seconds if run.spec.concurrency is not None else 0.0
    return Ran(event.usage.seconds, run.worker, calls, cpu_seconds)


def _failed(run: Run, event: Replied, failed: Failed) -> list[Settled]:
    if len(run.numbers) > 1:
        # Only the call at fault may fail, and it is unknown which one that is: each call runs again alone.
        return _each(run.numbers, RUN_ALONE)
    error = error_class(failed.code)(failed.message, field=failed.field)
    return _each(run.numbers, Fail(error, _ran(run, event)))


def _exited(run: Run, event: WorkerExited) -> list[Settled]:
    begun = run.state is RunState.RUNNING
    outcome = _begun(run, event) if begun else _not_begun(run, event)
    return _each(run.numbers, outcome, refund=not begun)


def _begun(run: Run, event: WorkerExited) -> Outcome:
    """Return the outcome of each call of a run whose worker exited during the run."""
    cause = event.exit
    if event.stopping:
        return Fail(_lost(run, f"ended: {cause}"))
    lost = _lost(run, f"ended while it ran the call: {cause}")
    if cause.blames_call and len(run.numbers) == 1 and not event.beside:
        return Strike(str(cause), lost)
    # It is unknown which of several calls killed the worker. Each runs again alone, which shows it. Calls of an async
    # worker run again in smaller and smaller companies (compute/pool/side_by_side.py).
    return RunAlone(died=cause.blames_call and not event.beside) if run.spec.pure else Fail(lost)


def _not_begun(run: Run, event: WorkerExited) -> Outcome:
    """Return the outcome of each call of a staged run whose worker exited."""
    cause = event.exit
    if run.is_sent and cause.may_have_begun_next and not run.spec.pure:
        # A call that must not run twice is not run again.
        return Fail(_lost(run, f"ended, and may have begun the call: {cause}"))
    return Fail(Unavailable(f"worker {run.worker} ended: {cause}")) if event.stopping else REQUEUE


def _lost(run: Run, what: str) -> UnlatchError:
    """Return the error of a call that may have begun. It says whether the call may have had an effect."""
    kind = Unavailable if run.spec.pure else Aborted
    return kind(f"worker {run.worker} {what}")
