"""A gateway's own subset of many replicas: those that rank first by a hash of its name and theirs.

Every gateway ranks the replicas differently, so that each replica gets its share of gateways. A gateway ranks them
alike every time, so that a replica which comes or goes changes one place, and a gateway that restarts finds the same
subset.
(Rendezvous hashing, Thaler and Ravishankar 1998. Chance decides how many gateways a replica gets:
docs/operations/capacity.md says how many gateways it takes that no replica is left out.)
"""

from collections.abc import Sequence
from hashlib import blake2b


def subset(name: str, addresses: Sequence[str], size: int) -> list[str]:
    """The first `size` addresses in the rank of this gateway, in the order given; all where there are no more."""
    if len(addresses) <= size:
        return list(addresses)
    first = set(sorted(addresses, key=lambda address: _rank(name, address))[:size])
    return [address for address in addresses if address in first]


def _rank(name: str, address: str) -> bytes:
    return blake2b(f"{name}\0{address}".encode(), digest_size=8).digest()
