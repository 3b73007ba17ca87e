"""A call can be found in a collector's traces, in the gateway's log, and in what its caller got back."""

import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry.sdk.trace import TracerProvider

from tests.conftest import StartMesh
from tests.support.collector import Collector, collecting
from tests.support.doors import LaneEnd, descriptor, vector
from tests.support.mesh import MESHES, Entry, Mesh, running_mesh
from unlatch import Client
from unlatch.common.errors import UnlatchError
from unlatch.protos.inference_pb2 import ModelInferRequest
from unlatch.protos.unlatch_pb2 import Frames

X = np.arange(3.0)
# The log has a line for a call like this.
EVERY_CALL = ("--logged-calls-per-second", "1000")
Metadata = tuple[tuple[str, str], ...]


@pytest.fixture(scope="module", params=MESHES)
def traced(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Mesh, Collector]]:
    """A mesh that sends its spans to a collector: in two processes, or in one."""
    with collecting() as (collector, address), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        with MESHES[request.param](tmp_path_factory.mktemp("traced"), gateway=EVERY_CALL) as mesh:
            patch.undo()
            yield mesh, collector


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh without a collector."""
    with running_mesh(tmp_path_factory.mktemp("plain"), gateway=EVERY_CALL) as mesh:
        yield mesh


class Trace:
    """A trace that a caller has begun."""

    def __init__(self) -> None:
        self.trace, self.span = secrets.token_hex(16), secrets.token_hex(8)

    @property
    def metadata(self) -> Metadata:
        return (("traceparent", f"00-{self.trace}-{self.span}-01"), ("tracestate", "vendor=here"))


def infer(mesh: Mesh, message: ModelInferRequest, metadata: Metadata = ()) -> tuple[str, dict[str, Any]]:
    """Make a call through the protocol's door; return its status and trailers."""
    with grpc.insecure_channel(mesh.gateway) as channel:
        rpc: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        try:
            _, call = rpc.with_call(message.SerializeToString(), timeout=10.0, metadata=metadata)
        except grpc.RpcError as error:
            call = error
        return call.code().name, dict(call.trailing_metadata() or ())


def logged(mesh: Mesh, request: str) -> Entry:
    """Return the log line of a call."""
    return mesh.gateway_service.wait_for("call", request=request)


def look_at(mesh: Mesh, collector: Collector, trace: str, parent: str) -> None:
    """Check that a call's three spans belong together across both services, and lie within one another."""
    spans = collector.wait_for(trace, 3)
    call, queue, run = spans["call"], spans["queue"], spans["run"]
    is_unit = mesh.gateway_service is mesh.dispatcher_service
    gateway, dispatcher = ["unlatch-unit"] * 2 if is_unit else ["unlatch-gateway", "unlatch-dispatcher"]
    assert (call.service, queue.service, run.service) == (gateway, dispatcher, dispatcher)
    assert call.parent == parent
    assert queue.parent == run.parent == call.span
    assert call.attributes["unlatch.kernel"] == run.attributes["unlatch.kernel"] == "identity"
    assert run.attributes["unlatch.batch"] == 1
    # Both clocks are the same machine's, read some microseconds apart.
    assert call.began - 1e6 <= queue.began <= queue.ended <= run.began + 1e6
    assert run.began < run.ended <= call.ended + 1e6
    assert not any(span.failed for span in spans.values())


def test_trace_goes_through_both_services(traced: tuple[Mesh, Collector]) -> None:
    """The caller's span is the parent of the gateway's, which is the dispatcher's parent. Tracestate is kept."""
    (mesh, collector), trace = traced, Trace()
    assert infer(mesh, vector("identity", 1.0), trace.metadata)[0] == "OK"
    look_at(mesh, collector, trace.trace, trace.span)
    assert {span.state for span in collector.wait_for(trace.trace, 3).values()} == {"vendor=here"}


def test_stream_belongs_to_its_callers_trace(traced: tuple[Mesh, Collector]) -> None:
    """Calls of a stream have the stream's parent."""
    (mesh, collector), trace = traced, Trace()
    with grpc.insecure_channel(mesh.gateway) as channel:
        rpc: Any = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        message = vector("identity", 1.0).SerializeToString()
        assert len(list(rpc(iter([message]), timeout=10.0, metadata=trace.metadata))) == 1
    look_at(mesh, collector, trace.trace, trace.span)


async def test_python_clients_span_is_the_parent(traced: tuple[Mesh, Collector]) -> None:
    """A call made inside a caller's span, on a lane, is that span's child. Other calls are not."""
    mesh, collector = traced
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("test")
    async with Client(mesh.gateway) as client:
        with tracer.start_as_current_span("caller") as span:
            await client.identity(X)
        await client.identity(X)
    context = span.get_span_context()
    look_at(mesh, collector, f"{context.trace_id:032x}", f"{context.span_id:016x}")


def test_failed_call_is_a_failed_span(traced: tuple[Mesh, Collector]) -> None:
    """A refusal in the gateway is a failed span too, with the reason."""
    (mesh, collector), trace = traced, Trace()
    assert infer(mesh, vector("identify"), trace.metadata)[0] == "NOT_FOUND"
    span = collector.wait_for(trace.trace, 1)["call"]
    assert span.failed
    assert span.parent == trace.span


