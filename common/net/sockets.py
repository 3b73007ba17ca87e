"""Sockets that gRPC has opened in this process, reached by their numbers, since gRPC gives no handle on them."""

import asyncio
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import unquote

from unlatch.common.net.addresses import is_unix, unix_name

# A peer's IP address and port.
_Peer = tuple[str, int]

# The number of connections that a listening socket has not given to its process yet, in Linux's `tcp_info` (tcp(7)).
_WAITING, _WAITING_AT = struct.Struct("I"), 24
_LOOK_SECONDS, _LOOKS = 0.001, 1000


async def refuse_connections(listen: str) -> None:
    """Refuse new connections to an address from now on. Those that are open stay so.

    gRPC can do this only together with cancelling the calls that come on open connections. So the socket that listens
    is replaced, under its number, by one that does not.
    """
    place = unix_name(listen) if is_unix(listen) else listen.rpartition(":")[2]
    for number, found in _sockets():
        with suppress(OSError):
            bound = found.getsockname()
            here = str(bound[1]) if isinstance(bound, tuple) else os.fsdecode(bound)
            if here == place and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                await _all_accepted(found)
                with socket.socket(found.family) as silent:
                    os.dup2(silent.fileno(), number, inheritable=False)


async def _all_accepted(listener: socket.socket) -> None:
    """Wait until gRPC has accepted the connections that are open already, which would be reset. A second at most.

    Those to a Unix socket are not waited for, since Linux does not count them.
    """
    with suppress(OSError, struct.error):
        for _ in range(_LOOKS):
            state = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _WAITING_AT + _WAITING.size)
            if _WAITING.unpack_from(state, _WAITING_AT) == (0,):
                return
            await asyncio.sleep(_LOOK_SECONDS)


def disconnect(peers: Iterable[str]) -> None:
    """Shut the TCP connections with these peers, as gRPC writes their addresses. Those of Unix sockets stay open."""
    wanted = set(filter(None, map(_address, peers)))
    for _, found in _sockets():
        # Not connected, or without an IP address.
        with suppress(OSError, ValueError):
            host, port, *_ = found.getpeername()
            if (_plain(host), port) in wanted:
                found.shutdown(socket.SHUT_RDWR)


def _sockets() -> Iterator[tuple[int, socket.socket]]:
    """Yield the number of each socket and a copy of it: gRPC may close its own meanwhile, and reuse the number."""
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if str(link.readlink()).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(link.name))) as copy:
                    yield int(link.name), copy


def _address(peer: str) -> _Peer | None:
    """The address of `ipv4:127.0.0.1:80` or `ipv6:%5B::1%5D:80`; None for a Unix socket."""
    kind, _, rest = unquote(peer).partition(":")
    host, _, port = rest.rpartition(":")
    return (_plain(host.strip("[]")), int(port)) if kind in ("ipv4", "ipv6") else None


def _plain(host: str) -> str:
    """An IP address in one way of writing it. Raises ValueError."""
    address = ip_address(host)
    return str(getattr(address, "ipv4_mapped", None) or address)
