"""The path of every call, from each door: admit it, set its deadline, let it run (execution.py), answer it."""

import asyncio
from copy import copy
from functools import partial
from time import monotonic

from unlatch.common.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable, UnlatchError
from unlatch.common.lane.body import Body
from unlatch.common.lane.frames import MAX_TENSORS
from unlatch.common.lane.listener import ReplyListener
from unlatch.gateway.calls.coalescing import Coalescing
from unlatch.gateway.calls.execution import Execution
from unlatch.gateway.calls.live_bytes import LiveBytes
from unlatch.gateway.calls.record import Record, Records
from unlatch.gateway.calls.retries import Retries
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.settings import GatewaySettings
from unlatch.gateway.tenants.quotas import Tenant
from unlatch.protos.unlatch_pb2 import Descriptor, Reply


class Calls:
    """Hold every call of the gateway, and enforce the bounds on them."""

    def __init__(self, fleet: Fleet, settings: GatewaySettings, records: Records) -> None:
        self.fleet = fleet
        self.metrics = records.metrics
        self.live_bytes = LiveBytes(settings.max_live_bytes)
        self._records = records
        self._retries = Retries(records.metrics)
        self._coalescing = Coalescing(fleet, records.metrics, on=settings.coalescing)
        self._settings = settings
        self._live: set[LiveCall] = set()
        self._none_left = asyncio.Event()
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
        call.record.bytes_in, call.record.tenant = body.size, tenant.label
        try:
            self._admit(call, descriptor, body, seconds, tenant)
        except UnlatchError as error:
            call.known = self.fleet.serves(descriptor.request.kernel)
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
        if not self._live:
            self._none_left.set()

    async def drain(self) -> None:
        """Refuse new calls, and wait until every live call has ended."""
        self._draining = True
        while self._live:
            self._none_left.clear()
            await self._none_left.wait()

    def _admit(
        self, call: "LiveCall", descriptor: Descriptor, body: Body, seconds: float | None, tenant: Tenant
    ) -> None:
        """Check the bounds and the tenant's limits, then start the call. Raises UnlatchError."""
        request = descriptor.request
        self._check(body)
        descriptor.tenant = tenant.name
        descriptor.priority = tenant.allow(request)
        tenant.admit(monotonic())
        kernel = self.fleet.kernel(request.kernel, request.version)
        charge = partial(self._charge, tenant)
        execution = Execution(
            self.fleet, self._retries, self.live_bytes, self.metrics, kernel, descriptor, body, charge
        )
        limit = self._settings.default_timeout_seconds if seconds is None else seconds
        self.live_bytes.charge(body.size)
        self._live.add(call)
        call.start(execution, min(limit, self._settings.max_timeout_seconds), tenant)
        self._coalescing.route(execution)

    def _check(self, body: Body) -> None:
        settings = self._settings
        if self._draining:
            raise Unavailable("this gateway is draining and takes no new calls")
        if len(self._live) >= settings.max_live_calls:
            raise ResourceExhausted(
                f"the gateway holds max_live_calls={settings.max_live_calls} already", retry_after_milliseconds=100
            )
        if len(body.lengths) > MAX_TENSORS:
            raise InvalidArgument(f"{len(body.lengths)} tensors are more than a call's {MAX_TENSORS}")
        self.live_bytes.check(body.size)

    def _charge(self, tenant: Tenant, run_seconds: float) -> None:
        """Charge a tenant for an execution that its call began."""
        tenant.charge(run_seconds, monotonic())
        self.metrics.tenants_run_ended(tenant.label, run_seconds)


class LiveCall:
    """A caller's call, from its admission until its caller has the answer or has left.

        begin ──> shares an execution ──> replied ──> pieces ──> over ──> left
          └── refused ─────── failed, expired ───────────────────┘

    Until the call is over, its deadline applies, and its caller can cancel it, even after half of the reply has
    arrived. If no other call shares the execution, that cancels the execution too. Only `_end` reports the end to the
    record. The methods do not raise: errors are sent to the caller.
    """

    __slots__ = (
        *("_body", "_caller", "_calls", "_execution", "_held_bytes", "_over", "_reply", "_seconds", "_tenant"),
        *("_timer", "deadline", "known", "record"),
    )

    def __init__(self, calls: Calls, record: Record, caller: ReplyListener) -> None:
        self.record = record
        # Whether its kernel is served. Only then may the kernel's name be a label of metrics.
        self.known = False
        self.deadline = 0.0
        self._calls = calls
        # None once the caller has left: a reference cycle would keep the bytes of both until a garbage collection.
        self._caller: ReplyListener | None = caller
        self._execution: Execution | None = None
        self._tenant: Tenant | None = None
        self._seconds = 0.0
        self._timer: asyncio.TimerHandle | None = None
        # Bytes of the reply, as charged to live_bytes. The execution is charged for those of the request.
        self._held_bytes = 0
        self._reply: Reply | None = None
        self._body: Body | None = None
        self._over = False

    def start(self, execution: Execution, seconds: float, tenant: Tenant) -> None:
        """Wait for an execution for at most `seconds`."""
        self.known = True
        self._seconds = seconds
        self.deadline = self.record.began + seconds
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expired)
        self._execution = execution
        self._tenant = tenant
        tenant.in_flight += 1
        execution.join(self, self.deadline)

    def replied(self, reply: Reply, body: Body) -> None:
        """Pass the execution's reply to the caller. It replaces an earlier reply, whose replica was lost."""
        caller = self._caller
        if caller is None or self._over:
            return
        try:
            own = self.record.descriptor.request.id
            if reply.response.id != own:
                # The call shares another call's execution, so the reply has the other call's id.
                reply = copy(reply)
                reply.response.id = own
            self._calls.live_bytes.charge(body.size, instead_of=self._held_bytes)
            self._held_bytes = body.size
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
            try:
                caller.failed(error, reply)
            except Exception as unexpected:  # noqa: BLE001 (the guard: what the call holds is freed)
                self._calls.metrics.errors.caught("call_failure", unexpected)
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
            self._caller = self._body = None
            if self._tenant is not None:
                self._tenant.in_flight -= 1
            self._calls.live_bytes.free(self._held_bytes)
            self._calls.left(self)

    def _completed(self) -> None:
        if not self._over:
            self._end("OK", reply=self._reply)

    def _expired(self) -> None:
        kernel = self.record.descriptor.request.kernel
        self.failed(DeadlineExceeded(f"kernel {kernel} did not answer within {self._seconds:.3g} s"))

    def _leave_execution(self) -> None:
        if self._execution is not None:
            try:
                self._execution.leave(self)
            except Exception as error:  # noqa: BLE001 (the guard: the caller hears of the end all the same)
                self._calls.metrics.errors.caught("call_leave", error)

    def _end(self, code: str, error: UnlatchError | None = None, reply: Reply | None = None) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        try:
            replica = self._execution.replica if self._execution is not None else ""
            self.record.ended(code, error, reply, replica, known=self.known)
        except Exception as unexpected:  # noqa: BLE001 (the guard: the caller hears of the end all the same)
            self._calls.metrics.errors.caught("call_record", unexpected)
