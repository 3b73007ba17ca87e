"""The status of a replica: what the fleet tells the metrics of it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """The state of a replica as this gateway sees it now."""

    target: str
    up: bool
    calls: int
    # What a new call would wait there.
    wait_seconds: float
    utilization: float
    ejected: bool
    silent_seconds: float
