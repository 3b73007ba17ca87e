"""The one path of a call, whichever door it came by: admit, give it its time, have it run (execution.py), answer."""

import asyncio
from contextlib import suppress
from copy import copy
from functools import partial
from time import monotonic
from typing import Protocol

from google.protobuf.descriptor import FieldDescriptor

from unlatch.common.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, Unavailable, UnlatchError
from unlatch.common.lane.body import Body, Sink
from unlatch.common.lane.frames import MOST_DESCRIPTOR_BYTES, MOST_TENSORS
from unlatch.common.lane.protowire import Malformed, split
from unlatch.gateway.calls.coalescing import Coalescing
from unlatch.gateway.calls.execution import Run
from unlatch.gateway.calls.record import Record, Records
from unlatch.gateway.calls.retries import Retries
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.settings import GatewaySettings
from unlatch.gateway.tenants.quotas import Tenant
from unlatch.protos.unlatch_pb2 import Reply, Request

# What the Open Inference Protocol calls them.
_PROTOCOLS_NAMES = {"kernel": "model_name", "version": "model_version"}
# Of each kind: past it a request is out of all proportion, and what in it is largest does not matter.
_MOST_NAMED = 1024


class Caller(Protocol):
    """Who made a call, at one of the doors. It hears of one end, unless it has left."""

    def answer(self, reply: Reply, tensors: list[memoryview] | None) -> Sink | None:
        """A response, with its tensors' bytes where they came along; else say where their pieces are to go.

        None: the caller has all it needs. Otherwise it leaves once it has. Raises UnlatchError where it cannot take it.
        """

    def fail(self, error: UnlatchError) -> None:
        """The call failed; or, after `answer`, the rest of its pieces will not come."""


class Calls:
    """Every call that the gateway holds, and the bounds on them."""

    def __init__(self, fleet: Fleet, settings: GatewaySettings, records: Records) -> None:
        self.fleet = fleet
        self.records = records
        self.retries = Retries(records.metrics)
        self._coalescing = Coalescing(fleet, records.metrics, on=settings.coalescing)
        self._settings = settings
        self._live: set[Call] = set()
        self._bytes = 0
        self._none_left = asyncio.Event()
        self._draining = False

    def __len__(self) -> int:
        return len(self._live)

    def begin(self, record: Record, body: Body, seconds: float | None, caller: Caller, tenant: Tenant) -> "Call":
        """Admit a tenant's call with `seconds` to live (None: its caller sets no limit) and send it on its way.

        Raises what a call is refused with: InvalidArgument, NotFound, PermissionDenied, ResourceExhausted, Unavailable.
        """
        descriptor, request = record.descriptor, record.descriptor.request
        record.bytes_in, record.tenant = body.size, tenant.label
        try:
            self._admit(body)
            descriptor.tenant = tenant.name
            descriptor.priority = tenant.allow(request)
            tenant.admit(monotonic())
            kernel = self.fleet.kernel(request.kernel, request.version)
        except UnlatchError as error:
            record.refused(error, known=self.fleet.serves(request.kernel))
            raise
        limit = self._settings.default_timeout_seconds if seconds is None else seconds
        run = Run(self, kernel, descriptor, body, partial(self._cost, tenant))
        self._bytes += body.size
        call = Call(self, record, run, min(limit, self._settings.max_timeout_seconds), caller, tenant)
        self._live.add(call)
        tenant.in_flight += 1
        run.join(call)
        self._coalescing.route(run)
        return call

    def charge(self, size: int, instead_of: int) -> None:
        """So many bytes are held. Raises ResourceExhausted where all together would be too many."""
        if size > instead_of:
            self._fit(size - instead_of)
        self._bytes += size - instead_of

    def free(self, size: int) -> None:
        """So many bytes are held no more."""
        self._bytes -= size

    def run_ended(self, run: Run, reply: Reply | None) -> None:
        """A run is over; by that reply, if a replica has answered."""
        self._coalescing.over(run)
        if reply is not None and reply.HasField("response"):
            self.records.metrics.ran(run.kernel.name, reply.timings)

    def left(self, call: "Call", size: int) -> None:
        """A call is gone, and with it so many bytes."""
        self._live.discard(call)
        self._bytes -= size
        if not self._live:
            self._none_left.set()

    def _cost(self, tenant: Tenant, run_seconds: float) -> None:
        """A run that a tenant's call began has cost so much."""
        tenant.charge(run_seconds, monotonic())
        self.records.metrics.tenants_run_ended(tenant.label, run_seconds)

    async def drain(self) -> None:
        """Take no new calls, and wait until every one has ended."""
        self._draining = True
        while self._live:
            self._none_left.clear()
            await self._none_left.wait()

    def _admit(self, body: Body) -> None:
        settings = self._settings
        if self._draining:
            raise Unavailable("this gateway is draining and takes no new calls")
        if len(self._live) >= settings.max_live_calls:
            raise ResourceExhausted(
                f"the gateway holds max_live_calls={settings.max_live_calls} already", retry_after_milliseconds=100
            )
        if len(body.lengths) > MOST_TENSORS:
            raise InvalidArgument(f"{len(body.lengths)} tensors are more than a call's {MOST_TENSORS}")
        self._fit(body.size)

    def _fit(self, size: int) -> None:
        most = self._settings.max_live_bytes
        if self._bytes + size > most:
            raise ResourceExhausted(
                f"{size} bytes do not fit: calls hold {self._bytes} of max_live_bytes={most}",
                retry_after_milliseconds=100,
            )


