"""A run: one execution of a kernel by one worker, for one call or for several.

    STAGED ──> ANNOUNCED ──> SENT ──> RUNNING
      └──────────────────────^  calls that need no announcement

A call that must not run twice is begun only after its caller (the gateway) has confirmed that it knows of the
beginning. Otherwise, if this replica were lost, the caller would send the call to another one. Telling the caller is
not enough: the message may be lost with the replica (docs/decisions/0014).

An `Event` is something that happens to a run. compute/dispatch/outcomes.py decides the outcome of its calls then.
"""

import asyncio
from collections.abc import Callable
from enum import Enum, auto
from functools import partial

import msgspec

from unlatch.common.errors import UnlatchError
from unlatch.compute.call import Call
from unlatch.compute.ipc.arena import Segment, WorkerSegments
from unlatch.compute.ipc.frames import Done, Failed, Result
from unlatch.compute.pool.exits import Exit


class RunState(Enum):
    """How far a run has come."""

    STAGED = auto()  # waits behind another run, or is about to be sent
    ANNOUNCED = auto()  # callers are told that it is about to begin; the worker does not have it
    SENT = auto()  # the worker has it, behind another run
    RUNNING = auto()  # the worker executes it


class Usage(msgspec.Struct, frozen=True):
    """Usage of a run: seconds by the clock, processor seconds, and whether the kernel came to its end."""

    seconds: float
    cpu_seconds: float
    finished: bool


class Replied(msgspec.Struct, frozen=True):
    """The worker has answered the run with a valid frame. `results` are those of a Done frame, by call number."""

    frame: Done | Failed
    results: dict[int, Result]
    usage: Usage


class WorkerExited(msgspec.Struct, frozen=True):
    """The worker that had the run has exited. `usage` is None if the worker had not begun the run."""

    exit: Exit
    stopping: bool
    usage: Usage | None
    # Whether the worker executed other runs at the same time.
    beside: bool = False


class LimitReached(msgspec.Struct, frozen=True):
    """The run has reached its kernel's timeout or the memory limit, after `seconds`. `error` says which."""

    error: UnlatchError
    seconds: float


class TakenOut(msgspec.Struct, frozen=True):
    """Calls that are not to run, before the worker was given the run.

    Their callers have left, or have not confirmed in time that they know of the beginning.
    """

    calls: tuple[Call, ...]


Event = Replied | WorkerExited | LimitReached | TakenOut


class Run:
    """A run and its calls. `numbers` are the numbers of the calls in the worker's frames.

    The run uses `segment` until the last reply in it has been read or will not be written any more. The run of an async
    worker has none until its reply is known and large; a small reply is `inline`.
    """

    def __init__(
        self, worker: int, numbers: dict[Call, int], segment: Segment | None, segments: WorkerSegments, now: float
    ) -> None:
        self.worker = worker
        self.numbers = numbers
        self.segment = segment
        self.inline: bytes | None = None
        self.first = next(iter(numbers))
        self.spec = self.first.spec
        self.state = RunState.STAGED
        self.expected_seconds = self.first.estimate.seconds * len(numbers)
        # When the worker began the run. Until then: when the run was given to the worker.
        self.begun = now
        # The timer of the kernel's timeout, or of the grace period.
        self.timer: asyncio.TimerHandle | None = None
        # Calls that may have effects, and whose callers have not confirmed that they know of the beginning.
        self.unconfirmed = {call for call in numbers if call.must_be_known}
        self._unread = set(numbers)
        self._segments = segments

    @property
    def size(self) -> int:
        """The bytes of its calls' input tensors."""
        return sum([call.size for call in self.numbers])

    @property
    def wanted(self) -> bool:
        """Whether a caller waits for the run."""
        return not self.first.ended or any(not call.ended for call in self.numbers)

    @property
    def runs_again_alone(self) -> bool:
        """Whether its calls run again alone after a failure: several calls of a pure kernel."""
        return self.spec.pure and len(self.numbers) > 1

    @property
    def memory(self) -> memoryview:
        """The memory with its replies, once they are written."""
        if self.inline is not None:
            return memoryview(self.inline)
        assert self.segment is not None
        return self.segment.view

    @property
    def is_sent(self) -> bool:
        """Whether the run has been sent to the worker."""
        return self.state is RunState.RUNNING or self.state is RunState.SENT

    def announce(self, confirmed: Callable[["Run", Call], None]) -> None:
        """Tell callers that must know that the run is about to begin. They confirm that, unless they have left."""
        self.state = RunState.ANNOUNCED
        self.unconfirmed = {call for call in self.unconfirmed if call.announce(partial(confirmed, self, call))}

    def take_out(self, call: Call) -> None:
        """Remove a call from a run that has not been sent to the worker."""
        del self.numbers[call]
        self.unconfirmed.discard(call)

    def begin(self, now: float) -> None:
        """Note that the worker executes the run from now on."""
        self.state = RunState.RUNNING
        self.begun = now

    def stop_timer(self) -> None:
        """Cancel the timer of the run."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def read(self, call: Call) -> None:
        """Note that the call's reply has been read from the segment, or will not be written to it."""
        if call in self._unread:
            self._unread.discard(call)
            if not self._unread and self.segment is not None:
                self._segments.give_back(self.segment)
