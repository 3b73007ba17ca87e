"""A run: one execution of a kernel, which one or several calls wait for. The fleet routes, binds and loses runs."""

from collections.abc import Callable, Hashable
from time import monotonic
from typing import Protocol

from common.errors import UnlatchError
from common.failures import raised
from common.lane import Body, Sink
from common.lane_caller import LaneCaller
from common.priority import RANKS
from gateway.fleet import Fleet
from gateway.replica import Replica
from protos.unlatch_pb2 import Descriptor, Kernel, Reply


class Sharer(Protocol):
    """A call that waits for a run. It hears of one end, unless it leaves."""

    deadline: float

    def answer(self, reply: Reply, whole: list[memoryview] | None) -> None:
        """The run has a reply, with its tensors' bytes where they came along; else their pieces follow."""

    def feed(self, piece: memoryview) -> None:
        """The reply's next piece."""

    def fail(self, error: UnlatchError, reply: Reply | None) -> None:
        """The run has failed, by that reply where there is one."""


class Run:
    """One run, from its first call until its reply is here, or nobody waits for it any more.

        routed ──> held by the fleet ──> sent ──> replied ──> pieces ──> over
                                          └── lost, failed, nobody waits ──┘

    It waits for its own reply on a replica's lane, and takes the reply's pieces in. `free` is told of the bytes that it
    holds no more: those of its request. `charge` is told what it has cost, in seconds of a worker.
    """

    # What runs cost, and in what company, is the replica's to know.
    cost_seconds = 0.0
    long = False
    batch: Hashable | None = None

    def __init__(
        self,
        fleet: Fleet,
        kernel: Kernel,
        descriptor: Descriptor,
        body: Body,
        free: Callable[[int], None],
        charge: Callable[[float], None],
    ) -> None:
        self.kernel = kernel
        self.descriptor = descriptor
        self.body = body
        self.tenant = descriptor.tenant
        self.priority = RANKS[descriptor.priority]
        # The latest of its calls'.
        self.deadline = 0.0
        self._fleet = fleet
        self._free = free
        self._charge = charge
        # Of the request.
        self._held_bytes = body.size
        self._calls: list[Sharer] = []
        self._sent: tuple[Replica, LaneCaller, int] | None = None
        self._reply: Reply | None = None
        # How much of the reply is yet to come.
        self._missing = 0
        self._over = False

    @property
    def complete(self) -> bool:
        """Whether no more of the reply is to come."""
        return self._over

    @property
    def replica(self) -> str:
        """What the replica calls itself that it is on, or was; "" where it never came to one."""
        return self._sent[0].name if self._sent is not None else ""

    def remaining_microseconds(self) -> int:
        """What is left of its time; never 0, which would mean no limit."""
        return max(1, round((self.deadline - monotonic()) * 1e6))

    def join(self, call: Sharer) -> None:
        """One more call waits for it."""
        self._calls.append(call)
        self.deadline = max(self.deadline, call.deadline)

    def leave(self, call: Sharer) -> None:
        """A call waits no more. When none does the replica need not go on."""
        if not self._over:
            self._calls.remove(call)
            if not self._calls:
                self._drop()
                self._end()

    def sent(self, replica: Replica, lane: LaneCaller, number: int) -> None:
        """It is on that lane to that replica now, under that number."""
        self._sent = replica, lane, number

    def replied(self, reply: Reply, whole: list[memoryview] | None) -> Sink | None:
        """The replica has answered, or says after all why the rest of its answer does not come."""
        self._reply = reply
        if reply.HasField("failure"):
            self._fail(raised(reply.failure))
            return None
        # Nothing of it is sent again from here on.
        self._let_go()
        self._missing = 0 if whole is not None else sum(reply.lengths)
        calls = tuple(self._calls)
        if not self._missing:
            self._end()
        for call in calls:
            call.answer(reply, whole)
        return self

    def feed(self, piece: memoryview) -> None:
        """Take the reply's next piece."""
        for call in tuple(self._calls):
            call.feed(piece)
        self._missing -= len(piece)
        if not self._missing:
            self._end()

    def lost(self, error: UnlatchError) -> None:
        """The lane broke before the reply was here whole."""
        self._fail(error)

    def unroutable(self, error: UnlatchError) -> None:
        """No replica takes it any more."""
        self._fail(error)

    def _fail(self, error: UnlatchError) -> None:
        calls = tuple(self._calls)
        self._end()
        for call in calls:
            call.fail(error, self._reply)

    def _drop(self) -> None:
        if self._sent is None:
            self._fleet.withdraw(self)
        else:
            _, lane, number = self._sent
            lane.cancel(number)

    def _let_go(self) -> None:
        """The request's bytes are needed no more."""
        self.body.buffers = []
        self._free(self._held_bytes)
        self._held_bytes = 0

    def _end(self) -> None:
        self._over = True
        self._calls = []
        self._let_go()
        if self._sent is not None:
            timings = self._reply.timings if self._reply is not None else None
            run_seconds = timings.run / 1e6 / max(timings.batch, 1) if timings is not None else 0.0
            self._charge(run_seconds)
            self._fleet.ended(self, self._sent[0], run_seconds)
