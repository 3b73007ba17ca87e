"""Record of a call: its request id, and what metrics, traces, the log and the caller hear when the call ends."""

import secrets
from itertools import count
from time import monotonic

from unlatch.common.errors import UnlatchError
from unlatch.common.telemetry.recorder import OTHER
from unlatch.common.telemetry.tracing import Attributes, Span, Tracing, bound, end, trace_id
from unlatch.gateway.calls.call_log import CallLog
from unlatch.gateway.metrics import GatewayMetrics
from unlatch.protos.unlatch_pb2 import Descriptor, Reply, Timings

# Label in place of a kernel's name until it is known to be served: callers choose the name.
_UNKNOWN = "unknown"
# A caller's id becomes the request's where it fits a header and a line of the log.
_MAX_ID_CHARACTERS = 128
_MAX_MESSAGE_CHARACTERS = 1000


class Records:
    """Makes records of calls."""

    def __init__(self, metrics: GatewayMetrics, tracing: Tracing, log: CallLog) -> None:
        self.metrics = metrics
        self.tracing = tracing
        self.log = log
        self._made_here = secrets.token_hex(4)
        self._numbers = count(1)

    def begin(self, descriptor: Descriptor) -> "Record":
        """Return the record of a new call. From now on the descriptor names the parent of its replica's spans."""
        bound(descriptor)
        said = descriptor.request.id
        if not said or len(said) > _MAX_ID_CHARACTERS or not (said.isascii() and said.isprintable()):
            said = f"{self._made_here}-{next(self._numbers)}"
        return Record(self, descriptor, said, self.tracing.begin("call", descriptor))


class Record:
    """Record of one call. `ended` is called once."""

    __slots__ = (
        *("_records", "_span", "began", "bytes_in", "bytes_out", "descriptor", "replica", "request_id", "seconds"),
        *("tenant", "timings"),
    )

    def __init__(self, records: Records, descriptor: Descriptor, request_id: str, span: Span | None) -> None:
        self.descriptor = descriptor
        self.request_id = request_id
        self.began = monotonic()
        self.seconds = 0.0
        # Bytes of the tensors, there and back.
        self.bytes_in = self.bytes_out = 0
        # The tenant's label in metrics, once the tenant is known.
        self.tenant = OTHER
        # The replica that answered.
        self.replica = ""
        self.timings: Timings | None = None
        self._records = records
        self._span = span

    def ended(
        self,
        code: str,
        error: UnlatchError | None = None,
        reply: Reply | None = None,
        replica: str = "",
        *,
        known: bool = True,
    ) -> None:
        """Tell metrics, traces and the log that the call has ended.

        `reply` is what `replica` answered, if it did; `known` says whether the call's kernel is one that is served.
        """
        if reply is not None:
            self.replica, self.timings, self.bytes_out = replica, reply.timings, sum(reply.lengths)
        self.seconds = monotonic() - self.began
        records = self._records
        kernel = self.descriptor.request.kernel if known else _UNKNOWN
        records.metrics.call_ended(kernel, code, self.seconds, self.timings)
        records.metrics.tenant_calls.add(1, self.tenant, code)
        message = error.message[:_MAX_MESSAGE_CHARACTERS] if error is not None else ""
        if self._span is not None:
            end(self._span, code, message, self._attributes())
        if records.log.has_room(code):
            records.log.tell(code, self._fields(message))

    @property
    def transfer_microseconds(self) -> int:
        """The part of the call's time that was neither waiting nor running in the replica."""
        spent = self.timings.queue + self.timings.run if self.timings is not None else 0
        return max(0, round(self.seconds * 1e6) - spent)

    def trailers(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata that goes with the answer. Six entries would cost 5 µs, and three cost nothing to see."""
        timings = self.timings
        if timings is None:
            return (("unlatch-request-id", self.request_id),)
        stages = f"transfer={self.transfer_microseconds},queue={timings.queue},run={timings.run}"
        told = ("unlatch-request-id", self.request_id), ("unlatch-microseconds", stages)
        # No call of the reply's run: the call did not run.
        return (*told, ("unlatch-worker", f"{self.replica}/{timings.worker}")) if timings.batch else told

    def _fields(self, message: str) -> dict[str, str | int | float]:
        descriptor = self.descriptor
        told: dict[str, str | int | float] = {
            "request": self.request_id,
            "kernel": descriptor.request.kernel[:64],
            "seconds": round(self.seconds, 6),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }
        if self.timings is not None:
            told |= {"queue_us": self.timings.queue, "run_us": self.timings.run}
            told |= {"transfer_us": self.transfer_microseconds}
        if self.timings is not None and self.timings.batch:
            told |= {"replica": self.replica, "worker": self.timings.worker, "batch": self.timings.batch}
        said = {"message": message, "tenant": descriptor.tenant, "trace": trace_id(descriptor)}
        return told | {name: value for name, value in said.items() if value}

    def _attributes(self) -> Attributes:
        told: dict[str, str | int] = {
            "unlatch.kernel": self.descriptor.request.kernel[:64],
            "unlatch.request": self.request_id,
        }
        return told | {"unlatch.replica": self.replica} if self.replica else told
