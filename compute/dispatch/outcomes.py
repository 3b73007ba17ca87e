"""Outcomes of a run's calls after each event of the run: the failure table of docs/architecture.md as code.

    outcomes(run, event) ──> [(call, outcome, refund)]        pure: no loop, no socket, no metric is touched
    the dispatcher's settle performs each

A row's `refund` says that the call was not run: what its tenant was charged in advance is given back. Rows of an event
that ends a run and have no refund share what the run has used.
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
    """Send the call's results, which lie in the run's reply segment."""

    tensors: Sequence[Tensor]
    ran: Ran


class Fail(msgspec.Struct, frozen=True):
    """End the call with an error."""

    error: UnlatchError
    ran: Ran | None = None


class FailRunning(msgspec.Struct, frozen=True):
    """Tell the caller an error. The worker may still read the call's memory, so its exit or reply ends the call."""

    error: UnlatchError
    ran: Ran | None = None


class Drop(msgspec.Struct, frozen=True):
    """Let go of a call that has had its answer, or needs none any more."""


class Requeue(msgspec.Struct, frozen=True):
    """Put back a call that was not begun: it is next again."""


class RunAlone(msgspec.Struct, frozen=True):
    """Put back a call that was begun: it is next again, and runs alone. `died` says that a worker died meanwhile."""

    died: bool = False


class Strike(msgspec.Struct, frozen=True):
    """Find out whether the call is poison, and then go by `verdict`: a worker died while it ran this call alone."""

    why: str
    lost: Unavailable


Outcome = Answer | Fail | FailRunning | Drop | Requeue | RunAlone | Strike

DROP, REQUEUE, RUN_ALONE = Drop(), Requeue(), RunAlone()


class Settled(NamedTuple):
    """A call, what becomes of it, and whether its tenant is charged nothing for it."""

    call: Call
    outcome: Outcome
    refund: bool = False


def outcomes(run: Run, event: Event) -> list[Settled]:
    """Return the outcome of each call of a run after an event. Calls without a row stay in the run."""
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
    """Return the outcomes after `outcomes` itself has failed: each call that the event is about fails."""
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
    """Return the outcome of a call of which a worker has died, once it is known whether the call is `poison`."""
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
            # It was cancelled before the worker began it.
            rows.append(Settled(call, DROP, refund=True))
        else:
            rows.append(Settled(call, DROP if call.ended else Answer(result.tensors, ran)))
    return rows


def _failed(run: Run, event: Replied, failed: Failed) -> list[Settled]:
    if len(run.numbers) > 1:
        # One of several is at fault, and alone is to fail: each runs again by itself.
        return [Settled(call, DROP if call.ended else RUN_ALONE) for call in run.numbers]
    error = from_code(failed.code, failed.message, field=failed.field)
    ran = Ran(event.usage.seconds, run.worker)
    return [Settled(call, DROP if call.ended else Fail(error, ran)) for call in run.numbers]


def _exited(run: Run, event: WorkerExited) -> list[Settled]:
    begun = run.state is RunState.RUNNING
    outcome = _begun(run, event) if begun else _not_begun(run, event)
    return [Settled(call, DROP if call.ended else outcome, refund=not begun) for call in run.numbers]


def _begun(run: Run, event: WorkerExited) -> Outcome:
    """Return the outcome of each call of a run that was executing when its worker exited."""
    if event.stopping:
        return Fail(Unavailable(f"worker {run.worker} ended: {event.exit}"))
    lost = Unavailable(f"worker {run.worker} ended while it ran the call: {event.exit}")
    alone = len(run.numbers) == 1
    if event.exit.blames_call and alone:
        return Strike(str(event.exit), lost)
    # Of several it is not known which it was: each has the next worker for itself, and then it will be.
    return RunAlone(died=event.exit.blames_call) if run.spec.pure else Fail(lost)


def _not_begun(run: Run, event: WorkerExited) -> Outcome:
    """Return the outcome of each call of a run that was staged when its worker exited."""
    if event.stopping:
        return Fail(Unavailable(f"worker {run.worker} ended: {event.exit}"))
    if run.is_sent and event.exit.may_have_begun_next and not run.spec.pure:
        # What must not run twice is not run again.
        return Fail(Unavailable(f"worker {run.worker} ended, and may have begun the call: {event.exit}"))
    return REQUEUE


def _timed_out(run: Run) -> list[Settled]:
    if run.runs_again_alone:
        # Which of several took so long shows when each runs alone: the worker's exit has them do so.
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
