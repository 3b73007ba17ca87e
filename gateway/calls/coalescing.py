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

import hashlib
from collections.abc import Callable, Iterator

from unlatch.common.fair import ByTurns
from unlatch.gateway.calls.execution import Execution
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

    def __init__(self, metrics: GatewayMetrics, *, on: bool) -> None:
        self._metrics = metrics
        self._on = on
        self._in_flight: dict[bytes, Execution] = {}

    def route(self, execution: Execution) -> None:
        """Have an execution sent, or its calls wait for an identical one once it is digested."""
        cost = _DIGEST_SECONDS + _DIGEST_SECONDS_A_BYTE * execution.body.size
        name, size = execution.kernel.name, execution.body.size
        if self._on and execution.kernel.pure and execution.fleet.expected_seconds(name, size) > _FAR_LONGER * cost:
            _Digest(execution, self._share, self._metrics)
        else:
            execution.route()

    def _share(self, execution: Execution) -> None:
        other = self._in_flight.get(execution.digest)
        if other is not None and other.takes(execution):
            execution.join_another(other)
            self._metrics.coalesced_calls.add(1, execution.kernel.name)
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
        reading = ByTurns(self._read, at_once=1, caught=self._failed)
        self._cursor = execution.body.subscribe(reading.start)
        # The cursor keeps what is not read: it must not outlive the execution.
        execution.when_over = self._close
        reading.start()

    def _read(self) -> Iterator[None]:
        """Digest what is here, and end once that was all. Yields after each slice (a ByTurns step)."""
        read = 0
        while not self._execution.over and (piece := self._cursor.next(_READ_AT_ONCE)) is not None:
            self._hash.update(piece)
            read += len(piece)
            if read >= _READ_AT_ONCE:
                read = 0
                yield
        if not self._execution.over and self._cursor.finished:
            self._close(self._execution)
            self._done()

    def _done(self) -> None:
        self._execution.digest = self._hash.digest()
        self._then(self._execution)

    def _close(self, execution: Execution) -> None:
        execution.when_over = None
        self._cursor.close()

    def _failed(self, error: Exception) -> None:
        self._execution.failed(self._metrics.errors.caught("coalescing", error))


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
