"""Execution: one run of a kernel, for which one or several calls wait. The fleet chooses its replica and sends it."""

import asyncio
import random
from collections.abc import Callable
from copy import copy
from time import monotonic
from typing import TYPE_CHECKING

from unlatch.common.errors import (
    POSSIBLE_EFFECT,
    Aborted,
    DeadlineExceeded,
    ResourceExhausted,
    Unavailable,
    UnlatchError,
)
from unlatch.common.lane.body import Body
from unlatch.common.lane.listener import ReplyListener
from unlatch.common.lane.replies import raised
from unlatch.common.waiting.demand import UNKNOWN, Demand
from unlatch.common.waiting.priority import RANKS
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.fleet.replica import Lane, Replica
from unlatch.gateway.tenants.quotas import Tenant
from unlatch.protos.unlatch_pb2 import Descriptor, Kernel, Reply

if TYPE_CHECKING:
    from unlatch.gateway.calls.calls import Calls

# A replica that has failed an execution is not sent it again for this time; twice as long after each failure.
_FIRST_BACKOFF_SECONDS = 0.02
# If the deadline of a call is later than the one that was sent, by this share of the time sent, it is sent again.
_MUCH_LATER = 0.1


class Execution:
    """A run of a kernel, from its first call until its reply has arrived or no call waits for it.

        routed ──> held by the fleet ──> sent ──> replied ──> pieces ──> over
          ↑                               │  └── failed, no call waits ──┘
          └────── sent again ──── lost, or not begun ───────────────────┘

    The execution receives its reply from a replica's lane, and passes it on to the listeners of its calls, which raise
    nothing. It holds the request's bytes as long as they may have to be sent again. `tenant` is the tenant of its first
    call, and is charged for it.
    """

    __slots__ = (
        *("_calls", "_held_bytes", "_joined", "_listeners", "_pure", "_reply", "_sent", "_sent_at", "_sent_deadline"),
        *("_started", "_tenant", "_times_begun", "_times_sent"),
        *("avoids", "body", "demand", "descriptor", "digest", "estimate", "fleet", "kernel", "over", "when_over"),
    )

    def __init__(
        self,
        calls: "Calls",
        fleet: Fleet,
        kernel: Kernel,
        descriptor: Descriptor,
        body: Body,
        tenant: Tenant,
        deadline: float,
    ) -> None:
        self.fleet = fleet
        self.kernel = kernel
        self.descriptor = descriptor
        self.body = body
        # `demand.deadline` is the latest deadline of its calls. `batch` stays None: the replica chooses batches.
        self.demand = Demand(kernel.name, body.size, descriptor.tenant, RANKS[descriptor.priority], deadline)
        # Set by the fleet when the execution is routed.
        self.estimate = UNKNOWN
        # Both are set by gateway/calls/coalescing.py: a hash of the request, if identical calls may share this
        # execution; and a function that is called when it is over.
        self.digest = b""
        self.when_over: Callable[[Execution], None] | None = None
        # A replica that has just failed this execution.
        self.avoids: Replica | None = None
        # Whether it has ended: nothing more of a reply comes.
        self.over = False
        self._calls = calls
        self._tenant = tenant
        # The listeners of its calls, with the deadline of each call.
        self._listeners: list[tuple[ReplyListener, float]] = []
        # An identical execution that has taken over the calls of this one.
        self._joined: Execution | None = None
        self._held_bytes = body.size
        self._sent: tuple[Replica, Lane, int] | None = None
        # The time when it was last sent, and its deadline at that time.
        self._sent_at = self._sent_deadline = 0.0
        self._times_sent = self._times_begun = 0
        self._pure = kernel.pure
        self._started = False
        self._reply: Reply | None = None

    @property
    def replica(self) -> str:
        """The name of the replica that the execution was last sent to; "" if it was not sent."""
        if self._joined is not None:
            return self._joined.replica
        return self._sent[0].name if self._sent is not None else ""

    def remaining_microseconds(self) -> int:
        """Return the microseconds until the deadline; at least 1, because 0 would mean no limit."""
        return max(1, round((self.demand.deadline - monotonic()) * 1e6))

    def join(self, listener: ReplyListener, deadline: float) -> None:
        """Add the listener of a call, which waits for the reply until its deadline."""
        self._listeners.append((listener, deadline))
        if deadline > self.demand.deadline:
            self.demand = self.demand.until(deadline)

    def takes(self, like: "Execution") -> bool:
        """Return whether an identical execution's calls may join: not during a reply, nor at a lower priority."""
        if self.over or self._reply is not None:
            return False
        return self._sent is None or self.demand.priority <= like.demand.priority

    def join_another(self, other: "Execution") -> None:
        """Move the calls to an identical execution. This execution is over."""
        listeners = self._listeners
        self._joined = other
        self._end()
        for listener, deadline in listeners:
            other.join(listener, deadline)
        other.hurry(self)

    def hurry(self, like: "Execution") -> None:
        """Raise the priority to that of an identical execution. Call only while the fleet holds this one."""
        if like.demand.priority < self.demand.priority:
            self.fleet.withdraw(self)
            self.demand = self.demand._replace(priority=like.demand.priority)
            self.descriptor.priority = like.descriptor.priority
            self.route()

    def leave(self, listener: ReplyListener) -> None:
        """Remove the listener of a call. When none is left, cancel the execution at the replica."""
        if self._joined is not None:
            self._joined.leave(listener)
        elif not self.over:
            # A new list: the old one may be being told.
            self._listeners = [waiting for waiting in self._listeners if waiting[0] is not listener]
            if not self._listeners:
                self._drop()
                self._end()

    def route(self) -> None:
        """Let the fleet send the execution to a replica."""
        # With one replica nothing is sent again, so the replica need not report that the execution has begun.
        self.descriptor.attempt = 0 if self.fleet.alone else self._times_sent + 1
        self.fleet.route(self)

    def sent(self, replica: Replica, lane: Lane, number: int) -> None:
        """Note the replica and the lane that the execution was sent on, and its number there."""
        self._sent = replica, lane, number
        self._sent_at, self._sent_deadline = monotonic(), self.demand.deadline
        # Replicas may serve different versions: what this replica's version declares counts.
        self._pure = replica.kernels.get(self.kernel.name, self.kernel).pure
        if not self._times_sent:
            self._calls.retries.budget.called(self.fleet.sent_calls)
        self._times_sent += 1
        self._started = False

    def started(self) -> bool:
        """Note that a worker has begun, or is about to; return whether the worker waits for confirmation.

        A worker waits for confirmation if the kernel is not pure.
        """
        self._started = True
        self._times_begun += 1
        if not self._pure:
            # From here on it is not sent to another replica.
            self._let_go()
        return not self._pure

    def replied(self, reply: Reply, body: Body) -> None:
        """Pass the replica's reply on to every call. The execution ends when the reply's body is complete."""
        if self.over:
            return
        self._reply = reply
        listeners = self._listeners
        if body.complete:
            self._end()
        else:
            if not self._pure or self.fleet.alone:
                # If the rest of the reply does not arrive, the execution is not sent again.
                self._let_go()
            body.when_complete(self._completed)
        for listener, _ in listeners:
            listener.replied(reply, body)

    def failed(self, error: UnlatchError, reply: Reply | None = None) -> None:
        """Send the execution again if its failure allows that, else fail its calls.

        `reply` is None if the lane broke or if our own code raised. After `replied`, the rest of the body is lost.
        """
        if self.over:
            return
        if isinstance(error, Unavailable):
            self._again(error, reply)
        elif isinstance(error, DeadlineExceeded | ResourceExhausted) and reply is not None and not reply.timings.batch:
            self._refused_unrun(error, reply)
        else:
            self._fail(error, reply)

    def unroutable(self, error: UnlatchError) -> None:
        """Fail the calls: no replica serves the kernel, or none could answer in time."""
        self._fail(error, None)

    def _completed(self) -> None:
        if not self.over:
            self._end()

    def _refused_unrun(self, error: UnlatchError, reply: Reply) -> None:
        """Handle a refusal by the deadline that was sent: send again for calls that joined with a later one."""
        later = self._sent_deadline + _MUCH_LATER * (self._sent_deadline - self._sent_at)
        if self.demand.deadline <= later or self._held_bytes < self.body.size:
            self._fail(error, reply)
            return
        for listener, deadline in self._listeners:
            if deadline <= later:
                self.leave(listener)
                listener.failed(copy(error), reply)
        if not self.over:
            self._send_again(reply)

    def _again(self, error: Unavailable, reply: Reply | None) -> None:
        """Send the execution again after its replica was lost or had no worker, if safe and within the budget."""
        begun = False if error.not_begun else self._begun
        may_have_begun = not self._pure and begun is not False
        if self._has_no_other(error):
            # A replica that answers UNAVAILABLE has not begun the call.
            may_have_begun = may_have_begun and reply is None
            self._fail_lost(error, POSSIBLE_EFFECT if may_have_begun else "", reply, may_have_begun=may_have_begun)
            return
        why = "lost" if reply is None else "failed"
        refusal = self._calls.retries.refusal(
            pure=self._pure, begun=begun, times_begun=self._times_begun, times_sent=self._times_sent, why=why
        )
        if refusal:
            self._fail_lost(error, refusal, reply, may_have_begun=may_have_begun)
            return
        if reply is not None and self._sent is not None:
            self._avoid(self._sent[0])
        self._send_again(reply)

    def _has_no_other(self, error: Unavailable) -> bool:
        """Return whether there is no other replica, or the request's bytes were freed while there was none.

        A call that an only replica refuses as not begun, because it ends, waits for the next replica.
        """
        let_go = self._pure and self._reply is not None and self._held_bytes < self.body.size
        return let_go or (self.fleet.alone and not error.not_begun)

    @property
    def _begun(self) -> bool | None:
        """Whether a worker has begun the execution, or is about to; None if that is unknown."""
        if self._started or self._reply is not None:
            return True
        return False if self.descriptor.attempt else None

    def _fail_lost(self, error: Unavailable, told: str, reply: Reply | None, *, may_have_begun: bool) -> None:
        """Fail the calls of an execution that is not sent again. ABORTED says that it may have had an effect."""
        message = f"{error.message}; {told}" if told else error.message
        if may_have_begun:
            self._fail(Aborted(message), reply)
        else:
            self._fail(Unavailable(message, retry_after_milliseconds=error.retry_after_milliseconds), reply)

    def _avoid(self, replica: Replica) -> None:
        self.avoids = replica
        seconds = _FIRST_BACKOFF_SECONDS * 2**self._times_sent * random.uniform(0.5, 1.0)  # noqa: S311 (jitter)
        asyncio.get_running_loop().call_later(seconds, self._forgive, replica)

    def _forgive(self, replica: Replica) -> None:
        """Allow sending the execution to the replica again."""
        if self.over or self.avoids is not replica:
            return
        try:
            if self._sent is not None:
                self.avoids = None
                return
            # The fleet holds it as a call of the kind that avoids the replica: withdraw it and route it anew.
            self.fleet.withdraw(self)
            self.avoids = None
            self.route()
        except Exception as error:  # noqa: BLE001 (the guard: its calls hear of it)
            self.failed(self._calls.metrics.errors.caught("execution_backoff", error))

    def _send_again(self, reply: Reply | None) -> None:
        assert self._sent is not None
        replica = self._sent[0]
        self._sent, self._reply = None, None
        replica.ended(self)
        self.fleet.ended(self, replica, 0.0, 0.0, _status(reply))
        self.demand = self.demand.until(max(deadline for _, deadline in self._listeners))
        self.route()

    def _fail(self, error: UnlatchError, reply: Reply | None) -> None:
        listeners = self._listeners
        self._reply = reply
        self._end()
        for listener, _ in listeners:
            # Each caller raises its error, which needs a traceback of its own: hence the copies.
            listener.failed(error if len(listeners) == 1 else copy(error), reply)

    def _drop(self) -> None:
        if self._sent is None:
            self.fleet.withdraw(self)
        else:
            _, lane, number = self._sent
            lane.cancel(number)

    def _let_go(self) -> None:
        """Free the request's bytes, which will not be sent again."""
        self.body.let_go()
        self._tenant.held.free(self._held_bytes)
        self._held_bytes = 0

    def _end(self) -> None:
        """End the execution: free its bytes, settle with replica and tenant. Raises nothing, so the calls are told."""
        self.over = True
        self._listeners = []
        try:
            self._let_go()
            if self.when_over is not None:
                self.when_over(self)
            if self._reply is not None and self._reply.HasField("response"):
                self._calls.metrics.ran(self.kernel.name, self._reply.timings)
        except Exception as error:  # noqa: BLE001 (the guard: the calls hear of the end all the same)
            self._calls.metrics.errors.caught("execution_end", error)
        if self._sent is not None:
            self._settle(self._sent[0])

    def _settle(self, replica: Replica) -> None:
        """Give the replica's window back, charge the tenant, and tell the fleet."""
        timings = self._reply.timings if self._reply is not None else None
        run_seconds = timings.run / 1e6 / max(timings.batch, 1) if timings is not None else 0.0
        cost_seconds = run_seconds
        if self.kernel.concurrency:
            # A run that waits beside others costs what it uses of the processor.
            cost_seconds = timings.cpu / 1e6 if timings is not None else 0.0
        try:
            replica.ended(self)
            try:
                self._tenant.charge(cost_seconds, monotonic())
                self._calls.metrics.tenant_run_seconds.add(cost_seconds, self._tenant.label)
            finally:
                self.fleet.ended(self, replica, run_seconds, cost_seconds, _status(self._reply))
        except Exception as error:  # noqa: BLE001 (the guard: the calls hear of the end all the same)
            self._calls.metrics.errors.caught("execution_end", error)


def _status(reply: Reply | None) -> str:
    """Return the status of a replica's reply; "" without a reply, and for a refusal by a replica that ends."""
    if reply is None or reply.failure.not_begun:
        return ""
    return raised(reply.failure).status if reply.HasField("failure") else "OK"
