"""What the fleet serves: the union of its replicas' catalogues, which differ while a new version is rolled out.

A call that names a version goes to replicas that have that one. One that names none is described, to whoever asks, by
the version that most replicas serve (the newest of several), and goes to every replica whose version has the same
signature: so a roll-out never leaves half of the fleet idle, and nobody who asked for the metadata meets a kernel that
takes other arguments.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from unlatch.common.errors import NotFound, no_kernel
from unlatch.gateway.fleet.replica import Replica
from unlatch.protos.unlatch_pb2 import Kernel


@dataclass(frozen=True, slots=True)
class Offer:
    """A kernel as it is described, and the replicas that calls of it may go to."""

    kernel: Kernel
    replicas: tuple[Replica, ...]

    @property
    def taken(self) -> bool:
        """Whether any of them takes calls. One that drains still says what it serves."""
        return any(replica.takes_calls for replica in self.replicas)


class Catalogue:
    """Made anew when a replica comes, goes, drains or serves something else."""

    def __init__(self, replicas: Iterable[Replica]) -> None:
        versions: dict[str, dict[str, list[Replica]]] = {}
        for replica in replicas:
            for kernel in replica.kernels.values():
                versions.setdefault(kernel.name, {}).setdefault(kernel.version, []).append(replica)
        self._offers: dict[tuple[str, str], Offer] = {}
        self._versions = {name: sorted(served, key=_age) for name, served in versions.items()}
        for name, served in versions.items():
            self._add(name, served)

    def kernels(self) -> list[Kernel]:
        """Every kernel as it is described to one who names no version, by name."""
        return [self._offers[name, ""].kernel for name in sorted(self._versions)]

    def every_version(self) -> list[Kernel]:
        """Every kernel in every version, by name and age."""
        return [
            self._offers[name, version].kernel for name in sorted(self._versions) for version in self._versions[name]
        ]

    def versions(self, name: str) -> list[str]:
        """The versions of a kernel that are served, the oldest first."""
        return self._versions.get(name, [])

    def find(self, name: str, version: str) -> Offer | None:
        """What is offered under a name and a version, "" for none in particular."""
        return self._offers.get((name, version))

    def missing(self, name: str, version: str) -> NotFound:
        """What is said of a kernel that is not served, or not in that version."""
        return no_kernel(name, version, {known: ", ".join(versions) for known, versions in self._versions.items()})

    def _add(self, name: str, served: dict[str, list[Replica]]) -> None:
        for version, replicas in served.items():
            self._offers[name, version] = Offer(replicas[0].kernels[name], tuple(replicas))
        takers = {version: sum(replica.takes_calls for replica in replicas) for version, replicas in served.items()}
        described = max(served, key=lambda version: (takers[version], _age(version)))
        kernel = served[described][0].kernels[name]
        alike = [replica for replicas in served.values() for replica in replicas if _alike(replica, kernel)]
        self._offers[name, ""] = Offer(kernel, tuple(alike))


def _alike(replica: Replica, kernel: Kernel) -> bool:
    """Whether a replica's version of a kernel takes the same arguments and gives the same outputs."""
    own = replica.kernels[kernel.name]
    if own.version == kernel.version:
        return True
    return all(list(getattr(own, part)) == list(getattr(kernel, part)) for part in ("inputs", "scalars", "outputs"))


def _age(version: str) -> list[tuple[int, str]]:
    """Versions in the order of their numbers: 1.10 comes after 1.9."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"[.\-+_]", version)]