def too_much_said(header: bytes) -> InvalidArgument:
    """Why a call is refused that is too large without its tensors' bytes; it names what takes most."""
    culprit, largest = "", 0
    with suppress(Malformed):
        for field in Request.DESCRIPTOR.fields:
            for entry in split(header, field.number, _MOST_NAMED)[1]:
                if len(entry) > largest:
                    culprit, largest = _name_of(field, entry), len(entry)
    return InvalidArgument(
        f"{culprit or 'the call'}: what a call says besides its tensors' bytes takes at most {MOST_DESCRIPTOR_BYTES} "
        f"bytes, and this one {len(header)}",
        field=culprit,
    )


def _name_of(field: FieldDescriptor, entry: memoryview) -> str:
    """A parameter's key and a tensor's name are the first field of their entries; what has neither is the field."""
    if field.message_type is None:
        return _PROTOCOLS_NAMES.get(field.name, field.name)
    first = split(bytes(entry), 1, 1)[1]
    return bytes(first[0][:64]).decode(errors="replace") if first else field.name


class Call:
    """One caller's call, from its admission until its caller has left with the answer.

        begin ──> shares a run ──> answered ──> pieces ──> over ──> left
                        └── failed, expired ─────────────────┘

    Until it is over its deadline holds, and a caller who goes leaves the run too, even when half of the reply is here.
    """

    def __init__(self, calls: Calls, record: Record, run: Run, seconds: float, caller: Caller, tenant: Tenant) -> None:
        self.kernel = run.kernel.name
        self._tenant = tenant
        self._calls = calls
        self._record = record
        self._run = run
        # None once it has left. Each holds the other: bytes that either has would wait for the garbage collector.
        self._caller: Caller | None = caller
        self.deadline = record.began + seconds
        self._seconds = seconds
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expired)
        # Of the reply; what its run holds of the request is the run's.
        self._held_bytes = 0
        self._reply: Reply | None = None
        self._sink: Sink | None = None
        self._over = False

    def shares(self, run: Run) -> None:
        """It waits for this run from now on."""
        self._run = run

    def answer(self, reply: Reply, whole: list[memoryview] | None) -> None:
        """Its run has a reply: the caller gets it, or what is here of it; instead of the one before, if there was."""
        assert self._caller is not None
        own = self._record.descriptor.request.id
        if reply.response.id != own:
            # It shares the run of another.
            reply = copy(reply)
            reply.response.id = own
        try:
            size = sum(reply.lengths)
            self._calls.charge(size, instead_of=self._held_bytes)
            self._held_bytes = size
            self._sink = self._caller.answer(reply, whole)
        except UnlatchError as error:
            self.fail(error, reply)
            return
        self._reply = reply
        if self._sink is None:
            self._end("OK", reply=reply)
            self.leave()
        elif self._sink.complete:
            self._end("OK", reply=reply)

    def feed(self, piece: memoryview) -> None:
        """Take the reply's next piece."""
        assert self._sink is not None
        self._sink.feed(piece)
        if self._sink.complete:
            self._end("OK", reply=self._reply)

    def fail(self, error: UnlatchError, reply: Reply | None = None) -> None:
        """It has failed, by that reply where there is one."""
        if not self._over and self._caller is not None:
            self._end(error.status, error, reply)
            self._run.leave(self)
            self._caller.fail(error)
        self.leave()

    def leave(self) -> None:
        """Its caller has what it came for, or does not wait: free what it holds, here and in the replica."""
        if not self._over:
            self._end("DEADLINE_EXCEEDED" if monotonic() >= self.deadline else "CANCELLED")
            self._run.leave(self)
        if self._caller is not None:
            self._caller = None
            self._tenant.in_flight -= 1
            self._calls.left(self, self._held_bytes)

    def _expired(self) -> None:
        self.fail(DeadlineExceeded(f"kernel {self.kernel} did not answer within {self._seconds:.3g} s"))

    def _end(self, code: str, error: UnlatchError | None = None, reply: Reply | None = None) -> None:
        self._over = True
        self._timer.cancel()
        self._record.ended(code, error, reply, self._run.replica)
