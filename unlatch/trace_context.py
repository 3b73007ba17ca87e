"""The caller's trace context (W3C Trace Context, by OpenTelemetry's API), to be sent with a call.

A program that has a span has imported that API already. For any other program this module does not import it, since
that would double the start-up time of a command.
"""

import sys


def current() -> tuple[str, str]:
    """The current span's `traceparent` and `tracestate`; empty outside of any span."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None or not api.get_current_span().get_span_context().is_valid:
        return "", ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    said: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(said)
    return said.get("traceparent", ""), said.get("tracestate", "")
