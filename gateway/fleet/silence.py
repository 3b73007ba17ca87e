"""Silence: whether a replica that sends no reports is lost, or only has no core. A timer alone never decides.

    a report is missed ──> counts 1, or a tenth of it where the silence is in doubt
         │                        five are missed in a row ──┬─> lost: its lane is broken
         └── a message comes: all is forgotten               └─> kept: see below

A silence is in doubt where the reason may lie elsewhere: this event loop ran late, work had to wait for a core on this
machine, or half of the other replicas are silent too. A replica on this machine whose process is stopped (SIGSTOP) is
beyond doubt.

By silence a replica is lost only if another one is heard, and if at least half of the known replicas stay in use. The
second rule is Envoy's panic threshold: where most are found ill, the fault is more likely in what judges them, and the
few that are left could not do the work. A process that is stopped is lost all the same.
"""

from dataclasses import dataclass

# Reports that are missed in a row until a replica is lost.
_MISSED_REPORTS = 5
# Missed reports from which a replica counts as silent: one may come just after a look.
_SILENT_REPORTS = 2
_DOUBTFUL_WEIGHT = 0.1
# This loop runs timers within some ms; and a core is free at once, or nearly, on a machine that is well.
_LATE_SECONDS = 0.1
_PRESSURE = 0.25


@dataclass(frozen=True, slots=True)
class Circumstances:
    """The state of gateway, machine and fleet at the moment when a replica misses a report."""

    # Seconds by which this event loop looked too late.
    late_seconds: float = 0.0
    # Share of the time since the look before in which work waited for a core (common/machine/core_pressure.py).
    pressure: float = 0.0
    # Replicas that take calls besides the silent one: how many there are, and how many of them are silent too.
    others: int = 0
    others_silent: int = 0
    # Whether the system says that its process is stopped.
    stopped: bool = False

    @property
    def doubtful(self) -> bool:
        """Whether the reason of the silence may lie elsewhere than in the replica."""
        if self.stopped:
            return False
        together = self.others_silent > 0 and 2 * self.others_silent >= self.others
        return self.late_seconds > _LATE_SECONDS or self.pressure > _PRESSURE or together


class Silence:
    """The reports that one replica has missed since its last message.

    `stopped` is whether its process was stopped then, and `kept` whether it would be lost if it were not needed.
    """

    def __init__(self) -> None:
        self._missed = 0
        self._weight = 0.0
        self.stopped = self.kept = False

    @property
    def silent(self) -> bool:
        """Whether the replica has been silent for longer than a report may be late."""
        return self._missed >= _SILENT_REPORTS

    @property
    def too_long(self) -> bool:
        """Whether it counts as lost, unless it must be kept."""
        # Ten times a tenth is a little less than one.
        return self._weight > _MISSED_REPORTS - _DOUBTFUL_WEIGHT / 2

    def heard(self) -> None:
        """Forget what was missed: a message has come."""
        self._missed, self._weight, self.stopped, self.kept = 0, 0.0, False, False

    def missed(self, circumstances: Circumstances) -> None:
        """Count a report that did not come."""
        self._missed += 1
        self._weight += _DOUBTFUL_WEIGHT if circumstances.doubtful else 1.0
        self.stopped = circumstances.stopped


def must_stay(*, known: int, in_use: int, heard: int, stopped: bool) -> str:
    """Return why a silent replica is kept, or "". `in_use` and `heard` count the replicas besides it.

    `known` counts all that belong to the fleet, `in_use` those that take calls and are not ejected, and `heard` those
    that take calls and are not silent.
    """
    if not heard:
        return "no other replica is heard"
    if not stopped and too_few(known=known, in_use=in_use):
        return "fewer than half of the known replicas would be in use"
    return ""


def too_few(*, known: int, in_use: int) -> bool:
    """Whether `in_use` replicas are fewer than half of the known ones: no replica is taken out for that."""
    return 2 * in_use < known
