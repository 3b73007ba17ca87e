"""A small DNS server on loopback: it answers A questions for one name with given addresses, or fails."""

import socket
import struct
import threading
import time
from types import TracebackType
from typing import Self

_A, _IN = 1, 1
_NO_ERROR, _SERVER_FAILURE = 0, 2


class NameServer:
    """A DNS server. `addresses` is its answer from now on, None a failure. `asked` counts questions for addresses.

    With `cache_seconds` it gives an answer for so long, whatever has changed: as a resolver does that caches answers.
    """

    def __init__(self, *addresses: str, cache_seconds: float = 0.0) -> None:
        self.addresses: list[str] | None = list(addresses)
        self.asked = 0
        self._cache_seconds = cache_seconds
        self._cached: list[str] | None = None
        self._cached_until = 0.0
        self._asked = threading.Condition()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, name="name server", daemon=True)

    @property
    def target(self) -> str:
        """The server's host and port."""
        host, port = self._socket.getsockname()
        return f"{host}:{port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # An empty datagram, sent by this server itself, ends it.
        self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()

    def answers(self, addresses: list[str] | None, *, times: int = 2, within: float = 10.0) -> None:
        """Answer with these addresses, and wait until that answer was given `times` times."""
        with self._asked:
            self.addresses = addresses
            before = self.asked
            assert self._asked.wait_for(lambda: self.asked >= before + times, within), "nobody asks"

    def _serve(self) -> None:
        while True:
            question, asker = self._socket.recvfrom(4096)
            if not question:
                return
            self._socket.sendto(self._answer(question), asker)

    def _answer(self, message: bytes) -> bytes:
        number, flags = struct.unpack("!HH", message[:4])
        end = message.index(b"\0", 12) + 5
        kind = struct.unpack("!H", message[end - 4 : end - 2])[0]
        with self._asked:
            if time.monotonic() >= self._cached_until:
                self._cached, self._cached_until = self.addresses, time.monotonic() + self._cache_seconds
            known = self._cached
            records = known if known is not None and kind == _A else []
            self.asked += kind == _A
            self._asked.notify_all()
        code = _SERVER_FAILURE if known is None else _NO_ERROR
        head = struct.pack("!HHHHHH", number, 0x8400 | (flags & 0x0100) | code, 1, len(records), 0, 0)
        # Each answer repeats the question's name and has a time to live of 0.
        answers = [struct.pack("!HHHIH", 0xC00C, _A, _IN, 0, 4) + socket.inet_aton(address) for address in records]
        return head + message[12:end] + b"".join(answers)
