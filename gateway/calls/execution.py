"""Execution: one run of a kernel, which one or several calls wait for. The fleet routes, binds and loses executions."""

import asyncio
import random
from collections.abc import Callable
from copy import copy
from time import monotonic

from unlatch.common.errors import DeadlineExceeded, ResourceExhausted, Unavailable, UnlatchError
from unlatch.common.lane.body import Body
from unlatch.common.lane.listener import ReplyListener
from unlatch.common.lane.replies import raised
from unlatch.common.waiting.demand import UNKNOWN, Demand
from unlatch.common.waiting.priority import RANKS
from unlatch.gateway.calls.live_bytes import LiveBytes
from unlatch.gateway.calls.retries import Retries, not_sent_again
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.fleet.replica import Lane, Replica
from unlatch.gateway.metrics import GatewayMetrics
from unlatch.protos.unlatch_pb2 import Descriptor, Kernel, Reply

# How long a replica that has failed an execution is not sent it again; twice as long each time.
_FIRST_BACKOFF_SECONDS = 0.02
# A call whose deadline is later than its execution's was, by this share of its time, may have the execution sent again.
_MUCH_LATER = 0.1


class Execution:
    """A run of a kernel, from its first call until its reply is here, or no call waits for it any more.

        routed ──> held by the fleet ──> sent ──> replied ──> pieces ──> over
          ↑                               │  └── failed, no call waits ──┘
          └────── sent again ──── lost, or not begun ───────────────────┘

    It listens to its own reply on a replica's lane, and passes the reply on to the listeners of its calls, which raise
    nothing. The request's bytes are held as long as they may have to be sent again. `charge` is told what the execution
    has cost, in seconds of a worker.
    """

    __slots__ = (
        *("_charge", "_fleet", "_held_bytes", "_joined", "_listeners", "_live_bytes", "_metrics", "_over", "_pure"),
        *("_reply", "_retries", "_sent", "_sent_at", "_sent_deadline", "_started", "_times_begun", "_times_sent"),
        *("avoids", "body", "demand", "descriptor", "digest", "estimate", "kernel", "when_over"),
    )

    def __init__(
        self,
        fleet: Fleet,
        retries: Retries,
        live_bytes: LiveBytes,
        metrics: GatewayMetrics,
        kernel: Kernel,
        descriptor: Descriptor,
        body: Body,
        charge: Callable[[float], None],
    ) -> None:
        self.kernel = kernel
        self.descriptor = descriptor
        self.body = body
        # Its deadline is the latest of its calls'. The replica decides which calls run as one.
        self.demand = Demand(kernel.name, body.size, descriptor.tenant, RANKS[descriptor.priority], 0.0)
        # The fleet's, when the execution is routed.
        self.estimate = UNKNOWN
        # A hash of all that the call says, where identical calls may share this execution; and who is told when it is
        # over (both are gateway/calls/coalescing.py's).
        self.digest = b""
        self.when_over: Callable[[Execution], None] | None = None
        # A replica that has just failed it.
        self.avoids: Replica | None = None
        self._fleet = fleet
        self._retries = retries
        self._live_bytes = live_bytes
        self._metrics = metrics
        self._charge = charge
        # With the deadline of each.
        self._listeners: list[tuple[ReplyListener, float]] = []
        # An identical execution that its calls wait for instead.
        self._joined: Execution | None = None
        self._held_bytes = body.size
        self._sent: tuple[Replica, Lane, int] | None = None
        # When it was sent last, and its deadline then.
        self._sent_at = self._sent_deadline = 0.0
        self._times_sent = self._times_begun = 0
        self._pure = kernel.pure
        self._started = False
        self._reply: Reply | None = None
        self._over = False

    @property
    def over(self) -> bool:
        """Whether no more of a reply is to come."""
        return self._over

    @property
    def replica(self) -> str:
        """The name of the replica that the execution is on, or was; "" where it never came to one."""
        if self._joined is not None:
            return self._joined.replica
        return self._sent[0].name if self._sent is not None else ""

    def remaining_microseconds(self) -> int:
        """Return what is left of its time; never 0, which would mean no limit."""
        return max(1, round((self.demand.deadline - monotonic()) * 1e6))

    def join(self, listener: ReplyListener, deadline: float) -> None:
        """Have one more call's listener wait for the reply, until its deadline."""
        self._listeners.append((listener, deadline))
        if deadline > self.demand.deadline:
            self.demand = self.demand.until(deadline)

    def takes(self, like: "Execution") -> bool:
        """Whether calls of an identical execution may join: not for half a reply, nor behind less urgent calls."""
        if self._over or self._reply is not None:
            return False
        return self._sent is None or self.demand.priority <= like.demand.priority

    def join_another(self, other: "Execution") -> None:
        """Let the calls wait for an identical execution, which takes them. This one is over."""
        listeners = self._listeners
        self._joined = other
        self._end()
        for listener, deadline in listeners:
            other.join(listener, deadline)
        other.hurry(self)

    def hurry(self, like: "Execution") -> None:
        """Raise the priority to that of an identical execution. Only while this one is held by the fleet."""
        if like.demand.priority < self.demand.priority:
            self._fleet.withdraw(self)
            self.demand = self.demand._replace(priority=like.demand.priority)
            self.descriptor.priority = like.descriptor.priority
            self.route()

    def leave(self, listener: ReplyListener) -> None:
        """Take one call's listener off. The replica need not go on when none is left."""
        if self._joined is not None:
            self._joined.leave(listener)
        elif not self._over:
            # A new list: the old one may be being told.
            self._listeners = [waiting for waiting in self._listeners if waiting[0] is not listener]
            if not self._listeners:
                self._drop()
                self._end()

    def route(self) -> None:
        """Have the execution sent to a replica."""
        # What has nowhere else to go need not be known to have begun.
        self.descriptor.attempt = 0 if self._fleet.alone else self._times_sent + 1
        self._fleet.route(self)

    def sent(self, replica: Replica, lane: Lane, number: int) -> None:
        """Note the replica and the lane that the execution was sent on, and its number there."""
        self._sent = replica, lane, number
        self._sent_at, self._sent_deadline = monotonic(), self.demand.deadline
        # Of several versions this replica's word counts.
        self._pure = replica.kernels.get(self.kernel.name, self.kernel).pure
        if not self._times_sent:
            self._retries.called(replica.window.calls)
        self._times_sent += 1
        self._started = False

    def started(self) -> bool:
        """Note that a worker has begun it, or is about to; return whether the worker waits to hear that this is known.

        A worker waits where the kernel may have effects.
        """
        self._started = True
        self._times_begun += 1
        if not self._pure:
            # It is sent to no other replica any more.
            self._let_go()
        return not self._pure

    def replied(self, reply: Reply, body: Body) -> None:
        """Pass the replica's response on to every call, and end once its body is here."""
        if self._over:
            return
        self._reply = reply
        listeners = self._listeners
        if body.complete:
            self._end()
        else:
            if not self._pure or self._fleet.alone:
                # Should the rest of the reply not come, the execution is not sent again.
                self._let_go()
            body.when_complete(self._completed)
        for listener, _ in listeners:
            listener.replied(reply, body)

    def failed(self, error: UnlatchError, reply: Reply | None = None) -> None:
        """Send the execution again where its failure allows it, else fail its calls.

        Without a reply the lane broke, or handling it raised; after a response the rest of its body does not come.
        """
        if self._over:
            return
        if isinstance(error, Unavailable):
            self._again(error, reply)
        elif isinstance(error, DeadlineExceeded | ResourceExhausted) and reply is not None and not reply.timings.batch:
            self._refused_unrun(error, reply)
        else:
            self._fail(error, reply)

    def unroutable(self, error: UnlatchError) -> None:
        """Fail the calls: no replica takes the execution any more, or none could be in time."""
        self._fail(error, None)

    def _completed(self) -> None:
        if not self._over:
            self._end()

    def _refused_unrun(self, error: UnlatchError, reply: Reply) -> None:
        """Take a refusal by a deadline that was the latest when the execution was sent: calls may have later ones."""
        later = self._sent_deadline + _MUCH_LATER * (self._sent_deadline - self._sent_at)
        if self.demand.deadline <= later or self._held_bytes < self.body.size:
            self._fail(error, reply)
            return
        for listener, deadline in self._listeners:
            if deadline <= later:
                self.leave(listener)
                listener.failed(copy(error), reply)
        if not self._over:
            self._send_again(reply)

    def _again(self, error: Unavailable, reply: Reply | None) -> None:
        """Send the execution elsewhere, if that is safe and feeds no outage. Its replica was lost or has no worker."""
        let_go = self._pure and self._reply is not None and self._held_bytes < self.body.size
        if let_go or self._fleet.alone:
            # There is nowhere to send it; or there was not, and its bytes were let go.
            self._fail(error, reply)
            return
        begun = True if self._started or self._reply is not None else (False if self.descriptor.attempt else None)
        why = "lost" if reply is None else "failed"
        refusal = self._retries.refusal(
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
        """Let the execution be sent to the replica again."""
        if self._over or self.avoids is not replica:
            return
        try:
            if self._sent is not None:
                self.avoids = None
                return
            # The fleet holds it among those that avoid the replica.
            self._fleet.withdraw(self)
            self.avoids = None
            self.route()
        except Exception as error:  # noqa: BLE001 (the guard: its calls hear of it)
            self.failed(self._metrics.errors.caught("execution_backoff", error))

    def _send_again(self, reply: Reply | None) -> None:
        assert self._sent is not None
        replica = self._sent[0]
        self._sent, self._reply = None, None
        self._fleet.ended(self, replica, 0.0, _status(reply))
        self.demand = self.demand.until(max(deadline for _, deadline in self._listeners))
        self.route()

    def _fail(self, error: UnlatchError, reply: Reply | None) -> None:
        listeners = self._listeners
        self._reply = reply
        self._end()
        for listener, _ in listeners:
            # Each is raised where its caller waits, with a traceback of its own.
            listener.failed(error if len(listeners) == 1 else copy(error), reply)

    def _drop(self) -> None:
        if self._sent is None:
            self._fleet.withdraw(self)
        else:
            _, lane, number = self._sent
            lane.cancel(number)

    def _let_go(self) -> None:
        """Free the request's bytes: they are needed no more."""
        self.body.let_go()
        self._live_bytes.free(self._held_bytes)
        self._held_bytes = 0

    def _end(self) -> None:
        """Be over, and settle with all but the calls. Raises nothing: the calls are to hear of the end."""
        self._over = True
        self._listeners = []
        try:
            self._let_go()
            if self.when_over is not None:
                self.when_over(self)
            if self._reply is not None and self._reply.HasField("response"):
                self._metrics.ran(self.kernel.name, self._reply.timings)
        except Exception as error:  # noqa: BLE001 (the guard: the calls hear of the end all the same)
            self._metrics.errors.caught("execution_end", error)
        if self._sent is not None:
            self._settle(self._sent[0])

    def _settle(self, replica: Replica) -> None:
        """Charge the tenant, and give the replica's window back."""
        timings = self._reply.timings if self._reply is not None else None
        run_seconds = timings.run / 1e6 / max(timings.batch, 1) if timings is not None else 0.0
        try:
            try:
                self._charge(run_seconds)
            finally:
                self._fleet.ended(self, replica, run_seconds, _status(self._reply))
        except Exception as error:  # noqa: BLE001 (the guard: the calls hear of the end all the same)
            self._metrics.errors.caught("execution_end", error)


def _status(reply: Reply | None) -> str:
    """Return the status that a replica has answered with; "" where it has not."""
    if reply is None:
        return ""
    return raised(reply.failure).status if reply.HasField("failure") else "OK"
