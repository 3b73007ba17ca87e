"""`/metrics` on a port and threads of its own, so that a process whose event loop is stalled can still be looked at."""

import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.registry import Collector


def serve_metrics(address: str, collectors: Iterable[Collector]) -> tuple[str, Callable[[], None]]:
    """Serve what the collectors yield over HTTP: the address that was bound, and a function that ends it.

    `address` is `host:port`, an IPv6 host in brackets, port 0 for any that is free. Ending blocks for milliseconds,
    so an event loop that has other work leaves it to a thread. Raises ValueError for an address that is none, OSError
    for one that cannot be had.
    """
    host, port = _split(address)
    # Ours alone: the default registry would add prometheus_client's figures of this process beside our own.
    registry = CollectorRegistry(support_collectors_without_names=True)
    for collector in collectors:
        registry.register(collector)
    server, thread = start_http_server(port, host, registry)
    bound_host, bound_port = server.server_address[:2]

    def close() -> None:
        # The server looks whether it is to end twice a second, and whenever somebody connects: so somebody does.
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
        raise ValueError(f"metrics are served at host:port or [IPv6]:port, not at {address!r}")
    return host, int(port)


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
