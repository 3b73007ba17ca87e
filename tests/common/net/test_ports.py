"""Addresses are checked before anything is loaded: their form, and whether they can be listened on."""

import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier

import pytest

from tests.support.serve import free_address
from unlatch.common.net.addresses import host_and_port
from unlatch.common.net.ports import BindError, connections, hold, refuse_taken


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("127.0.0.1:8001", ("127.0.0.1", 8001)),
        ("[::]:0", ("::", 0)),
        ("host.example:65535", ("host.example", 65535)),
    ],
)
def test_host_and_port(address: str, wanted: tuple[str, int]) -> None:
    """An address is split into its host, without brackets, and its port."""
    assert host_and_port(address) == wanted


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "a:1,b:2", "127.0.0.1:99999", "127.0.0.1:", ":8001", "8001", "::1:8001", "[::1]", "[::1]8001"),
        *("host:port", "host:-1", "host:٨", "http://host:1", "a b:1", "[host]:1", ""),
    ],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    """Anything else is a ValueError that says what is wanted and what was given."""
    with pytest.raises(ValueError, match=re.escape(repr(address))) as told:
        host_and_port(address)
    assert "wanted host:port or [IPv6]:port" in str(told.value)


def test_taken_port_names_flag_and_process() -> None:
    """A port that another socket listens on is refused, with the flag and the process that has it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(BindError) as told:
            refuse_taken({"--metrics-listen": "127.0.0.1:0", "--listen": address})
    assert str(told.value).startswith(f"--listen {address}: Address already in use by process {os.getpid()} (")
    refuse_taken({"--listen": address})


def test_two_flags_with_one_address_are_refused() -> None:
    """Two flags cannot have the same address, unless its port is 0."""
    refuse_taken({"--listen": "127.0.0.1:0", "--health-listen": "127.0.0.1:0"})
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
    with pytest.raises(BindError, match="--listen has the same address"):
        refuse_taken({"--listen": address, "--health-listen": address})


@pytest.mark.parametrize("address", ["203.0.113.1:8001", "no-such-host.invalid:8001"])
def test_address_of_another_machine_is_refused(address: str) -> None:
    """An address that this machine does not have is refused, too."""
    with pytest.raises(BindError, match=f"--listen {address}: "):
        refuse_taken({"--listen": address})


def unix_address(kind: str, directory: Path) -> tuple[str, str]:
    """An address for gRPC, and the name of the same socket."""
    if kind == "unix-abstract:":
        return f"unix-abstract:unlatch-test-{os.getpid()}", f"\0unlatch-test-{os.getpid()}"
    return f"{kind}{directory}/socket", f"{directory}/socket"


@pytest.mark.parametrize("kind", ["unix:", "unix://", "unix-abstract:"])
def test_unix_socket_in_use(tmp_path: Path, kind: str) -> None:
    """A Unix socket that a process listens on is refused. What an ended process has left there is no obstacle."""
    address, name = unix_address(kind, tmp_path)
    refuse_taken({"--listen": address})
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(name)
        other.listen()
        with pytest.raises(BindError, match=f"^--listen {re.escape(address)}: another process listens there$"):
            refuse_taken({"--listen": address})
        assert connections(address) == 0
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(name)
            with other.accept()[0]:
                assert connections(address) == 1
    refuse_taken({"--listen": address})


@pytest.mark.parametrize(
    ("path", "why"), [("missing/socket", "no such directory"), ("s" * 120, "AF_UNIX path too long")]
)
def test_unix_socket_that_cannot_be_made(tmp_path: Path, path: str, why: str) -> None:
    """A path without its directory, or too long for a socket, is refused."""
    with pytest.raises(BindError, match=f": {why}$"):
        refuse_taken({"--listen": f"unix:{tmp_path}/{path}"})


def test_connections_are_counted() -> None:
    """Connections to an address are counted, and no other sockets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert connections(address) == 0
        with socket.create_connection(server.getsockname()), server.accept()[0]:
            assert connections(address) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_port_is_held_once(host: str) -> None:
    """Of those that ask for a port at the same moment, one holds it. The next one may, once it is free again."""
    together = Barrier(4)

    def ask(address: str) -> bool:
        with ExitStack() as held:
            together.wait()
            try:
                held.enter_context(hold("--listen", address))
            except BindError as error:
                assert str(error) == f"--listen {address}: Address already in use"  # noqa: PT017 (the others go on)
                return False
            finally:
                together.wait()
            return True

    # Reserved, so that no other process gets the port meanwhile.
    with free_address() as reserved, ThreadPoolExecutor(together.parties) as pool:
        address = f"{host}:{host_and_port(reserved)[1]}"
        for _ in range(200):
            assert sum(pool.map(ask, [address] * together.parties)) == 1


@pytest.mark.parametrize("port", ["0", ""])
def test_held_port_is_its_users(port: str) -> None:
    """A held port, chosen or free, can be listened on by SO_REUSEPORT alone, by one process after another."""
    with free_address() as reserved, hold("--listen", f"127.0.0.1:{port or host_and_port(reserved)[1]}") as address:
        place = host_and_port(address)
        for _ in range(2):
            with socket.socket() as strange:
                strange.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with pytest.raises(OSError, match="in use"):
                    strange.bind(place)
            with socket.create_server(place, reuse_port=True), socket.create_connection(place):
                pass
    refuse_taken({"--listen": address})
