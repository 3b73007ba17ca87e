"""`/metrics` over HTTP: where it listens, what it serves, and that it ends."""

import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from unlatch.common.telemetry.metrics_server import serve_metrics
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


@pytest.mark.parametrize("address", ["8002", ":8002", "host", "::1:8002", "host:port", "host:70000", "[host:1", ""])
def test_address_that_is_none_is_refused(address: str) -> None:
    """An address that is not host:port raises a ValueError that says what is wanted."""
    with pytest.raises(ValueError, match="host:port"):
        serve_metrics(address, [])
