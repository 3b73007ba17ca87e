"""The path of every call, from each door: admit it, set its deadline, let it run (execution.py), answer it."""

import asyncio
import math
from collections.abc import Callable
from copy import copy
from functools import partial
from time import monotonic

from unlatch.common.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable, UnlatchError
from unlatch.common.lane.body import Body
from unlatch.common.lane.frames import MAX_TENSORS
from unlatch.common.lane.listener import ReplyListener
from unlatch.gateway.calls.coalescing import Coalescing
from unlatch.gateway.calls.execution import Execution
from unlatch.gateway.calls.record import Record, Records
from unlatch.gateway.calls.retries import Retries
from unlatch.gateway.calls.triton import take_parameters
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.fleet.fleets import Fleets
from unlatch.gateway.fleet.hold import Hold
from unlatch.gateway.settings import GatewaySettings
from unlatch.gateway.tenants.quotas import Tenant
from unlatch.gateway.totals import MachineTotals
from unlatch.protos.unlatch_pb2 import Descriptor, Reply

# So much of a descriptor is not counted: max_live_calls bounds it.
_USUAL_DESCRIPTOR_BYTES = 1024
# Callers have left a gateway that drains once no call has come for this long. A few calls a second are not noticed:
# such a call would have to come within the millisecond in which its connection is closed.
_QUIET_SECONDS = 0.5
DRAINING = "this gateway is draining and takes no new calls"


class Calls:
    """Hold every call of the gateway, and enforce the bounds on them."""

    def __init__(
        self, fleets: Fleets, settings: GatewaySettings, records: Records, totals: MachineTotals | None = None
    ) -> None:
        self.fleets = fleets
        self._totals = totals or MachineTotals()
        self.metrics = records.metrics
        self._records = records
        self.retries = Retries(records.metrics)
        self._coalescing = Coalescing(records.metrics, on=settings.coalescing)
        self._settings = settings
        self._live: set[LiveCall] = set()
        self._none_left = asyncio.Event()
        # When the last call began.
        self._last = -math.inf
        self._draining = False

    def __len__(self) -> int:
        return len(self._live)

    def begin(
        self, descriptor: Descriptor, body: Body, seconds: float | None, caller: ReplyListener, tenant: Tenant
    ) -> "LiveCall":
        """Admit a tenant's call, and let it run. Its timeout is `seconds`; None if its caller sets none.

        A refusal does not raise: the caller is sent the error, and the returned call has ended.
        """
        call = LiveCall(self, self._records.begin(descriptor), caller)
        self._last = call.record.began
        call.record.bytes_in, call.record.tenant = body.size, tenant.label
        try:
            self._admit(call, descriptor, body, seconds, tenant)
        except UnlatchError as error:
            call.failed(error)
        except Exception as error:  # noqa: BLE001 (the guard: this call fails, and no other)
            call.failed(self.metrics.errors.caught("call_begin", error))
        return call

    def refuse(self, descriptor: Descriptor, error: UnlatchError, caller: ReplyListener) -> "LiveCall":
        """Record a call that a door refuses, and send its caller the error. The returned call has ended."""
        call = LiveCall(self, self._records.begin(descriptor), caller)
        call.failed(error)
        return call

    def left(self, call: "LiveCall") -> None:
        """Remove a call that has been answered, or whose caller has left."""
        self._live.discard(call)
        self._totals.own.live_calls = len(self._live)
        if not self._live:
            self._none_left.set()

    async def callers_left(self) -> None:
        """Wait until callers send no more calls, because they have moved to another gateway."""
        await self._ended()
        while (quiet_in := self._last + _QUIET_SECONDS - monotonic()) > 0:
            await asyncio.sleep(quiet_in)
            await self._ended()

    async def drain(self) -> None:
        """Refuse new calls, and wait until every live call has ended."""
        self._draining = True
        await self._ended()

    async def _ended(self) -> None:
        """Wait until no call is live."""
        while self._live:
            self._none_left.clear()
            await self._none_left.wait()

    def _admit(
        self, call: "LiveCall", descriptor: Descriptor, body: Body, seconds: float | None, tenant: Tenant
    ) -> None:
        """Check the bounds and the tenant's limits, then start the call. Raises UnlatchError."""
        request = descriptor.request
        # Twice, since the reply repeats what is largest in a large descriptor: the call's id.
        described = 2 * max(0, descriptor.ByteSize() - _USUAL_DESCRIPTOR_BYTES)
        self._check(body, tenant)
        tenant.held.check(body.size + described)
        descriptor.tenant = tenant.name
        descriptor.priority = tenant.allow(request)
        tenant.admit(monotonic())
        fleet = self.fleets.of(tenant.name)
        if fleet.holds_calls:
            self._hold(call, fleet, body, seconds, tenant, described)
        else:
            self._execute(call, fleet, body, seconds, tenant, described)

    def _hold(
        self, call: "LiveCall", fleet: Fleet, body: Body, seconds: float | None, tenant: Tenant, described: int
    ) -> None:
        """Let a call wait for a replica that takes calls. Raises Unavailable where too many wait."""
        fleet.hold.check(body.size)
        tenant.held.hold(body.size + described)
        self._take(call)
        call.wait(fleet.hold, self._limit(seconds), tenant, body.size + described)
        execute = partial(self._execute, call, fleet, body, seconds, tenant, described)
        fleet.hold.add(call, body.size, partial(self._go_on, call, execute))

    def _execute(
        self, call: "LiveCall", fleet: Fleet, body: Body, seconds: float | None, tenant: Tenant, described: int
    ) -> None:
        """Let a call wait for an execution of its kernel. Raises UnlatchError."""
        descriptor = call.record.descriptor
        request = descriptor.request
        kernel = fleet.kernel(request.kernel, request.version)
        if request.parameters:
            seconds = take_parameters(request, kernel, seconds)
        limit = self._limit(seconds)
        execution = Execution(self, fleet, kernel, descriptor, body, tenant, call.record.began + limit)
        tenant.held.hold(body.size + described)
        self._take(call)
        call.start(execution, limit, tenant, described)
        self._coalescing.route(execution)

    def _take(self, call: "LiveCall") -> None:
        self._live.add(call)
        self._totals.own.live_calls = len(self._live)

    def _go_on(self, call: "LiveCall", execute: Callable[[], None], error: UnlatchError | None) -> None:
        """Execute a call that was held, because a replica takes calls, or fail it."""
        call.stop_waiting()
        if error is not None:
            call.failed(error)
            return
        try:
            execute()
        except UnlatchError as refusal:
            call.failed(refusal)
        except Exception as unexpected:  # noqa: BLE001 (the guard: this call fails, and no other)
            call.failed(self.metrics.errors.caught("call_begin", unexpected))

    def _limit(self, seconds: float | None) -> float:
        """Return the seconds that a call may take, if its caller asks for so many."""
        limit = self._settings.default_timeout_seconds if seconds is None else seconds
        return min(limit, self._settings.max_timeout_seconds)

    def _check(self, body: Body, tenant: Tenant) -> None:
        settings = self._settings
        if self._draining:
            raise Unavailable(DRAINING, not_begun=True)
        live_calls = len(self._live) + self._totals.elsewhere("live_calls")
        if live_calls >= settings.max_live_calls:
            raise ResourceExhausted(
                f"the gateway holds max_live_calls={settings.max_live_calls} already", retry_after_milliseconds=100
            )
        tenant.check_call(settings.max_live_calls, live_calls)
        if len(body.lengths) > MAX_TENSORS:
            raise InvalidArgument(f"{len(body.lengths)} tensors are more than a call's {MAX_TENSORS}")


