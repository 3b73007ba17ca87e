"""A run: one execution of a kernel, which one or several calls wait for. The fleet routes, binds and loses runs."""

import asyncio
import random
from collections.abc import Callable
from copy import copy
from time import monotonic
from typing import Protocol

from unlatch.common.errors import DeadlineExceeded, ResourceExhausted, Unavailable, UnlatchError
from unlatch.common.lane.body import Body, Sink
from unlatch.common.lane.replies import raised
from unlatch.common.waiting.demand import UNKNOWN, Demand
from unlatch.common.waiting.priority import RANKS
from unlatch.gateway.calls.retries import Retries, not_sent_again
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.fleet.replica import Lane, Replica
from unlatch.protos.unlatch_pb2 import Descriptor, Kernel, Reply

# How long a replica that has failed a run is not sent it again; twice as long each time.
_FIRST_BACKOFF_SECONDS = 0.02
# A call whose deadline is later than its run's was by this share of its time may have the run sent again.
_MUCH_LATER = 0.1


class Sharer(Protocol):
    """A call that waits for a run. It hears of one end, unless it leaves."""

    deadline: float

    def shares(self, run: "Run") -> None:
        """It waits for this run from now on."""

    def answer(self, reply: Reply, whole: list[memoryview] | None) -> None:
        """The run has a reply, with its tensors' bytes where they came along; else their pieces follow.

        Once more where the rest of a reply could not be had: this one takes its place.
        """

    def feed(self, piece: memoryview) -> None:
        """The reply's next piece."""

    def fail(self, error: UnlatchError, reply: Reply | None) -> None:
        """The run has failed, by that reply where there is one."""


class Holder(Protocol):
    """Who holds the runs."""

    @property
    def fleet(self) -> Fleet:
        """Where they run."""

    @property
    def retries(self) -> Retries:
        """Whether they are sent again."""

    def free(self, size: int) -> None:
        """A run holds so many bytes no more."""

    def run_ended(self, run: "Run", reply: Reply | None) -> None:
        """A run is over; by that reply, if a replica has answered."""


