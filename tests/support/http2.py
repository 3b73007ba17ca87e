"""A caller that writes HTTP/2 by hand, and so sends what no gRPC client would."""

import socket
from types import TracebackType
from typing import Self

import h2.config
import h2.connection
import h2.events

from tests.support.doors import Metadata

_WITHIN_SECONDS = 20.0


class Http2:
    """An HTTP/2 connection. Each wait for something also receives, and forgets, whatever else the server has sent."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._authority = address
        self._socket = socket.create_connection((host, int(port)), _WITHIN_SECONDS)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.h2.initiate_connection()
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
