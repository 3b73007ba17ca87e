"""Coalescing: identical calls of a pure kernel that are in flight together share one execution.

    begun ──> its kernel's runs are short, or not pure ──────────────────────────> routed
      └─ digested, as its bytes come ──┬─ an identical one is in flight ──> waits for that one's reply
                                       └─ none ──────────────────────────> routed; others may join until it is answered

Identical are calls of one tenant with the same kernel, version, parameters, outputs asked for, and tensors: names,
datatypes, shapes and bytes. Their ids may differ. Tenants do not share: a caller who was answered sooner than a run
takes would know that another tenant had just asked the same. Nor does a call that names no version share with one that
names the version served: while two versions are served during a roll-out, the first call may get either.

A digest costs time on the gateway's one loop, so only calls of kernels whose runs take far longer are digested.
"""

import asyncio
import hashlib
from collections.abc import Callable

from unlatch.common.lane.body import WHOLE_BYTES
from unlatch.gateway.calls.execution import Execution
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.metrics import GatewayMetrics
from unlatch.protos.unlatch_pb2 import Request

# Cost of a digest: BLAKE2b (RFC 7693) reads a gigabyte a second.
_DIGEST_SECONDS = 30e-6
_DIGEST_SECONDS_A_BYTE = 1e-9
# How many times longer a run is to take: a digest that finds no identical call then costs a fiftieth of the run.
_FAR_LONGER = 50
# Bytes that are digested at a time: half a millisecond.
_READ_AT_ONCE = 512 * 1024


class Coalescing:
    """Stands before the fleet: an execution goes there, or its calls wait for an identical one."""

    def __init__(self, fleet: Fleet, metrics: GatewayMetrics, *, on: bool) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._on = on
        self._in_flight: dict[bytes, Execution] = {}

    def route(self, execution: Execution) -> None:
        """Have an execution sent, or its calls wait for an identical one once it is digested."""
        cost = _DIGEST_SECONDS + _DIGEST_SECONDS_A_BYTE * execution.body.size
        name, size = execution.kernel.name, execution.body.size
        if self._on and execution.kernel.pure and self._fleet.expected_seconds(name, size) > _FAR_LONGER * cost:
            _Digest(execution, self._share, self._metrics).begin()
        else:
            execution.route()

    def _share(self, execution: Execution) -> None:
        other = self._in_flight.get(execution.digest)
        if other is not None and other.takes(execution):
            execution.join_another(other)
            self._metrics.coalesced(execution.kernel.name)
        else:
            self._in_flight[execution.digest] = execution
            execution.when_over = self._over
            execution.route()

    def _over(self, execution: Execution) -> None:
        if self._in_flight.get(execution.digest) is execution:
            del self._in_flight[execution.digest]


class _Digest:
    """A digest of one execution's call, made as its bytes come; `then` is called when it is made."""

    def __init__(self, execution: Execution, then: Callable[[Execution], None], metrics: GatewayMetrics) -> None:
        self._execution = execution
        self._then = then
        self._metrics = metrics
        self._hash = hashlib.blake2b(_said(execution), digest_size=16)
        self._is_due = False

    def begin(self) -> None:
        """Digest a small body now, a larger one by turns with all else that the loop has to do."""
        body = self._execution.body
        if body.complete and body.size <= WHOLE_BYTES:
            for buffer in body.buffers:
                self._hash.update(buffer)
            self._done()
        else:
            self._cursor = body.subscribe(self._more)
            # The cursor keeps what is not read: it must not outlive the execution.
            self._execution.when_over = self._close
            self._more()

    def _close(self, _: Execution) -> None:
        self._cursor.close()

    def _more(self) -> None:
        # By turns, however much has come at once.
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._read)

    def _read(self) -> None:
        try:
            self._is_due = False
            if not self._execution.over and self._read_some():
                self._cursor.close()
                self._execution.when_over = None
                self._done()
        except Exception as error:  # noqa: BLE001 (the guard: its calls hear of it)
            self._execution.failed(self._metrics.errors.caught("coalescing", error))

    def _read_some(self) -> bool:
        """Read what one turn allows; return whether all is read."""
        left = _READ_AT_ONCE
        while left:
            piece = self._cursor.next(left)
            if piece is None:
                return self._cursor.finished
            self._hash.update(piece)
            left -= len(piece)
        if self._cursor.finished:
            return True
        self._more()
        return False

    def _done(self) -> None:
        self._execution.digest = self._hash.digest()
        self._then(self._execution)


def _said(execution: Execution) -> bytes:
    """Return all that a call says besides its bytes, for its tenant: equal bytes for equal calls.

    The order of parameters does not matter.
    """
    said = Request()
    said.CopyFrom(execution.descriptor.request)
    said.id = ""
    tenant = execution.demand.tenant.encode()
    lengths = ",".join(map(str, execution.body.lengths)).encode()
    return b"%d:%b%b;" % (len(tenant), tenant, lengths) + said.SerializeToString(deterministic=True)
