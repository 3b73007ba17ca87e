"""Traces: W3C trace context in descriptors, and spans through OpenTelemetry's API.

    the caller's span ── traceparent ──> gateway: `call` ── Descriptor.traceparent ──> dispatcher: `queue`, `run`

A process without an SDK makes no spans and passes the caller's context on unchanged, which is all that the standard
asks of a hop that takes no part in the trace. A receiver ignores a context that is malformed
(https://www.w3.org/TR/trace-context/).
"""

from collections.abc import Mapping
from time import monotonic, time_ns

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from unlatch.protos.unlatch_pb2 import Descriptor

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
# Longer headers are dropped. The standard asks for 512 of tracestate, and traceparent takes 55.
_MAX_CHARACTERS = 512

_PROPAGATOR = TraceContextTextMapPropagator()

Attributes = Mapping[str, str | int]
Span = trace.Span


def bound(descriptor: Descriptor) -> None:
    """Drop headers of a call that are too long for a trace context."""
    if len(descriptor.traceparent) > _MAX_CHARACTERS:
        descriptor.traceparent = ""
    if len(descriptor.tracestate) > _MAX_CHARACTERS or not descriptor.traceparent:
        descriptor.tracestate = ""


def trace_id(descriptor: Descriptor) -> str:
    """The id of a call's trace, 32 hexadecimal digits; "" without one."""
    said = trace.get_current_span(_context(descriptor)).get_span_context()
    return trace.format_trace_id(said.trace_id) if said.is_valid else ""


class Tracing:
    """Makes spans, if the process has set up an SDK. Create this after that."""

    def __init__(self) -> None:
        provider = trace.get_tracer_provider()
        recorded = not isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider)
        self._tracer = provider.get_tracer("unlatch") if recorded else None

    @property
    def records(self) -> bool:
        """Whether spans are made at all."""
        return self._tracer is not None

    def begin(self, name: str, descriptor: Descriptor) -> Span | None:
        """Begin a call's span, the parent of the spans that its replica makes."""
        if self._tracer is None:
            return None
        span = self._tracer.start_span(name, _context(descriptor), trace.SpanKind.SERVER)
        said: dict[str, str] = {}
        _PROPAGATOR.inject(said, trace.set_span_in_context(span))
        descriptor.traceparent, descriptor.tracestate = said.get(TRACEPARENT, ""), said.get(TRACESTATE, "")
        return span

    def passed(self, name: str, descriptor: Descriptor, began: float, ended: float, attributes: Attributes) -> None:
        """Record a span of a part of a call that has ended. Times are of the monotonic clock."""
        if self._tracer is None:
            return
        epoch = time_ns() - monotonic() * 1e9
        span = self._tracer.start_span(
            name, _context(descriptor), attributes=dict(attributes), start_time=round(epoch + began * 1e9)
        )
        span.end(round(epoch + ended * 1e9))


def end(span: trace.Span, code: str, message: str, attributes: Attributes) -> None:
    """End a span with the outcome of its call."""
    if span.is_recording():
        span.set_attributes(dict(attributes))
        if code != "OK":
            span.set_status(trace.StatusCode.ERROR, message or code)
    span.end()


def _context(descriptor: Descriptor) -> Context:
    said = {TRACEPARENT: descriptor.traceparent}
    if descriptor.tracestate:
        said[TRACESTATE] = descriptor.tracestate
    return _PROPAGATOR.extract(said)
