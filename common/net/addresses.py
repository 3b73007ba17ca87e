"""Which addresses other machines can reach: what listens there must speak TLS and know who calls."""

import ipaddress

# Who may connect to a Unix socket the file system says.
_THIS_MACHINE = ("unix:", "unix-abstract:")


def is_unix(address: str) -> bool:
    """Whether it is a socket in the file system, or in a namespace of this machine's own."""
    return address.startswith(_THIS_MACHINE)


def is_exposed(address: str) -> bool:
    """Whether something that listens there may be reached from elsewhere. What cannot be told counts as exposed."""
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
