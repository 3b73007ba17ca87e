"""A run: one execution of a kernel, of one call or of several, which one worker has.

    STAGED ──> ANNOUNCED ──> SENT ──> RUNNING ──> OVER
      └──────────────────────^  calls that need no announcement

A call that must not run twice is begun only when its caller has said that it knows: a caller who does not know would
send it elsewhere if this replica were lost. What tells the caller may be lost with the replica, too: only the answer
is proof (docs/decisions/0014).

What happens to a run is an `Event`. compute/dispatch/outcomes.py says what becomes of its calls then.
"""

import asyncio
from collections.abc import Callable
from enum import Enum, auto

import msgspec

from unlatch.compute.call import Call
from unlatch.compute.ipc.arena import ReplySegments, Segment
from unlatch.compute.ipc.frames import Done, Failed, Result
from unlatch.compute.pool.exits import Exit


class RunState(Enum):
    """How far a run has come."""

    STAGED = auto()  # behind another run, or about to be sent
    ANNOUNCED = auto()  # callers are told that it is about to begin; the worker has not got it
    SENT = auto()  # the worker has it, and has another before it
    RUNNING = auto()  # the worker is in it
    OVER = auto()  # nothing of it is in the worker any more


class Usage(msgspec.Struct, frozen=True):
    """Usage of a run: seconds by the clock, processor seconds, and whether the kernel came to its end."""

    seconds: float
    cpu_seconds: float
    finished: bool


class Replied(msgspec.Struct, frozen=True):
    """The worker has answered the run with a sound frame. `results` are a Done frame's by the calls' numbers."""

    frame: Done | Failed
    results: dict[int, Result]
    usage: Usage


class WorkerExited(msgspec.Struct, frozen=True):
    """The worker that had the run is gone. `usage` is None where it had not begun the run."""

    exit: Exit
    stopping: bool
    usage: Usage | None


class TimedOut(msgspec.Struct, frozen=True):
    """The run has taken its kernel's timeout."""


class MemoryExceeded(msgspec.Struct, frozen=True):
    """The run has taken too much memory in so many seconds. `message` says how much, and the limit."""

    message: str
    seconds: float


class NotHeard(msgspec.Struct, frozen=True):
    """The callers of these calls have not confirmed in time that they know of the run's beginning."""

    calls: tuple[Call, ...]


class Withdrawn(msgspec.Struct, frozen=True):
    """The caller of a call has left before the worker was given the run."""

    call: Call


Event = Replied | WorkerExited | TimedOut | MemoryExceeded | NotHeard | Withdrawn


class Run:
    """A run, and its calls with the numbers that the worker knows them by.

    `segment` is lent from when the run is made until the last reply in it is read, or will never be written.
    """

    def __init__(
        self, worker: int, numbers: dict[Call, int], segment: Segment, replies: ReplySegments, now: float
    ) -> None:
        self.worker = worker
        self.numbers = numbers
        self.segment = segment
        self.first = next(iter(numbers))
        self.spec = self.first.spec
        self.state = RunState.STAGED
        self.expected_seconds = self.first.estimate.seconds * len(numbers)
        self.begun = now
        # What ends the time of a run that is begun.
        self.timer: asyncio.TimerHandle | None = None
        # Calls that may have effects: whose callers have yet to be told of their start, and to say that they know.
        self._untold = [call for call in numbers if call.must_be_known]
        self._unheard: set[Call] = set()
        self._unread = set(numbers)
        self._replies = replies

    @property
    def wanted(self) -> bool:
        """Whether a caller waits for it."""
        return not self.first.ended or any(not call.ended for call in self.numbers)

    @property
    def runs_again_alone(self) -> bool:
        """Whether a failure of it says nothing of each call: several of a pure kernel, which run again one by one."""
        return self.spec.pure and len(self.numbers) > 1

    @property
    def is_sent(self) -> bool:
        """Whether the worker has been given it."""
        return self.state is RunState.RUNNING or self.state is RunState.SENT

    @property
    def must_be_announced(self) -> bool:
        """Whether callers must still be told that it is about to begin."""
        return self.state is RunState.STAGED and bool(self._untold)

    @property
    def may_be_sent(self) -> bool:
        """Whether the worker may be given it: all callers who must know of its beginning do."""
        return not self._untold and not self._unheard

    @property
    def unheard(self) -> tuple[Call, ...]:
        """Calls whose callers have been told, and have not said that they know."""
        return tuple(self._unheard)

    def announce(self, heard: Callable[["Run", Call], None]) -> bool:
        """Tell callers who must know that it is about to begin; whether `heard` is still to be called for some."""
        self.state = RunState.ANNOUNCED
        untold, self._untold = self._untold, []
        for call in untold:

            def known(call: Call = call) -> None:
                heard(self, call)

            if call.announce(known):
                self._unheard.add(call)
        return bool(self._unheard)

    def known_to(self, call: Call) -> None:
        """Take in that a call's caller knows of the beginning."""
        self._unheard.discard(call)

    def take_out(self, call: Call) -> None:
        """Let go of a call that the worker has not been given."""
        del self.numbers[call]
        self._unheard.discard(call)
        if call in self._untold:
            self._untold.remove(call)

    def begin(self, now: float) -> None:
        """Take in that the worker is in it from now on."""
        self.state = RunState.RUNNING
        self.begun = now

    def end(self) -> None:
        """Take in that nothing of it is in the worker any more."""
        self.state = RunState.OVER
        self.stop_timer()

    def stop_timer(self) -> None:
        """End the time of the run no more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def read(self, call: Call) -> None:
        """Take in that the call's reply has been read from the segment, or will never be written to it."""
        if call in self._unread:
            self._unread.discard(call)
            if not self._unread:
                self._replies.give_back(self.segment)