@pytest.mark.parametrize(
    "traceparent",
    [
        "garbage",
        "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
        "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00F067AA0BA902B7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01" + "-more" * 1000,
    ],
)
def test_what_is_no_trace_context_is_ignored(traced: tuple[Mesh, Collector], traceparent: str) -> None:
    """The call succeeds, and begins a trace of its own."""
    mesh, collector = traced
    code, trailers = infer(mesh, vector("identity", 1.0), (("traceparent", traceparent), ("tracestate", "vendor=here")))
    assert code == "OK"
    look_at(mesh, collector, logged(mesh, trailers["unlatch-request-id"])["trace"], "")


def test_log_and_trailers_tell_the_same_story(plain: Mesh) -> None:
    """The log line has the caller's id and the fields of the trailers. No trace is invented."""
    request = vector("identity", 1.0)
    request.id = f"mine-{secrets.token_hex(4)}"
    code, trailers = infer(plain, request)
    line = logged(plain, request.id)
    assert code == line["code"] == "OK"
    assert trailers["unlatch-request-id"] == request.id
    assert trailers["unlatch-worker"] == f"{line['replica']}/{line['worker']}"
    stages = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", trailers["unlatch-microseconds"])}
    assert stages == {name: line[f"{name}_us"] for name in ("transfer", "queue", "run")}
    assert sum(stages.values()) == pytest.approx(line["seconds"] * 1e6, abs=2)
    assert (line["kernel"], line["bytes_in"], line["bytes_out"]) == ("identity", 8, 8)
    assert "trace" not in line


@pytest.mark.parametrize("refusal", ["by the gateway", "by the dispatcher"])
def test_call_that_did_not_run_names_no_worker(plain: Mesh, refusal: str) -> None:
    """A call that is refused before it runs has no worker, in its trailers and in the log."""
    request = vector("identify" if refusal == "by the gateway" else "identity", 1.0)
    request.id = f"mine-{secrets.token_hex(4)}"
    request.parameters["unknown"].int64_param = 1
    code, trailers = infer(plain, request)
    line = logged(plain, request.id)
    assert code == line["code"] == ("NOT_FOUND" if refusal == "by the gateway" else "INVALID_ARGUMENT")
    assert ("unlatch-microseconds" in trailers) is (refusal == "by the dispatcher")
    assert "unlatch-worker" not in trailers
    assert not {"replica", "worker", "batch"} & line.keys()


@pytest.mark.parametrize("id_", ["", "n" * 129, "two\nlines", "ünprintable"])
def test_gateway_names_what_has_no_fit_name(plain: Mesh, id_: str) -> None:
    """A request without an id that fits a header gets one. The answer still has the caller's own."""
    request = vector("identify", 1.0)
    request.id = id_
    code, trailers = infer(plain, request)
    assert code == "NOT_FOUND"
    assert trailers["unlatch-request-id"] not in ("", id_)
    assert "did you mean identity" in logged(plain, trailers["unlatch-request-id"])["message"]


async def test_python_client_is_told_the_request_id(plain: Mesh) -> None:
    """A failure behind a lane is in the gateway's log under the id in the error's notes."""
    async with Client(plain.gateway) as client:
        with pytest.raises(UnlatchError) as raised:
            await client.raises_kernel_error(message="no luck")
    (note,) = raised.value.__notes__
    line = logged(plain, note.removeprefix("request "))
    assert (line["kernel"], line["message"]) == ("raises_kernel_error", "no luck")


def test_caller_who_is_traced_where_nobody_records_is_still_found(plain: Mesh) -> None:
    """Without an SDK the log line has the caller's trace."""
    trace, request = Trace(), vector("identity", 1.0)
    request.id = f"mine-{secrets.token_hex(4)}"
    infer(plain, request, trace.metadata)
    assert logged(plain, request.id)["trace"] == trace.trace


def test_log_does_not_drown(start_mesh: StartMesh) -> None:
    """The log has a line for the configured share of many calls."""
    mesh = start_mesh(gateway=["--logged-calls-per-second", "0", "--logged-failures-per-second", "0.001"])
    for _ in range(5):
        infer(mesh, vector("identity", 1.0))
        infer(mesh, vector("identify", 1.0))
    mesh.gateway_service.stop()
    lines = [entry for entry in mesh.gateway_service.entries if entry["event"] == "call"]
    assert [line["code"] for line in lines] == ["NOT_FOUND"]


def test_missing_collector_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans that cannot be sent are dropped. Calls are answered, and the processes end in time."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    with running_mesh(tmp_path) as mesh:
        assert infer(mesh, vector("identity", 1.0))[0] == "OK"


def test_no_exporter_but_otlp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another exporter is refused with a log line, and calls are served."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with running_mesh(tmp_path) as mesh:
        assert mesh.gateway_service.wait_for("spans are not exported")["message"].endswith("only otlp is supported")
        assert infer(mesh, vector("identity", 1.0))[0] == "OK"


def test_trace_of_a_descriptor_is_bounded(plain: Mesh) -> None:
    """A trace field of a lane's caller that is no trace context goes no further than the gateway."""
    frame = descriptor(1, vector("identity", 1.0))
    frame.traceparent = "0" * 10_000
    frame.request.id = f"mine-{secrets.token_hex(4)}"
    with grpc.insecure_channel(plain.gateway) as channel, LaneEnd(channel) as lane:
        lane.send(Frames(calls=[frame]), np.ones(1).tobytes())
        assert lane.reply(1)[0].HasField("response")
    assert "trace" not in logged(plain, frame.request.id)
