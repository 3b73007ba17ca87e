"""Coalescing: identical calls of a pure kernel that are in flight together share one run.

    begun ──> its kernel's runs are short, or not pure ─────────────────> routed
      └─ digested, as its bytes come ──┬─ one like it is in flight ──> waits for that one's reply
                                       └─ none ──────────────────────> routed; others may join until it is answered

Alike are calls of one tenant with the same kernel, version, parameters, outputs asked for, and tensors: names,
datatypes, shapes and bytes. Not their ids. Tenants do not share: who was answered sooner than a run takes would know
that another had just asked the same. Nor does who names no version with who names the one that is served: of two that
are served during a roll-out the first may get either.

A digest costs the gateway's one loop, so only such kernels are read whose runs take far longer.
"""

import asyncio
import hashlib
from collections.abc import Callable

from unlatch.common.lane.body import WHOLE_BYTES, Body
from unlatch.gateway.calls.execution import Run
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.metrics import GatewayMetrics
from unlatch.protos.unlatch_pb2 import Request

# What a digest costs here: BLAKE2b (RFC 7693) reads a gigabyte a second.
_DIGEST_SECONDS = 30e-6
_DIGEST_SECONDS_A_BYTE = 1e-9
# How much longer a run is to take: what is read in vain then costs a fiftieth of what is run.
_FAR_LONGER = 50
# What is read at a time: half a millisecond.
_READ_AT_ONCE = 512 * 1024


class Coalescing:
    """Stands before the fleet: a run goes there, or its calls wait for one like it."""

    def __init__(self, fleet: Fleet, metrics: GatewayMetrics, *, on: bool) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._on = on
        self._in_flight: dict[bytes, Run] = {}

    def route(self, run: Run) -> None:
        """Have a run sent, or its calls wait for one like it, once it is known what it is."""
        cost = _DIGEST_SECONDS + _DIGEST_SECONDS_A_BYTE * run.body.size
        name = run.kernel.name
        if self._on and run.kernel.pure and self._fleet.expected_seconds(name, run.body.size) > _FAR_LONGER * cost:
            _Reading(run, self._share)
        else:
            run.route()

    def over(self, run: Run) -> None:
        """A run has ended."""
        if run.digest and self._in_flight.get(run.digest) is run:
            del self._in_flight[run.digest]

    def _share(self, run: Run) -> None:
        other = self._in_flight.get(run.digest)
        if other is not None and other.takes(run):
            run.join_another(other)
            self._metrics.coalesced(run.kernel.name)
        else:
            self._in_flight[run.digest] = run
            run.route()


class _Reading:
    """A run whose bytes are read, as they come; `then` is called when they have been."""

    def __init__(self, run: Run, then: Callable[[Run], None]) -> None:
        self._run = run
        self._then = then
        self._digest = hashlib.blake2b(_said(run), digest_size=16)
        self._buffer = self._offset = 0
        self._is_due = False
        body = run.body
        if body.complete and body.size <= WHOLE_BYTES:
            for buffer in body.buffers:
                self._digest.update(buffer)
            self._done(body)
        else:
            body.on_more = None if body.complete else self._more
            self._more()

    def _more(self) -> None:
        # By turns, however much has come at once.
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._read)

    def _read(self) -> None:
        self._is_due = False
        body, left = self._run.body, _READ_AT_ONCE
        if self._run.complete:
            return  # everyone has left
        while left and self._buffer < len(body.buffers):
            piece = memoryview(body.buffers[self._buffer])[self._offset : self._offset + left]
            self._digest.update(piece)
            left -= len(piece)
            self._offset += len(piece)
            if self._offset == len(body.buffers[self._buffer]):
                self._buffer, self._offset = self._buffer + 1, 0
        if self._buffer < len(body.buffers):
            self._more()
        elif body.complete:
            self._done(body)

    def _done(self, body: Body) -> None:
        # The body holds this, and this the body.
        body.on_more = None
        self._run.digest = self._digest.digest()
        self._then(self._run)


def _said(run: Run) -> bytes:
    """What a call says besides its bytes, for its tenant: the same bytes for the same, in any order of parameters."""
    said = Request()
    said.CopyFrom(run.descriptor.request)
    said.id = ""
    tenant = run.demand.tenant.encode()
    lengths = ",".join(map(str, run.body.lengths)).encode()
    return b"%d:%b%b;" % (len(tenant), tenant, lengths) + said.SerializeToString(deterministic=True)
