"""Addresses that other machines can reach: a service that listens there must speak TLS and authenticate callers."""

import ipaddress

# The file system decides who may connect to a Unix socket.
_THIS_MACHINE = ("unix:", "unix-abstract:")


def is_unix(address: str) -> bool:
    """Whether an address is a Unix socket, in the file system or in a namespace of this machine."""
    return address.startswith(_THIS_MACHINE)


def is_exposed(address: str) -> bool:
    """Whether other machines may reach this address. An address that cannot be parsed counts as exposed."""
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
