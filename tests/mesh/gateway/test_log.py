"""Lines of a gateway's log that its callers cause: none for what is to be expected of callers, and never a flood."""

import time
from pathlib import Path

import grpc
from h2.events import StreamEnded, StreamReset

from tests.conftest import StartMesh
from tests.support.doors import LaneEnd, Metadata, descriptor, request, vector
from tests.support.http2 import Http2
from tests.support.issuer import Issuer, bearer
from tests.support.mesh import Mesh
from tests.support.watching import Scrape, wait_until
from unlatch.protos.unlatch_pb2 import Frames, LaneMessage

SERVICE = "/inference.GRPCInferenceService/"
LANE = "/unlatch.v1.Lane/Open"
CALLERS = 400
LANES = 2000


def test_callers_who_leave_as_an_error_is_answered_are_no_errors(start_mesh: StartMesh) -> None:
    """400 requests that are refused, each reset at once: no line of them is an error, and none has a traceback."""
    mesh = start_mesh()
    message = vector("no_such_kernel", 1.0).SerializeToString()
    with Http2(mesh.gateway) as connection:
        for _ in range(CALLERS):
            stream = connection.begin(SERVICE + "ModelInfer")
            connection.h2.send_data(stream, b"\0" + len(message).to_bytes(4) + message, end_stream=True)
            connection.h2.reset_stream(stream, 8)
            connection.flush()
        wait_until(
            lambda: (
                Scrape(mesh.gateway_metrics).sum("grpc_server_handled_total", grpc_method="ModelInfer") > 0.5 * CALLERS
            ),
            "the gateway has handled them",
        )
    errors = [entry for entry in mesh.gateway_service.entries if entry["level"] not in ("info", "warning")]
    assert errors == []
    assert not [entry for entry in mesh.gateway_service.entries if "exception" in entry]
    assert not [line for line in mesh.gateway_service.lines if "Traceback" in line]


def told(mesh: Mesh, event: str) -> tuple[int, int]:
    """Return how many lines the gateway's log has of an event, and how many it has or accounts for."""
    lines = [entry for entry in mesh.gateway_service.entries if entry["event"] == event]
    return len(lines), len(lines) + sum(line.get("left_out", 0) for line in lines)


def all_lanes_end(connection: Http2, lanes: list[int]) -> None:
    """Wait until the gateway has ended each of these lanes."""
    left = set(lanes)
    while left:
        events = connection.events()
        assert events, "the connection was closed"
        left -= {event.stream_id for event in events if isinstance(event, StreamEnded | StreamReset)}


def open_lanes(connection: Http2, count: int, metadata: Metadata = ()) -> list[int]:
    """Open lanes on a connection with room for the welcomes of all."""
    connection.h2.increment_flow_control_window(1 << 26)
    return [connection.begin(LANE, metadata) for _ in range(count)]


def send(connection: Http2, lanes: list[int], message: bytes) -> None:
    """Send a message on each of these lanes."""
    for lane in lanes:
        connection.h2.send_data(lane, b"\0" + len(message).to_bytes(4) + message)
    connection.flush()


def test_lanes_that_break_the_protocol_fill_no_log(start_mesh: StartMesh) -> None:
    """2,000 lanes with garbage: ten lines a second at most, and the next line says how many had none."""
    mesh, began = start_mesh(), time.monotonic()
    for _ in range(LANES // 500):
        with Http2(mesh.gateway) as connection:
            lanes = open_lanes(connection, 500)
            send(connection, lanes, b"garbage")
            all_lanes_end(connection, lanes)
    lines, _ = told(mesh, "lane closed")
    assert 1 <= lines <= 10 * (2 + time.monotonic() - began)
    # The ration is full again.
    time.sleep(1.1)
    with grpc.insecure_channel(mesh.gateway) as channel, LaneEnd(channel) as lane:
        lane.send_bytes(b"garbage")
        assert lane.end().code == "INVALID_ARGUMENT"
    wait_until(lambda: told(mesh, "lane closed")[1] == LANES + 1, "every lane is accounted for")


def test_lanes_that_are_cut_off_fill_no_log(start_mesh: StartMesh) -> None:
    """2,000 lanes, each with a call that runs, whose connections are closed: these ends are no errors."""
    mesh = start_mesh(gateway=("--logged-failures-per-second", "0"))
    call = Frames(calls=[descriptor(1, request("sleeps", None, seconds=0.01))])
    before = len(mesh.gateway_service.lines)
    for _ in range(LANES // 500):
        with Http2(mesh.gateway) as connection:
            lanes = open_lanes(connection, 500)
            send(connection, lanes, LaneMessage(frames=call).SerializeToString())
    wait_until(lambda: not Scrape(mesh.gateway_metrics).sum("unlatch_calls_in_flight"), "no call is left")
    assert [line for line in mesh.gateway_service.lines[before:] if '"event": "call"' not in line] == []


def test_lanes_whose_tokens_end_fill_no_log(start_mesh: StartMesh, tmp_path: Path) -> None:
    """1,000 lanes whose token ends at once for all: ten lines a second, and the next one says how many had none."""
    issuer, count = Issuer(tmp_path), 1000
    mesh = start_mesh(gateway=(*issuer.flags, "--max-streams", str(count)))
    with Http2(mesh.gateway) as connection:
        lanes = open_lanes(connection, count, bearer(issuer.token(seconds=4)))
        connection.flush()
        all_lanes_end(connection, lanes)
        lines, _ = told(mesh, "lane is closed")
        assert 1 <= lines <= 60
    time.sleep(1.1)
    with (
        grpc.insecure_channel(mesh.gateway) as channel,
        LaneEnd(channel, bearer(issuer.token(seconds=2))) as lane,
    ):
        assert lane.end().code == "UNAUTHENTICATED"
    wait_until(lambda: told(mesh, "lane is closed")[1] == count + 1, "every lane is accounted for")
