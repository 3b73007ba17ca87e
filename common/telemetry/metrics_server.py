"""`/metrics` on a port and threads of its own, so that a process can be scraped while its event loop is stalled."""

import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.registry import Collector


def serve_metrics(address: str, collectors: Iterable[Collector]) -> tuple[str, Callable[[], None]]:
    """Serve the collectors' metrics over HTTP. Returns the bound address, and a function that ends the server.

    `address` is `host:port`, with an IPv6 host in brackets and port 0 for any free port. Ending takes milliseconds, so
    an event loop should run it in a thread. Raises ValueError for an invalid address, OSError for one that cannot be
    bound.
    """
    host, port = _split(address)
    # A registry of our own: the default one would add prometheus_client's figures of this process.
    registry = CollectorRegistry(support_collectors_without_names=True)
    for collector in collectors:
        registry.register(collector)
    server, thread = start_http_server(port, host, registry)
    bound_host, bound_port = server.server_address[:2]

    def close() -> None:
        # The server checks for its end twice a second, and on every connection. So we connect.
        ending = threading.Thread(target=server.shutdown)
        ending.start()
        while ending.is_alive():
            with suppress(OSError):
                socket.create_connection((str(bound_host), bound_port), timeout=1).close()
            ending.join(0.01)
        server.server_close()
        thread.join()

    return _joined(str(bound_host), int(bound_port)), close


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        is_host = ":" in host
    else:
        is_host = bool(host) and not set(host) & set("[]:")
    if not is_host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"wanted host:port or [IPv6]:port for metrics, got {address!r}")
    return host, int(port)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
