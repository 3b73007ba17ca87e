"""Export of spans to a collector by OpenTelemetry's SDK, if the standard OTEL_* variables ask for it.

The SDK comes with `pip install unlatch[otel]` and reads the other variables itself: endpoint, sampler, batching. Only a
process's main uses this module.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import structlog

log = structlog.get_logger()

_EXPORTER = "OTEL_TRACES_EXPORTER"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
# Maximum time that the end of a process waits for its last spans to be sent.
_LAST_SPANS_SECONDS = 1.0


@contextmanager
def exported(process: str, environment: Mapping[str, str]) -> Iterator[None]:
    """A context that records and sends spans if the environment asks for it. Errors are logged; calls go on."""
    stop = _start(process, environment) if _asked(environment) else None
    try:
        yield
    finally:
        if stop is not None:
            # In a daemon thread, so that a collector that does not answer cannot block the end of the process.
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
