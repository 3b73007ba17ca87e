"""`/metrics` over HTTP, on a port and a thread of its own: a process can be scraped while its event loop is stalled.

Callers are few and need no identity, so they can do no harm: a request has bounds of time and size, and a connection
carries one. When there are too many connections, the oldest one is closed.
"""

import asyncio
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.registry import Collector

from unlatch.common.net.addresses import host_and_port, is_unix, unix_name
from unlatch.common.telemetry.components import Merged

# A handful of scrapers, each with one connection.
_MAX_CONNECTIONS = 32
# For the request to arrive and the answer to be read, together.
_ANSWER_SECONDS = 5.0
_MAX_REQUEST_BYTES = 16 * 1024
_NOT_FOUND = b"not found: metrics are at /metrics, health is grpc.health.v1 on a port of its own\n"


def serve_metrics(address: str, collectors: Iterable[Collector]) -> tuple[str, Callable[[], None]]:
    """Serve the collectors' metrics over HTTP. Returns the bound address, and a function that ends the server.

    Ending takes milliseconds, so an event loop should run it in a thread. Raises ValueError for an address that is
    neither `host:port` nor a Unix socket, OSError for one that cannot be bound.
    """
    # A registry of our own: the default one would add prometheus_client's figures of this process.
    registry = CollectorRegistry(support_collectors_without_names=True)
    registry.register(Merged(collectors))
    listener = _unix_listener(unix_name(address)) if is_unix(address) else _listener(*host_and_port(address))
    server = _MetricsServer(registry, listener)
    bound = address if is_unix(address) else _told(listener)
    thread = threading.Thread(target=server.run, name="metrics", daemon=True)
    thread.start()

    def close() -> None:
        server.stop()
        thread.join()

    return bound, close


class _MetricsServer:
    """A server with a loop of its own, on the thread that calls `run`, until another thread calls `stop`."""

    def __init__(self, registry: CollectorRegistry, listener: socket.socket) -> None:
        self._listener = listener
        self._application = make_wsgi_app(registry)
        # Not uvloop's: a scrape is seldom, and few lines of Python run between two of its waits.
        self._loop = asyncio.SelectorEventLoop()
        self._stopped = asyncio.Event()
        # In the order of their arrival.
        self._answering: dict[asyncio.Task[None], asyncio.WriteTransport] = {}

    def run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accepted, sock=self._listener, limit=_MAX_REQUEST_BYTES)
        await self._stopped.wait()
        server.close()
        for transport in self._answering.values():
            transport.abort()
        await asyncio.gather(*self._answering)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._answering) >= _MAX_CONNECTIONS:
            self._answering.pop(next(iter(self._answering))).abort()
        task = self._loop.create_task(self._answer(reader, writer))
        self._answering[task] = writer.transport
        task.add_done_callback(lambda task: self._answering.pop(task, None))

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # With this limit, `drain` waits until everything has been sent.
        writer.transport.set_write_buffer_limits(0)
        try:
            with suppress(OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                async with asyncio.timeout(_ANSWER_SECONDS):
                    request = await reader.readuntil(b"\r\n\r\n")
                    writer.writelines(self._response(request.decode("latin-1")))
                    await writer.drain()
                    writer.write_eof()
                    # What is closed with unread bytes is reset, and an answer on its way is lost.
                    await reader.read()
        finally:
            writer.transport.abort()

    def _response(self, request: str) -> list[bytes]:
        line, _, rest = request.partition("\r\n")
        method, _, target = line.rpartition(" ")[0].partition(" ")
        fields = dict(field.split(":", 1) for field in rest.splitlines() if ":" in field)
        headers = {name.strip().lower(): text.strip() for name, text in fields.items()}
        if urlsplit(target).path != "/metrics":
            return _message("404 Not Found", [("Content-Type", "text/plain")], _NOT_FOUND)
        answered: list[tuple[str, list[tuple[str, str]]]] = []
        [body] = self._application(
            {
                "REQUEST_METHOD": method,
                "PATH_INFO": "/metrics",
                "QUERY_STRING": urlsplit(target).query,
                "HTTP_ACCEPT": headers.get("accept"),
                "HTTP_ACCEPT_ENCODING": headers.get("accept-encoding"),
            },
            lambda status, fields: answered.append((status, fields)),
        )
        return _message(*answered[0], body)


def _message(status: str, fields: Iterable[tuple[str, str]], body: bytes) -> list[bytes]:
    fields = [*fields, ("Content-Length", str(len(body))), ("Connection", "close")]
    head = "".join(f"{name}: {text}\r\n" for name, text in fields)
    return [f"HTTP/1.1 {status}\r\n{head}\r\n".encode(), body]


def _listener(host: str, port: int) -> socket.socket:
    """Listen on an address. `::` stands for all addresses of both kinds, and of IPv4 where there is no IPv6."""
    if host == "::" and not socket.has_dualstack_ipv6():
        host = "0.0.0.0"  # noqa: S104 (as asked for)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, dualstack_ipv6=host == "::")


def _unix_listener(name: str) -> socket.socket:
    """Listen on a Unix socket that only this user can connect to. The file of a process that has ended is replaced."""
    with socket.socket(socket.AF_UNIX) as probe:
        # A stopped process with a full queue of connections would make this one wait.
        probe.setblocking(False)
        if Path(name).is_socket() and probe.connect_ex(name) == errno.ECONNREFUSED:
            Path(name).unlink()
    listener = socket.socket(socket.AF_UNIX)
    try:
        # The system gives this mode to the file, too.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(name)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _told(listener: socket.socket) -> str:
    """The address of a TCP listener, with its port."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
