"""A service that drains: its address refuses new connections, in each way in which addresses are written."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from unlatch.common.net.addresses import host_and_port, is_unix, unix_name
from unlatch.common.net.sockets import refuse_connections


@contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    """Listen on an address; port 0 is a free one."""
    family, place = place_of(address)
    with socket.socket(family) as listener:
        listener.bind(place)
        listener.listen()
        yield listener


def place_of(address: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    if is_unix(address):
        return socket.AF_UNIX, unix_name(address)
    host, port = host_and_port(address)
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, port)


def connects(address: str) -> bool:
    family, place = place_of(address)
    with socket.socket(family) as caller:
        return caller.connect_ex(place) == 0


@pytest.mark.parametrize("written", ["127.0.0.1:0", "[::1]:0", "unix:{path}", "unix://{path}", "unix-abstract:{path}"])
async def test_address_refuses_new_connections(tmp_path: Path, written: str) -> None:
    """Those that are open stay open, and so does another address."""
    address, other = (written.format(path=tmp_path / name) for name in ("one", "other"))
    with ExitStack() as stack:
        listener, beside = (stack.enter_context(listening(each)) for each in (address, other))
        if not is_unix(address):
            address, other = (f"{address[:-2]}:{each.getsockname()[1]}" for each in (listener, beside))
        caller = stack.enter_context(socket.socket(place_of(address)[0]))
        caller.connect(place_of(address)[1])
        accepted, _ = listener.accept()
        with accepted:
            await refuse_connections(address)
            assert not connects(address)
            assert connects(other)
            caller.send(b"still open")
            assert accepted.recv(64) == b"still open"


@pytest.mark.parametrize("written", ["127.0.0.1:0", "[::1]:0"])
async def test_connections_that_wait_are_accepted_first(written: str) -> None:
    """Their callers have connected already, and would lose calls if the connections were reset."""
    with ExitStack() as stack:
        listener = stack.enter_context(listening(written))
        address = f"{written[:-2]}:{listener.getsockname()[1]}"
        callers = [stack.enter_context(socket.create_connection(host_and_port(address))) for _ in range(3)]
        refusing = asyncio.ensure_future(refuse_connections(address))
        for caller in callers:
            await asyncio.sleep(0.01)
            assert not refusing.done()
            accepted, _ = listener.accept()
            with accepted:
                accepted.send(b"accepted")
                assert caller.recv(64) == b"accepted"
        await refusing
        assert not connects(address)
