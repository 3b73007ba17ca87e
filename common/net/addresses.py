"""Addresses to listen on: which are valid, and which other machines can reach."""

import ipaddress

# The file system decides who may connect to a Unix socket.
_THIS_MACHINE = ("unix:", "unix-abstract:")
# The ends of names that no public server has (RFC 6761, RFC 6762, RFC 8375, ICANN), and those of Kubernetes' services.
_PRIVATE_NAMES = (".localhost", ".local", ".internal", ".home.arpa", ".svc")
_MAX_PORT = 65535
_URL_SCHEMES = ("http://", "https://", "grpc://", "grpcs://", "tcp://")


def is_unix(address: str) -> bool:
    """Whether an address is a Unix socket, in the file system or in a namespace of this machine."""
    return address.startswith(_THIS_MACHINE)


def unix_name(address: str) -> str:
    """The name of a Unix socket for Python's socket module. In a namespace of this machine it begins with a zero."""
    kind, _, name = address.partition(":")
    return f"\0{name}" if kind == "unix-abstract" else name.removeprefix("//")


def is_private(target: str) -> bool:
    """Whether a target is on this machine or in a private network: what a proxy for the Internet does not reach."""
    address = target.rpartition("/")[2].removeprefix("ipv4:").removeprefix("ipv6:")
    host = (address.rpartition(":")[0] or address).strip("[]")
    try:
        return is_unix(target) or not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith(_PRIVATE_NAMES)


def has_no_such_port(target: str) -> bool:
    """Whether the port in a target is a number that is no port. gRPC takes the remainder by 65,536 instead."""
    host, _, port = target.rpartition("/")[2].removeprefix("dns:").removeprefix("ipv4:").rpartition(":")
    is_number = port.removeprefix("-").isdecimal() and (":" not in host or host.endswith("]"))
    return is_number and not is_unix(target) and not 0 < int(port) <= _MAX_PORT


def is_url(target: str) -> bool:
    """Whether a target is written as a URL. gRPC would look it up as a name."""
    return target.lower().startswith(_URL_SCHEMES)


def is_exposed(address: str) -> bool:
    """Whether other machines may reach this address. An address that cannot be parsed counts as exposed.

    A service that listens there must speak TLS and authenticate callers.
    """
    if is_unix(address):
        return False
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return False
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return True
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return not (mapped or found).is_loopback


def host_and_port(address: str) -> tuple[str, int]:
    """Split `host:port` or `[IPv6]:port`; port 0 stands for any free port. Raises ValueError."""
    host, _, port = address.rpartition(":")
    in_brackets = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if in_brackets else host
    is_host = ":" in host if in_brackets else bool(host) and not set(host) & set("[]:/, ")
    if not is_host or not (port.isascii() and port.isdecimal()) or int(port) > _MAX_PORT:
        raise ValueError(f"wanted host:port or [IPv6]:port, with a port up to {_MAX_PORT}, got {address!r}")
    return host, int(port)
