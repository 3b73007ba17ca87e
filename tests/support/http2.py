"""A caller that writes HTTP/2 by hand, and so sends what no gRPC client would; and a server that does so."""

import selectors
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from time import monotonic
from types import TracebackType
from typing import Self

import h2.config
import h2.connection
import h2.events
import h2.settings

from tests.support.doors import Metadata

_WITHIN_SECONDS = 20.0


def _connected(address: str) -> socket.socket:
    if address.startswith("unix:"):
        local = socket.socket(socket.AF_UNIX)
        local.settimeout(_WITHIN_SECONDS)
        local.connect(address.removeprefix("unix:"))
        return local
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), _WITHIN_SECONDS)


class Http2:
    """An HTTP/2 connection. Each wait for something also receives, and forgets, whatever else the server has sent."""

    def __init__(self, address: str, *, window: int | None = None) -> None:
        self._authority = "localhost" if address.startswith("unix:") else address
        self._socket = _connected(address)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
        if window is not None:
            # Bytes of each answer that the server may send before it is asked for more.
            self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def begin(self, method: str, metadata: Metadata = ()) -> int:
        """Open a stream for an RPC, and send no message yet."""
        number = self.h2.get_next_available_stream_id()
        headers = [(":method", "POST"), (":scheme", "http"), (":path", method), (":authority", self._authority)]
        headers += [("content-type", "application/grpc"), ("te", "trailers"), *metadata]
        self.h2.send_headers(number, headers)
        return number

    def send(self, stream: int, *messages: bytes) -> None:
        """Send an RPC's messages, the last of them as the last of the RPC."""
        for message in messages:
            self.h2.send_data(stream, b"\0" + len(message).to_bytes(4) + message)
        self.h2.end_stream(stream)
        self.flush()

    def offer(self, stream: int, message: bytes, within_seconds: float) -> bool:
        """Send a message of an RPC that goes on, as the server makes room. Returns whether all was sent in time."""
        content = b"\0" + len(message).to_bytes(4) + message
        until = monotonic() + within_seconds
        while content:
            room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size, len(content))
            if room > 0:
                self.h2.send_data(stream, content[:room])
                self.flush()
                content = content[room:]
            elif not self._readable(until - monotonic()):
                return False
            elif not self.events():
                raise ConnectionError("the server has closed the connection")
        return True

    def _readable(self, within_seconds: float) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            return bool(selector.select(max(0.0, within_seconds)))

    def flush(self) -> None:
        """Send what is due. Raises OSError when the other end has closed."""
        self._socket.sendall(self.h2.data_to_send())

    def raw(self, content: bytes) -> None:
        """Send these bytes, whatever they mean."""
        self._socket.sendall(content)

    def events(self) -> list[h2.events.Event]:
        """Wait for the next events; none once the other end has closed."""
        try:
            content = self._socket.recv(1 << 16)
        except ConnectionError:
            return []
        events = self.h2.receive_data(content) if content else []
        self.flush()
        return events or ([] if not content else [h2.events.Event()])

    def closed(self) -> bool:
        """Wait until the other end closes, and ignore what it sends before."""
        while True:
            try:
                if not self._socket.recv(1 << 16):
                    return True
            except ConnectionError:
                return True

    def trailers(self, stream: int) -> dict[str, str]:
        """Return an RPC's trailers. Fails when the connection is closed instead."""
        while events := self.events():
            for event in events:
                if (
                    isinstance(event, h2.events.TrailersReceived | h2.events.ResponseReceived)
                    and event.stream_id == stream
                ):
                    found = {str(name): str(value) for name, value in event.headers or ()}
                    if "grpc-status" in found:
                        return found
        raise AssertionError("the connection was closed")


@contextmanager
def leaving_server(answer: bytes) -> Iterator[str]:
    """A server that ends its first connection when a call comes, and has not seen the call. It answers the next call.

    This is what a caller sees of a connection that ends by its age while the call is on its way.
    """
    with ExitStack() as stack, ThreadPoolExecutor(1) as thread, socket.create_server(("127.0.0.1", 0)) as listener:
        thread.submit(_leave_and_answer, listener, answer, stack)
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _leave_and_answer(listener: socket.socket, answer: bytes, stack: ExitStack) -> None:
    with suppress(OSError):
        for leaves in (True, False):
            # Stays open: a caller that still sends would have its connection reset, perhaps before it has read why.
            accepted = stack.enter_context(listener.accept()[0])
            accepted.settimeout(_WITHIN_SECONDS)
            _serve_call(accepted, None if leaves else answer)


def _serve_call(accepted: socket.socket, answer: bytes | None) -> None:
    """Answer a call; or, without an answer, end the connection as one on which no call has come."""
    http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    http.initiate_connection()
    is_over = False
    while not is_over:
        accepted.sendall(http.data_to_send())
        if not (content := accepted.recv(1 << 16)):
            return
        for event in http.receive_data(content):
            if isinstance(event, h2.events.RequestReceived) and answer is None:
                http.close_connection(last_stream_id=0, additional_data=b"max_age")
                is_over = True
                break
            if isinstance(event, h2.events.DataReceived):
                http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            if isinstance(event, h2.events.StreamEnded) and answer is not None:
                http.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
                http.send_data(event.stream_id, b"\0" + len(answer).to_bytes(4) + answer)
                http.send_headers(event.stream_id, [("grpc-status", "0")], end_stream=True)
                is_over = True
    accepted.sendall(http.data_to_send())
