"""`/metrics` over HTTP: where it listens, what it serves, and that it ends."""

import gc
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from unlatch.common.service import metrics_server
from unlatch.common.service.metrics_server import serve_metrics
from unlatch.common.telemetry.recorder import Recorder


def fetched(address: str, query: str = "") -> dict[str, float]:
    with urllib.request.urlopen(f"http://{address}/metrics{query}", timeout=5) as answer:
        text = answer.read().decode()
    return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_metrics_are_served_where_asked(host: str) -> None:
    """The given collectors' metrics alone are served at a free port of the host, whose address is returned."""
    if host == "[::1]" and not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    one, two = Recorder(), Recorder()
    one.counter("calls_total", "Calls.").add(2)
    two.gauge("depth", "Depth.").set(1)
    address, close = serve_metrics(f"{host}:0", [one, two])
    try:
        assert not address.endswith(":0")
        assert fetched(address) == {"calls_total": 2, "depth": 1}
        assert fetched(address, "?name[]=depth") == {"depth": 1}
    finally:
        close()


@pytest.mark.parametrize("ipv6", [True, False])
def test_all_addresses_of_both_kinds(ipv6: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    """`[::]` stands for all addresses of IPv4 and IPv6, and on a machine without IPv6 for those of IPv4."""
    if not ipv6:
        monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    address, close = serve_metrics("[::]:0", [])
    try:
        port = address.rpartition(":")[2]
        for host in ["127.0.0.1", *(["[::1]"] if ipv6 and has_ipv6() else [])]:
            assert fetched(f"{host}:{port}") == {}
    finally:
        close()


def test_closing_frees_the_port() -> None:
    """After close nothing answers, and the same port can be served again at once."""
    address, close = serve_metrics("127.0.0.1:0", [])
    close()
    with pytest.raises(urllib.error.URLError):
        fetched(address)
    again, close = serve_metrics(address, [])
    close()
    assert again == address


def test_taken_port_is_an_error() -> None:
    """A port that another process listens on raises OSError, and is never shared in silence."""
    address, close = serve_metrics("127.0.0.1:0", [])
    try:
        with pytest.raises(OSError, match="in use"):
            serve_metrics(address, [])
    finally:
        close()


@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics/", "/favicon.ico", "//metrics", "*"])
def test_other_paths_are_not_found(served: str, path: str) -> None:
    """A probe on another path sees 404, and where metrics and health are."""
    status, body = requested(served, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status == 404
    assert b"/metrics" in body


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        ("GET /metrics HTTP/1.0\r\n\r\n", 200),
        ("GET /metrics HTTP/1.1\r\nAccept-Encoding: gzip\r\nnonsense\r\n\r\n", 200),
        ("POST /metrics HTTP/1.1\r\n\r\n", 405),
        ("nonsense\r\n\r\n", 404),
        ("\r\n\r\n", 404),
        ("GET http://[ HTTP/1.1\r\n\r\n", 0),
        ("GET /metrics HTTP/1.1\r\nx: " + "y" * 20_000 + "\r\n\r\n", 0),
    ],
)
@pytest.mark.usefixtures("own_garbage")
def test_odd_requests_are_answered_or_cut_off(
    served: str, request_text: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A request is answered, or its connection is closed; the next request is answered, and nothing is logged."""
    assert requested(served, request_text)[0] == status
    assert fetched(served) == {"calls_total": 2}
    gc.collect()
    assert not caplog.records


def test_half_requests_keep_nobody_out(served: str) -> None:
    """800 connections that send half a request take no thread and few descriptors, and a scrape is answered."""
    host, _, port = served.rpartition(":")
    threads, opened = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    with ExitStack() as half:
        for _ in range(800):
            connection = half.enter_context(socket.create_connection((host, int(port)), timeout=5))
            connection.sendall(b"GET /metrics HTT")
        assert fetched(served) == {"calls_total": 2}
        # A thread of an earlier test may end meanwhile.
        assert not set(threading.enumerate()) - threads
        # Our own ends are in this process, too.
        assert len(os.listdir("/proc/self/fd")) - opened <= 800 + 32


def test_half_request_is_cut_off(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that sends no whole request, or reads no answer, is closed in time."""
    monkeypatch.setattr(metrics_server, "_ANSWER_SECONDS", 0.2)
    for sent in ("", "GET /metrics HTTP/1.1\r\n"):
        assert requested(served, sent) == (0, b"")


@pytest.fixture
def served() -> Iterator[str]:
    """The address of a server of one metric."""
    recorder = Recorder()
    recorder.counter("calls_total", "Calls.").add(2)
    address, close = serve_metrics("127.0.0.1:0", [recorder])
    yield address
    close()


def requested(address: str, text: str) -> tuple[int, bytes]:
    """Send a request as it is, and return status and body of the answer; 0 if the connection was closed instead."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(text.encode())
        answer = b""
        with suppress(ConnectionResetError):
            while part := connection.recv(65536):
                answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body


@pytest.mark.parametrize("address", ["8002", ":8002", "host", "::1:8002", "host:port", "host:70000", "[host:1", ""])
def test_address_that_is_none_is_refused(address: str) -> None:
    """An address that is not host:port raises a ValueError that says what is wanted."""
    with pytest.raises(ValueError, match="host:port"):
        serve_metrics(address, [])


def over_unix(path: Path) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def test_unix_socket_of_this_user(tmp_path: Path) -> None:
    """Metrics are served at a Unix socket that only this user can connect to, again after a process has ended there."""
    path = tmp_path / "metrics"
    recorder = Recorder()
    recorder.counter("calls_total", "Calls.").add(2)
    for _ in range(2):
        address, close = serve_metrics(f"unix:{path}", [recorder])
        try:
            assert address == f"unix:{path}"
            assert path.stat().st_mode & 0o777 == 0o600
            assert over_unix(path).endswith(b"calls_total 2.0\n")
            with pytest.raises(OSError, match="in use"):
                serve_metrics(f"unix:{path}", [])
            assert over_unix(path).endswith(b"calls_total 2.0\n")
        finally:
            close()
        # As a killed process leaves it.
        assert path.is_socket()


def test_unix_socket_of_a_stopped_process_is_not_taken(tmp_path: Path) -> None:
    """A process that accepts no connection, and has as many as may wait, keeps its socket."""
    with socket.socket(socket.AF_UNIX) as stopped, socket.socket(socket.AF_UNIX) as waiting:
        stopped.bind(str(tmp_path / "metrics"))
        stopped.listen(0)
        waiting.connect(str(tmp_path / "metrics"))
        with pytest.raises(OSError, match="in use"):
            serve_metrics(f"unix:{tmp_path}/metrics", [])
    assert (tmp_path / "metrics").is_socket()


def test_file_in_place_of_a_socket_stays(tmp_path: Path) -> None:
    """A file that is no socket is an error, and is not removed. So is a missing directory."""
    (tmp_path / "metrics").write_text("mine")
    with pytest.raises(OSError, match="in use"):
        serve_metrics(f"unix:{tmp_path}/metrics", [])
    assert (tmp_path / "metrics").read_text() == "mine"
    with pytest.raises(FileNotFoundError):
        serve_metrics(f"unix:{tmp_path}/missing/metrics", [])