class LiveCall:
    """A caller's call, from its admission until its caller has the answer or has left.

        begin ──> waits where no replica takes calls ──> shares an execution ──> replied ──> pieces ──> over ──> left
          └── refused ─────────────────────── failed, expired ───────────────────────────────────────────┘

    Until the call is over, its deadline applies, and its caller can cancel it, even after half of the reply has
    arrived. If no other call shares the execution, that cancels the execution too. Only `_end` reports the end to the
    record. The methods do not raise: errors are sent to the caller.
    """

    __slots__ = (
        *(
            "_body",
            "_caller",
            "_calls",
            "_described_bytes",
            "_execution",
            "_held_bytes",
            "_hold",
            "_over",
            "_reply",
            "_seconds",
            "_tenant",
        ),
        *("_timer", "deadline", "record"),
    )

    def __init__(self, calls: Calls, record: Record, caller: ReplyListener) -> None:
        self.record = record
        self.deadline = 0.0
        self._calls = calls
        # None once the caller has left: a reference cycle would keep the bytes of both until a garbage collection.
        self._caller: ReplyListener | None = caller
        self._execution: Execution | None = None
        # Where it waits as long as no replica takes calls.
        self._hold: Hold | None = None
        self._tenant: Tenant | None = None
        self._seconds = 0.0
        self._timer: asyncio.TimerHandle | None = None
        # Bytes of descriptor and reply, as the tenant holds them. The execution holds the tensors of the request.
        self._held_bytes = self._described_bytes = 0
        self._reply: Reply | None = None
        self._body: Body | None = None
        self._over = False

    def start(self, execution: Execution, seconds: float, tenant: Tenant, described_bytes: int) -> None:
        """Wait for an execution for at most `seconds`. The tenant holds `described_bytes` of the call's descriptor."""
        self._described_bytes = described_bytes
        self._expect(seconds, tenant, described_bytes)
        self._execution = execution
        execution.join(self, self.deadline)

    def wait(self, hold: Hold, seconds: float, tenant: Tenant, size: int) -> None:
        """Wait until a replica takes calls, for at most `seconds`. The tenant holds `size` bytes of the call."""
        self._expect(seconds, tenant, size)
        self._hold = hold

    def stop_waiting(self) -> None:
        """Undo `wait`, so that the call may be started."""
        tenant = self._tenant
        if self._timer is not None and tenant is not None:
            self._timer.cancel()
            tenant.held.free(self._held_bytes)
            tenant.in_flight -= 1
            tenant.live_calls -= 1
        self._held_bytes, self._hold, self._tenant, self._timer = 0, None, None, None

    def replied(self, reply: Reply, body: Body) -> None:
        """Pass the execution's reply to the caller. It replaces an earlier reply, whose replica was lost."""
        caller, tenant = self._caller, self._tenant
        if caller is None or tenant is None or self._over:
            return
        try:
            own = self.record.descriptor.request.id
            if reply.response.id != own:
                # The call shares another call's execution, so the reply has the other call's id.
                reply = copy(reply)
                reply.response.id = own
            size = body.size + self._described_bytes
            tenant.held.charge(size, instead_of=self._held_bytes)
            self._held_bytes = size
            self._reply, self._body = reply, body
            caller.replied(reply, body)
            if body.complete:
                self._completed()
            else:
                body.when_complete(self._completed)
        except UnlatchError as error:
            self.failed(error, reply)
        except Exception as error:  # noqa: BLE001 (the guard: this call fails, and no other)
            self.failed(self._calls.metrics.errors.caught("call_reply", error), reply)

    def failed(self, error: UnlatchError, reply: Reply | None = None) -> None:
        """Send the caller an error. `reply` is the replica's reply that carried it, if a replica answered."""
        caller = self._caller
        if caller is not None and not self._over:
            self._end(error.status, error, reply)
            self._leave_execution()
            with self._calls.metrics.errors.guarded("call_failure"):
                caller.failed(error, reply)
        self.leave()

    def leave(self) -> None:
        """Free what the call holds in the gateway and in the replica. Its caller has the answer, or has left."""
        if not self._over:
            if self._body is not None and self._body.complete:
                self._end("OK", reply=self._reply)
            else:
                self._end("DEADLINE_EXCEEDED" if monotonic() >= self.deadline else "CANCELLED")
                self._leave_execution()
        if self._caller is not None:
            self._caller = None
            if self._tenant is not None:
                self._tenant.held.free(self._held_bytes)
                self._tenant.live_calls -= 1
            self._calls.left(self)

    def _completed(self) -> None:
        if not self._over:
            self._end("OK", reply=self._reply)

    def _expired(self) -> None:
        kernel = self.record.descriptor.request.kernel
        self.failed(DeadlineExceeded(f"kernel {kernel} did not answer within {self._seconds:.3g} s"))

    def _expect(self, seconds: float, tenant: Tenant, held_bytes: int) -> None:
        """Expect an answer within `seconds`, and count as a call of the tenant that holds so many bytes."""
        self._seconds = seconds
        self.deadline = self.record.began + seconds
        self._timer = asyncio.get_running_loop().call_later(self.deadline - monotonic(), self._expired)
        self._tenant = tenant
        self._held_bytes = held_bytes
        tenant.in_flight += 1
        tenant.live_calls += 1

    def _leave_execution(self) -> None:
        if self._hold is not None:
            self._hold.withdraw(self)
        if self._execution is not None:
            # The caller hears of the end all the same.
            with self._calls.metrics.errors.guarded("call_leave"):
                self._execution.leave(self)

    def _end(self, code: str, error: UnlatchError | None = None, reply: Reply | None = None) -> None:
        self._over = True
        # A caller has its answer before the gateway knows that it was sent: the next call must fit the quota already.
        if self._tenant is not None:
            self._tenant.in_flight -= 1
        if self._timer is not None:
            self._timer.cancel()
        self._body = None
        try:
            execution = self._execution
            if execution is not None:
                self.record.ended(code, error, reply, execution.replica)
            else:
                # Only a kernel that is served may be a label of metrics: its caller chose the name.
                known = self._calls.fleets.serves(self.record.descriptor.request.kernel)
                self.record.ended(code, error, known=known)
        except Exception as unexpected:  # noqa: BLE001 (the guard: the caller hears of the end all the same)
            self._calls.metrics.errors.caught("call_record", unexpected)
