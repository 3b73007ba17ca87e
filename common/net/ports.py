"""Ports and connections of this machine: which addresses can be listened on, and how many connections they have."""

import errno
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from unlatch.common.net.addresses import host_and_port, is_unix, unix_name

# States of sockets in /proc/net/tcp and /proc/net/unix (net/tcp_states.h).
_ESTABLISHED, _LISTEN = "01", "0A"
_CONNECTED = "03"


class BindError(Exception):
    """An address that cannot be listened on. The message names it, and the flag that gives it."""


def refuse_taken(addresses: Mapping[str, str]) -> None:
    """Check addresses, by flag, before anything is loaded. Raises BindError for one that cannot be listened on."""
    flags: dict[str, str] = {}
    for flag, address in addresses.items():
        if address.endswith(":0"):
            continue
        if address in flags:
            raise BindError(f"{flag} {address}: {flags[address]} has the same address")
        flags[address] = flag
        try:
            if is_unix(address):
                _try_unix(unix_name(address))
            else:
                _try(*host_and_port(address))
        except OSError as error:
            has_port = error.errno == errno.EADDRINUSE and not is_unix(address)
            holder = f" by {_holder(address)}" if has_port else ""
            raise BindError(f"{flag} {address}: {error.strerror or error}{holder}") from None


def _try_unix(name: str) -> None:
    """Raise OSError if a process listens on a Unix socket: gRPC would take its name away from it, without an error."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        if probe.connect_ex(name) == 0:
            raise OSError(errno.EADDRINUSE, "another process listens there")
    if not name.startswith("\0") and not Path(name).parent.is_dir():
        raise OSError(errno.ENOENT, "no such directory")


def _try(host: str, port: int) -> None:
    for bound in _bind(host, port):
        bound.close()


@contextmanager
def hold(flag: str, address: str) -> Iterator[str]:
    """Hold the port of a flag's address, so that only processes of this user may listen there, by SO_REUSEPORT.

    Yields the address, with a free port for port 0. Nothing listens there yet. Raises BindError.
    """
    with ExitStack() as held:
        host, port = host_and_port(address)
        try:
            for bound in _bind(host, port):
                held.enter_context(bound)
                if port:
                    # Other processes may have bound the port at the same moment, but only one of them can listen.
                    bound.listen()
                # Binding needed this option. It goes now, because a process with SO_REUSEADDR alone could listen here.
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if port:
                    # The socket listens no more, and keeps the port.
                    bound.shutdown(socket.SHUT_RDWR)
                port = bound.getsockname()[1]
        except OSError as error:
            raise BindError(f"{flag} {address}: {error.strerror or error}") from None
        yield f"{address.rpartition(':')[0]}:{port}"


def _bind(host: str, port: int) -> Iterator[socket.socket]:
    """Bind a socket to each address of a host, all to the same port. Raises OSError for one that is in use."""
    for family, kind, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        bound = socket.socket(family, kind)
        try:
            # As gRPC does: connections of an earlier process that are being closed do not count.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((place[0], port, *place[2:]))
        except OSError as error:
            bound.close()
            # Without IPv6, these stand for addresses of IPv4 alone.
            if host not in ("localhost", "::") or error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
        else:
            port = port or bound.getsockname()[1]
            yield bound


def connections(address: str) -> int:
    """The number of this process's connections to an address that it listens on, maybe beside other processes."""
    if is_unix(address):
        name = unix_name(address).replace("\0", "@")
        rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
        return sum(row[5] == _CONNECTED and row[-1] == name for row in rows)
    return len(_own_sockets().intersection(_sockets(address, _ESTABLISHED)))


def _own_sockets() -> set[str]:
    """Inodes of this process's sockets."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        # The descriptor of the listing itself is closed.
        with suppress(OSError):
            kind, _, inode = str(descriptor.readlink()).partition(":")
            if kind == "socket":
                found.add(inode.strip("[]"))
    return found


def _holder(address: str) -> str:
    """Describe the process that listens on an address's port, as far as this user may see it."""
    listening = {f"socket:[{inode}]" for inode in _sockets(address, _LISTEN)}
    for process in Path("/proc").glob("[0-9]*"):
        # Processes of other users, and those that have just ended, cannot be read.
        with suppress(OSError):
            if any(str(descriptor.readlink()) in listening for descriptor in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                return f"process {process.name} ({command.strip()[:80]})"
    return "another user's process"


def _sockets(address: str, state: str) -> Iterator[str]:
    """Inodes of the TCP sockets that have this address's port and this state."""
    port = f":{host_and_port(address)[1]:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        # A machine without IPv6 has no second table.
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                row = line.split()
                if row[1].endswith(port) and row[3] == state:
                    yield row[9]
