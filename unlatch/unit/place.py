"""The place of a unit among those of a machine: its number, its shares, and the addresses that they have in common."""

import json
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

_VARIABLE = "UNLATCH_UNIT"


@dataclass(frozen=True)
class Place:
    """A unit's place, which the supervisor gives it. `number` counts from 0 to `units` - 1."""

    number: int
    units: int
    # The supervisor's, for sockets of the units and for what they share.
    directory: str
    # The ports that all units listen on.
    listen: str
    health_listen: str
    # Descriptor of the table in which units count quotas. The unit inherits it.
    quotas_fd: int

    @classmethod
    def take(cls, environment: MutableMapping[str, str]) -> Self | None:
        """Read the place from this process's environment, and remove it there. None for a unit that is alone."""
        told = environment.pop(_VARIABLE, "")
        return cls(**json.loads(told)) if told else None

    def variable(self) -> dict[str, str]:
        """The environment variable that tells a unit its place."""
        return {_VARIABLE: json.dumps(asdict(self))}

    def lanes(self, number: int) -> str:
        """The address of a unit for the lanes of its siblings."""
        return f"unix:{Path(self.directory) / f'lanes-{number}'}"

    def metrics(self, number: int) -> str:
        """The address of a unit's /metrics, which the supervisor reads."""
        return f"unix:{Path(self.directory) / f'metrics-{number}'}"

    def share(self, whole: int) -> int:
        """The part of a bound that is this unit's, at least 1 of it. The parts of all units make the whole."""
        return max(1, whole // self.units + (self.number < whole % self.units))
