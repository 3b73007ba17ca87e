"""The fleets of a gateway: one of each tenant that has replicas of its own, and one for all other tenants.

Kernels of a replica can read and change what other calls there bring and get. So tenants that do not trust each other
need replicas of their own, and no call of another tenant goes there.
"""

from collections.abc import Callable, Iterable, Iterator

from unlatch.gateway.fleet.discovery import by_tenant
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.fleet.replica import Replica


class Fleets:
    """Fleets by tenant. `make` returns the fleet of these targets."""

    def __init__(self, targets: Iterable[str], make: Callable[[tuple[str, ...]], Fleet]) -> None:
        own = by_tenant(targets)
        self._shared = make(own.pop("", ()))
        self._own = {tenant: make(targets) for tenant, targets in own.items()}

    def of(self, tenant: str) -> Fleet:
        """The fleet that serves a tenant. A tenant's own fleet stays the tenant's while all its replicas are away."""
        return self._own.get(tenant, self._shared)

    def __iter__(self) -> Iterator[Fleet]:
        return iter((self._shared, *self._own.values()))

    def replicas(self) -> Iterator[Replica]:
        """Walk every replica. Any thread may."""
        return (replica for fleet in self for replica in fleet.members)

    @property
    def held(self) -> int:
        """The number of calls that fit no window yet."""
        return sum(fleet.held for fleet in self)

    @property
    def take_calls(self) -> bool:
        """Whether any replica takes calls."""
        return any(fleet.members.take_calls for fleet in self)

    def serves(self, kernel: str) -> bool:
        """Whether any replica has a kernel of that name."""
        return any(fleet.members.catalogue.find(kernel, "") for fleet in self)
