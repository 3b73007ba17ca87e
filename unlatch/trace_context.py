"""The trace that whoever calls is in, for the call to say: W3C Trace Context, by OpenTelemetry's API.

Whoever has a span has loaded that API. Who has not is not made to: it would double the time that a command takes to
start.
"""

import sys


def current() -> tuple[str, str]:
    """`traceparent` and `tracestate`; empty outside of any span."""
    api = sys.modules.get("opentelemetry.trace")
    if api is None or not api.get_current_span().get_span_context().is_valid:
        return "", ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    said: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(said)
    return said.get("traceparent", ""), said.get("tracestate", "")
