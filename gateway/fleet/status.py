"""How a replica stands: what the fleet tells metrics of it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One replica, as this gateway sees it now."""

    target: str
    up: bool
    calls: int
    wait_seconds: float
    utilization: float
    ejected: bool
    silent_seconds: float
