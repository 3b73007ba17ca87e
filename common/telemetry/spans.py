"""Spans to a collector: OpenTelemetry's SDK, where the standard OTEL_* variables ask for it.

It comes with `pip install unlatch[otel]` and reads the other variables itself: the endpoint, the sampler, how spans are
gathered. Only a process's main calls this.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import structlog

log = structlog.get_logger()

_EXPORTER = "OTEL_TRACES_EXPORTER"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
# How long the end of a process waits for its last spans to leave.
_LAST_SPANS_SECONDS = 1.0


@contextmanager
def exported(process: str, environment: Mapping[str, str]) -> Iterator[None]:
    """Within, spans are recorded and sent if the environment asks for it. Trouble is only logged: calls matter more."""
    stop = _start(process, environment) if _asked(environment) else None
    try:
        yield
    finally:
        if stop is not None:
            # It waits for a collector that does not answer: a daemon, which the process's end does not wait for.
            ending = threading.Thread(target=stop, name="last spans", daemon=True)
            ending.start()
            ending.join(_LAST_SPANS_SECONDS)


def _asked(environment: Mapping[str, str]) -> bool:
    exporter = environment.get(_EXPORTER, "")
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or exporter == "none":
        return False
    if exporter not in ("", "otlp"):
        log.warning("spans are not exported", message=f"{_EXPORTER}={exporter[:64]}: only otlp is supported")
        return False
    return exporter == "otlp" or any(environment.get(name) for name in _ENDPOINTS)


def _start(process: str, environment: Mapping[str, str]) -> Callable[[], None] | None:
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning("spans are not exported", message=f"{error}; pip install unlatch[otel]")
        return None
    named = environment.get("OTEL_SERVICE_NAME") or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if named else {"service.name": f"unlatch-{process}"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    log.info("spans are exported")
    return provider.shutdown
