"""The fleet's catalogue: the union of its replicas' catalogues, which differ while a new version is rolled out.

A call that names a version goes to the replicas that serve it. A call that names none goes to every replica whose
version has the same signature as the one that most replicas serve (the newest of several), and the metadata describe
that one. So a roll-out never leaves half of the fleet idle, and no caller who asked for the metadata meets a kernel
that takes other arguments.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unlatch.common.errors import NotFound, no_kernel
from unlatch.gateway.fleet.replica import Replica
from unlatch.protos.unlatch_pb2 import Kernel


@dataclass(frozen=True, slots=True)
class Offer:
    """A kernel as it is described, and the replicas that calls of it may go to."""

    kernel: Kernel
    replicas: tuple[Replica, ...]
    # The replica in this process, where there is one beside others that are further away.
    near: Replica | None

    @property
    def taken(self) -> bool:
        """Whether any of the replicas takes calls. A replica that drains still says what it serves."""
        return any(replica.takes_calls for replica in self.replicas)


class FleetCatalogue:
    """The kernels of some replicas. The fleet makes another when a replica comes, goes, drains or changes."""

    def __init__(self, replicas: Iterable[Replica]) -> None:
        versions: dict[str, dict[str, list[Replica]]] = {}
        for replica in replicas:
            for kernel in replica.kernels.values():
                versions.setdefault(kernel.name, {}).setdefault(kernel.version, []).append(replica)
        self._offers: dict[tuple[str, str], Offer] = {}
        self._versions = {name: sorted(served, key=_age) for name, served in versions.items()}
        for name, served in versions.items():
            self._add(name, served)

    @property
    def is_empty(self) -> bool:
        """Whether no kernel is served."""
        return not self._versions

    def kernels(self) -> list[Kernel]:
        """Every kernel as it is described to a caller that names no version, in the order of names."""
        return [self._offers[name, ""].kernel for name in sorted(self._versions)]

    def every_version(self) -> list[Kernel]:
        """Every kernel in every version, in the order of names and ages."""
        return [
            self._offers[name, version].kernel for name in sorted(self._versions) for version in self._versions[name]
        ]

    def versions(self, name: str) -> list[str]:
        """The served versions of a kernel, the oldest first."""
        return self._versions.get(name, [])

    def find(self, name: str, version: str) -> Offer | None:
        """The offer for a name and a version, which is "" for a call that names none."""
        return self._offers.get((name, version))

    def missing(self, name: str, version: str) -> NotFound:
        """The error for a kernel that is not served, or not in that version."""
        return no_kernel(name, version, {known: ", ".join(versions) for known, versions in self._versions.items()})

    def _add(self, name: str, served: dict[str, list[Replica]]) -> None:
        for version, replicas in served.items():
            self._offers[name, version] = _offer(replicas[0].kernels[name], replicas)
        takers = {version: sum(replica.takes_calls for replica in replicas) for version, replicas in served.items()}
        described = max(served, key=lambda version: (takers[version], _age(version)))
        kernel = served[described][0].kernels[name]
        alike = [replica for replicas in served.values() for replica in replicas if _alike(replica, kernel)]
        self._offers[name, ""] = _offer(kernel, alike)


def _offer(kernel: Kernel, replicas: Sequence[Replica]) -> Offer:
    furthest = max(replica.way_seconds for replica in replicas)
    near = next((replica for replica in replicas if replica.way_seconds < furthest), None)
    return Offer(kernel, tuple(replicas), near)


def _alike(replica: Replica, kernel: Kernel) -> bool:
    """Whether a replica's version of a kernel takes the same arguments and gives the same outputs."""
    own = replica.kernels[kernel.name]
    if own.version == kernel.version:
        return True
    return all(list(getattr(own, part)) == list(getattr(kernel, part)) for part in ("inputs", "scalars", "outputs"))


def _age(version: str) -> list[tuple[int, str]]:
    """A sort key for versions by their numbers: 1.10 comes after 1.9."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"[.\-+_]", version)]
