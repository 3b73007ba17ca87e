"""A call's life in a gateway: the memory that it holds until its caller has left, and its possible ends."""

import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from jaxtyping import Float64

from tests.conftest import StartMesh
from tests.support.doors import LARGE, LaneEnd, Oip, arrays_of, descriptor, pieces, request, vector
from tests.support.mesh import Mesh, Service, running_dispatcher
from tests.support.watching import Gate, Scrape, resident_bytes, wait_until
from unlatch.protos.unlatch_pb2 import Frames

KIBIBYTE, MEBIBYTE = 1024, 1024 * 1024


def outer(mebibytes: int) -> tuple[Float64[np.ndarray, "n 1"], Float64[np.ndarray, "1 512"]]:
    """Two small vectors whose product as matrices has this size."""
    return np.ones((mebibytes * MEBIBYTE // 8 // 512, 1)), np.ones((1, 512))


def ended(mesh: Mesh, code: str, kernel: str = "matmul") -> float:
    return Scrape(mesh.gateway_metrics).sum("unlatch_calls_total", kernel=kernel, code=code)


def test_replies_that_nobody_reads_are_bounded(start_mesh: StartMesh) -> None:
    """Replies count against max_live_bytes until they are handed on. A reply that does not fit is refused."""
    mesh = start_mesh(gateway=["--max-live-bytes", str(40 * MEBIBYTE)])
    a, b = outer(16)
    with grpc.insecure_channel(mesh.gateway) as channel, LaneEnd(channel) as lane:
        for number in range(1, 9):
            lane.call(number, request("matmul", {"a": a, "b": b}))
        refused = 0
        for number in range(1, 9):
            reply, body = lane.reply(number)
            if reply.HasField("failure"):
                assert "max_live_bytes=41943040" in reply.failure.message
                refused += 1
            else:
                assert body == np.ones(16 * MEBIBYTE // 8).tobytes()
        assert 1 <= refused < 8
        # All memory has been freed.
        lane.call(9, request("matmul", {"a": a, "b": b}))
        assert len(lane.reply(9)[1]) == 16 * MEBIBYTE


@pytest.mark.parametrize("what", ["reply", "cancel"])
def test_what_a_call_held_is_free_once_it_has_ended(what: str, start_mesh: StartMesh) -> None:
    """A call's memory is free at once: 256 MiB, call after call, fit in far less. No garbage collection is needed."""
    mesh = start_mesh()
    a, b = outer(16) if what == "reply" else (np.ones((2 * MEBIBYTE, 1)), np.ones((1, 1)))
    message = request("matmul", {"a": a, "b": b})
    before = resident_bytes(mesh.gateway_service.pid)
    with grpc.insecure_channel(mesh.gateway, options=LARGE) as channel, LaneEnd(channel) as lane:
        for number in range(1, 17):
            if what == "reply":
                (product,) = arrays_of(Oip(channel).infer(message))
                assert product.nbytes == 16 * MEBIBYTE
            else:
                lane.call(number, message)
                lane.send(Frames(cancels=[number]))
                lane.forget(number)
        assert lane.serves(17)
        assert resident_bytes(mesh.gateway_service.pid) - before < 128 * MEBIBYTE


def test_caller_who_leaves_in_the_middle_of_a_reply_takes_the_call_back(start_mesh: StartMesh) -> None:
    """A cancel in the middle of a reply counts as cancelled, and no more of the reply is sent."""
    mesh = start_mesh()
    a, b = outer(64)
    with grpc.insecure_channel(mesh.gateway) as channel, LaneEnd(channel) as lane:
        lane.call(1, request("matmul", {"a": a, "b": b}))
        lane.first_frame(1)
        lane.send(Frames(cancels=[1]))
        lane.forget(1)
        assert lane.serves(2)
        wait_until(lambda: ended(mesh, "CANCELLED") + ended(mesh, "OK") == 1, "it is counted")
        wait_until(lambda: Scrape(mesh.gateway_metrics).sum("unlatch_calls_in_flight") == 0, "nothing is in flight")


def test_response_that_is_too_large_is_counted_as_what_its_caller_got(start_mesh: StartMesh) -> None:
    """Such a reply is refused at its first frame, before its bytes come, and the metrics have the caller's status."""
    mesh = start_mesh(gateway=["--max-message-bytes", str(256 * KIBIBYTE)])
    a, b = outer(1)
    with grpc.insecure_channel(mesh.gateway) as channel:
        assert Oip(channel).refusal(request("matmul", {"a": a, "b": b})).code == "RESOURCE_EXHAUSTED"
    assert (ended(mesh, "RESOURCE_EXHAUSTED"), ended(mesh, "OK")) == (1, 0)


def test_unreadable_request_is_counted(start_mesh: StartMesh) -> None:
    """A request that cannot be read is counted too, under no kernel's name."""
    mesh = start_mesh()
    with grpc.insecure_channel(mesh.gateway) as channel:
        assert Oip(channel).refusal(b"\xff").code == "INVALID_ARGUMENT"
    assert ended(mesh, "INVALID_ARGUMENT", "unknown") == 1


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (request("identity", None, note="n" * 10_000_000).SerializeToString(), "131072"),
        (request("n" * 10_000_000).SerializeToString(), "131072"),
        (vector("identity", 1).SerializeToString() + b"\x3a\x00" * 2_000_000, "256"),
        (vector("identity", 1).SerializeToString() + b"\x40\x00" * 2_000_000, "4096"),
    ],
    ids=["parameter", "kernel", "tensors", "fields"],
)
def test_what_a_lane_cannot_carry_never_reaches_one(message: bytes, says: str, mesh: Mesh) -> None:
    """A request that is far too large is refused at the door, and affects no other call."""
    with grpc.insecure_channel(mesh.gateway, options=[("grpc.max_send_message_length", -1)]) as channel:
        oip = Oip(channel)
        with ThreadPoolExecutor(1) as bystander:
            waiting = bystander.submit(oip.infer, request("sleeps", None, seconds=0.3))
            refusal = oip.refusal(message)
            assert (refusal.code, says in refusal.message) == ("INVALID_ARGUMENT", True), refusal
            assert arrays_of(waiting.result())[0] == 0.3


@pytest.mark.parametrize("cancels", [0, 3000], ids=["calls alone", "with cancels of none"])
def test_more_calls_than_the_window_end_the_lane(cancels: int, start_mesh: StartMesh) -> None:
    """A window is a bound and no advice: a caller that sends more than it was granted loses its lane. Others do not."""
    mesh = start_mesh(gateway=["--window-calls", "4"])
    naps = [descriptor(number, request("sleeps", None, seconds=0.3)) for number in range(1, 6)]
    with grpc.insecure_channel(mesh.gateway) as channel, LaneEnd(channel) as other:
        with LaneEnd(channel) as lane:
            assert lane.welcome.window_calls == 4
            lane.send(Frames(calls=naps, cancels=range(1000, 1000 + cancels)))
            refusal = lane.end()
            assert (refusal.code, "than" in refusal.message) == ("INVALID_ARGUMENT", True), refusal
        assert other.serves(1)


def test_cancelled_calls_make_room_for_those_that_come_with_the_cancel(start_mesh: StartMesh) -> None:
    """A caller at its window may fill it again in the same message that cancels calls."""
    mesh = start_mesh(gateway=["--window-calls", "2"])
    with grpc.insecure_channel(mesh.gateway) as channel, LaneEnd(channel) as lane:
        for number in (1, 2):
            lane.call(number, request("sleeps", None, seconds=30))
        more = [descriptor(number, vector("identity", 1.0, 2.0)) for number in (3, 4)]
        lane.send(Frames(calls=more, cancels=[1, 2]), *[np.array([1.0, 2.0]).tobytes()] * 2)
        for number in (3, 4):
            assert np.frombuffer(lane.reply(number)[1]).tolist() == [1.0, 2.0]


def test_more_bytes_than_the_window_end_the_lane(start_mesh: StartMesh) -> None:
    """Declared bytes count from the descriptor on: no caller takes more of the gateway than it was granted."""
    mesh = start_mesh(gateway=["--window-bytes", str(MEBIBYTE)])
    large = request("identity", {"x": np.zeros(MEBIBYTE, "u1")})
    with grpc.insecure_channel(mesh.gateway) as channel, LaneEnd(channel) as lane, LaneEnd(channel) as other:
        lane.send(Frames(calls=[descriptor(1, large, whole=False)]))
        assert other.serves(1)
        lane.send(Frames(calls=[descriptor(2, large, whole=False)]))
        refusal = lane.end()
        assert (refusal.code, "window_bytes=1048576" in refusal.message) == ("INVALID_ARGUMENT", True), refusal
        assert other.serves(2)


def test_call_whose_bytes_stop_coming_gives_its_room_back(start_mesh: StartMesh) -> None:
    """A caller that never sends the body is refused, one that sends slowly is not.

    Neither keeps the lane from others.
    """
    mesh = start_mesh(gateway=["--stalled-call-seconds", "1.5"])
    slow = request("identity", {"x": np.arange(200_000.0)})
    with grpc.insecure_channel(mesh.gateway) as channel, LaneEnd(channel) as lane:
        lane.send(Frames(calls=[descriptor(1, slow, whole=False), descriptor(2, slow, whole=False)]))
        parts = pieces(2, slow.raw_input_contents, 100_000)
        for frames, piece in parts:
            lane.send(frames, piece)
            # In total this is longer than the bytes of a call may stop coming.
            wait_until_passed(0.11)
        assert lane.serves(10)
        refusal = lane.refusal(1)
        assert (refusal.code, "stalled_call_seconds=1.5" in refusal.message) == ("INVALID_ARGUMENT", True), refusal
        assert lane.reply(2)[1] == slow.raw_input_contents[0]
    wait_until(lambda: Scrape(mesh.gateway_metrics).sum("unlatch_calls_in_flight") == 0, "nothing is in flight")


def wait_until_passed(seconds: float) -> None:
    began = time.monotonic()
    wait_until(lambda: time.monotonic() - began > seconds, "time passes")


def test_names_that_callers_make_up_are_no_labels(start_mesh: StartMesh) -> None:
    """A kernel's name becomes a label only if it is served, whatever a call of it is refused for."""
    mesh = start_mesh(gateway=["--max-live-bytes", "1000"])
    huge = np.zeros(2000, "u1")
    with grpc.insecure_channel(mesh.gateway) as channel:
        oip = Oip(channel)
        for number in range(5):
            assert oip.refusal(request(f"made_up_{number}", {"x": huge})).code == "RESOURCE_EXHAUSTED"
        assert oip.refusal(request("identity", {"x": huge})).code == "RESOURCE_EXHAUSTED"
    assert ended(mesh, "RESOURCE_EXHAUSTED", "unknown") == 5
    assert ended(mesh, "RESOURCE_EXHAUSTED", "identity") == 1


def test_full_replica_holds_up_only_the_calls_that_need_it(tmp_path: Path) -> None:
    """While one replica's window is full, another's kernels are served. When it dies its callers are told at once."""
    sockets = [tmp_path / "one.sock", tmp_path / "other.sock"]
    flags = ("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0")
    replicas = ",".join(f"unix:{socket}" for socket in sockets)
    with (
        running_dispatcher(sockets[1], "--kernels", ""),
        Service("compute", *flags[2:], "--listen", f"unix:{sockets[0]}", "--window-calls", "1", "--workers", "1",
                "--kernels", "tests/support/kernels.py") as one,
        Service("gateway", *flags, "--replicas", replicas) as gateway,
    ):  # fmt: skip
        door = gateway.wait_for("serving")["listen"]
        gateway.wait_for("replica is ready", replica=f"unix:{sockets[0]}")
        gateway.wait_for("replica is ready", replica=f"unix:{sockets[1]}")
        with grpc.insecure_channel(door) as channel, ThreadPoolExecutor(2) as callers:
            oip = Oip(channel)
            naps = [callers.submit(oip.refusal, request("sleeps", None, seconds=8)) for _ in range(2)]
            metrics = gateway.wait_for("serving")["metrics_listen"]
            wait_until(lambda: Scrape(metrics).sum("unlatch_queue_depth") == 1, "the second call is held")
            assert oip.serves()
            os.kill(one.pid, signal.SIGKILL)
            # One was sent, and may have had an effect.
            assert {nap.result(timeout=5).code for nap in naps} <= {"ABORTED", "UNAVAILABLE", "NOT_FOUND"}
            assert oip.serves()


@pytest.mark.parametrize("replica", ["serves", "stops"])
def test_many_held_calls_end(start_mesh: StartMesh, tmp_path: Path, replica: str) -> None:
    """Calls of two kernels that fit no window are each answered in turn, or refused when the replica is gone."""
    many = 300
    flags = ["--workers", "1", "--window-calls", "4", "--drain-seconds", "0.2"]
    mesh = start_mesh(dispatcher=flags, gateway=["--hold-seconds", "0"])
    gate = Gate(tmp_path / "gate")
    with grpc.insecure_channel(mesh.gateway) as channel, LaneEnd(channel) as lane:
        lane.call(1, request("waits_for", path=str(gate)))
        wait_until(lambda: gate.reached, "the worker is held")
        for number in range(2, many):
            lane.call(number, request("turn") if number % 2 else vector("identity", 1.0, 2.0))
        wait_until(lambda: Scrape(mesh.gateway_metrics).sum("unlatch_calls_in_flight") == many - 1, "all are held")
        if replica == "serves":
            gate.open()
        else:
            mesh.dispatcher_service.stop()
        codes = Counter(lane.refusal(number).code for number in range(1, many))
    if replica == "serves":
        assert set(codes) == {"OK"}
    else:
        # Those that were sent may have had an effect: as many as fit the window.
        assert set(codes) == {"ABORTED", "UNAVAILABLE"}
        assert codes["ABORTED"] <= 4
    wait_until(lambda: Scrape(mesh.gateway_metrics).sum("unlatch_calls_in_flight") == 0, "none is held")
