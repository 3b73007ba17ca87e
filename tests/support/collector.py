"""A collector of spans for tests: it takes what a real one takes over gRPC, and keeps it."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

_SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
_WITHIN_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A span as it arrived. Times are nanoseconds since the epoch."""

    service: str
    name: str
    trace: str
    span: str
    parent: str
    state: str
    began: int
    ended: int
    failed: bool
    attributes: dict[str, Any]


class Collector:
    """The collector's end of OTLP."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._came = threading.Condition()

    def export(self, request: ExportTraceServiceRequest, _: object) -> ExportTraceServiceResponse:
        """Keep the spans of this request."""
        with self._came:
            for sent in request.resource_spans:
                service = _values(sent.resource.attributes)["service.name"]
                self._spans += [_span(service, span) for scope in sent.scope_spans for span in scope.spans]
            self._came.notify_all()
        return ExportTraceServiceResponse()

    def wait_for(self, trace: str, count: int) -> dict[str, Span]:
        """Wait for `count` spans of a trace, and return them by name. Fails when they do not come in time."""
        with self._came:
            there = self._came.wait_for(lambda: len(self._of(trace)) >= count, _WITHIN_SECONDS)
            found = self._of(trace)
        assert there, f"{len(found)} spans of {count} came within {_WITHIN_SECONDS} s: {found}"
        assert len(found) == count
        return {span.name: span for span in found}

    def _of(self, trace: str) -> list[Span]:
        return [span for span in self._spans if span.trace == trace]


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    """Run a collector; yield it and its address."""
    collector, server = Collector(), grpc.server(ThreadPoolExecutor(2))
    export = grpc.unary_unary_rpc_method_handler(
        collector.export, ExportTraceServiceRequest.FromString, ExportTraceServiceResponse.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {"Export": export}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def _span(service: str, span: Any) -> Span:
    return Span(
        service=service,
        name=span.name,
        trace=span.trace_id.hex(),
        span=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        state=span.trace_state,
        began=span.start_time_unix_nano,
        ended=span.end_time_unix_nano,
        failed=span.status.code == span.status.STATUS_CODE_ERROR,
        attributes=_values(span.attributes),
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in attributes}