class Run:
    """One run, from its first call until its reply is here, or nobody waits for it any more.

        routed ──> held by the fleet ──> sent ──> replied ──> pieces ──> over
          ↑                               │  └── failed, nobody waits ────┘
          └────── sent again ──── lost, or not begun ────────────────────┘

    It waits for its own reply on a replica's lane, and takes the reply's pieces in. The request's bytes are held as
    long as they may have to be sent again. `charge` is told what it has cost, in seconds of a worker.
    """

    def __init__(
        self, holder: Holder, kernel: Kernel, descriptor: Descriptor, body: Body, charge: Callable[[float], None]
    ) -> None:
        self.kernel = kernel
        self.descriptor = descriptor
        self.body = body
        # Its deadline is the latest of its calls'. Which calls may run as one is for the replica to know.
        self.demand = Demand(kernel.name, body.size, descriptor.tenant, RANKS[descriptor.priority], 0.0)
        # The fleet's, when it is routed.
        self.estimate = UNKNOWN
        # What it is, where others like it may share it (gateway/calls/coalescing.py).
        self.digest = b""
        # A replica that has just failed it.
        self.avoids: Replica | None = None
        self._holder = holder
        self._charge = charge
        self._calls: list[Sharer] = []
        self._held_bytes = body.size
        self._sent: tuple[Replica, Lane, int] | None = None
        # When it was sent last, and what its deadline was then.
        self._sent_at = self._sent_deadline = 0.0
        self._times_sent = self._times_begun = 0
        self._pure = kernel.pure
        self._started = False
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
        return max(1, round((self.demand.deadline - monotonic()) * 1e6))

    def join(self, call: Sharer) -> None:
        """One more call waits for it."""
        self._calls.append(call)
        if call.deadline > self.demand.deadline:
            self.demand = self.demand.until(call.deadline)

    def takes(self, like: "Run") -> bool:
        """Whether the calls of one like it may wait for this one instead: not for half a reply, nor behind others."""
        return (
            not self._over
            and self._reply is None
            and (self._sent is None or self.demand.priority <= like.demand.priority)
        )

    def join_another(self, other: "Run") -> None:
        """Let its calls wait for one like it, which takes them. This one is over."""
        calls = tuple(self._calls)
        self._end()
        for call in calls:
            other.join(call)
            call.shares(other)
        other.hurry(self)

    def hurry(self, like: "Run") -> None:
        """It is as urgent as one like it, from now on. Only while it is held."""
        if like.demand.priority < self.demand.priority:
            self._holder.fleet.withdraw(self)
            self.demand = self.demand._replace(priority=like.demand.priority)
            self.descriptor.priority = like.descriptor.priority
            self.route()

    def leave(self, call: Sharer) -> None:
        """A call waits no more. When none does the replica need not go on."""
        if not self._over:
            self._calls.remove(call)
            if not self._calls:
                self._drop()
                self._end()

    def route(self) -> None:
        """Have it sent to a replica."""
        # What has nowhere else to go need not be known to have begun.
        self.descriptor.attempt = 0 if self._holder.fleet.alone else self._times_sent + 1
        self._holder.fleet.route(self)

    def sent(self, replica: Replica, lane: Lane, number: int) -> None:
        """It is on that lane to that replica now, under that number."""
        self._sent = replica, lane, number
        self._sent_at, self._sent_deadline = monotonic(), self.demand.deadline
        # Of several versions this one's word counts.
        self._pure = replica.kernels.get(self.kernel.name, self.kernel).pure
        if not self._times_sent:
            self._holder.retries.called(replica.window.calls)
        self._times_sent += 1
        self._started = False

    def started(self) -> bool:
        """A worker has begun it, or is about to, and waits to hear that this is known where it may have effects."""
        self._started = True
        self._times_begun += 1
        if not self._pure:
            # It is sent to nobody else any more.
            self._let_go()
        return not self._pure

    def replied(self, reply: Reply, whole: list[memoryview] | None) -> Sink | None:
        """The replica has answered, or says after all why the rest of its answer does not come."""
        if reply.HasField("failure"):
            self._failed(raised(reply.failure), reply)
            return None
        self._reply = reply
        self._missing = 0 if whole is not None else sum(reply.lengths)
        calls = tuple(self._calls)
        if not self._missing:
            self._end()
        elif not self._pure or self._holder.fleet.alone:
            # Should the rest of the reply not come, the run is not sent again.
            self._let_go()
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
        if not self._over:
            self._again(Unavailable(error.message), None)

    def unroutable(self, error: UnlatchError) -> None:
        """No replica takes it any more."""
        self._fail(error, None)

    def _failed(self, error: UnlatchError, reply: Reply) -> None:
        if isinstance(error, Unavailable):
            self._again(error, reply)
            return
        if isinstance(error, DeadlineExceeded | ResourceExhausted) and not reply.timings.batch:
            # It was not run, and refused by a deadline that was the latest when it was sent.
            later = self._sent_deadline + _MUCH_LATER * (self._sent_deadline - self._sent_at)
            if self.demand.deadline > later and self._held_bytes == self.body.size:
                for call in tuple(self._calls):
                    if call.deadline <= later:
                        call.fail(copy(error), reply)
                if not self._over:
                    self._send_again(reply)
                return
        self._fail(error, reply)

    def _again(self, error: Unavailable, reply: Reply | None) -> None:
        """A replica was lost, or has no worker for it: send it elsewhere, if that is safe and feeds no outage."""
        let_go = self._pure and self._reply is not None and self._held_bytes < self.body.size
        if let_go or self._holder.fleet.alone:
            # There is nowhere to send it; or was not, and its bytes were let go.
            self._fail(error, reply)
            return
        begun = True if self._started or self._reply is not None else (False if self.descriptor.attempt else None)
        why = "lost" if reply is None else "failed"
        refusal = self._holder.retries.refusal(
            pure=self._pure, begun=begun, times_begun=self._times_begun, times_sent=self._times_sent, why=why
        )
        if refusal:
            self._fail(not_sent_again(error, refusal), reply)
            return
        if reply is not None and self._sent is not None:
            self._avoid(self._sent[0])
        self._send_again(reply)

    def _avoid(self, replica: Replica) -> None:
        self.avoids = replica
        seconds = _FIRST_BACKOFF_SECONDS * 2**self._times_sent * random.uniform(0.5, 1.0)  # noqa: S311 (jitter)
        asyncio.get_running_loop().call_later(seconds, self._forgive, replica)

    def _forgive(self, replica: Replica) -> None:
        if self.avoids is not replica:
            return
        held = not self._over and self._sent is None
        if held:
            # Among those that avoid it.
            self._holder.fleet.withdraw(self)
        self.avoids = None
        if held:
            self.route()

    def _send_again(self, reply: Reply | None) -> None:
        assert self._sent is not None
        replica = self._sent[0]
        self._sent, self._reply, self._missing = None, None, 0
        self._holder.fleet.ended(self, replica, 0.0, _status(reply))
        self.demand = self.demand.until(max(call.deadline for call in self._calls))
        self.route()

    def _fail(self, error: UnlatchError, reply: Reply | None) -> None:
        calls = tuple(self._calls)
        self._reply = reply
        self._end()
        for call in calls:
            # Each is raised where its caller waits, with a traceback of its own.
            call.fail(error if len(calls) == 1 else copy(error), reply)

    def _drop(self) -> None:
        if self._sent is None:
            self._holder.fleet.withdraw(self)
        else:
            _, lane, number = self._sent
            lane.cancel(number)

    def _let_go(self) -> None:
        """The request's bytes are needed no more."""
        self.body.buffers = []
        self._holder.free(self._held_bytes)
        self._held_bytes = 0

    def _end(self) -> None:
        self._over = True
        self._calls = []
        self._let_go()
        self._holder.run_ended(self, self._reply)
        if self._sent is not None:
            timings = self._reply.timings if self._reply is not None else None
            run_seconds = timings.run / 1e6 / max(timings.batch, 1) if timings is not None else 0.0
            self._charge(run_seconds)
            self._holder.fleet.ended(self, self._sent[0], run_seconds, _status(self._reply))


def _status(reply: Reply | None) -> str:
    """What a replica has answered with; "" where it has not."""
    if reply is None:
        return ""
    return raised(reply.failure).status if reply.HasField("failure") else "OK"
