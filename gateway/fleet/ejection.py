"""Ejection: a replica that fails again and again gets no calls for a while (Envoy calls it outlier detection).

    trusted ── fails again and again ──> ejected ── its time is over ──> on trial ── a call ends well ──> trusted
                                            ^                               └── fails ──┐
                                            └────────── for twice as long ──────────────┘

Failures are what only the replica can be at fault for: lanes that break, and calls that it answers UNAVAILABLE or
ABORTED. A replica that is merely slow is given less to do (gateway/fleet/window.py).
"""

from time import monotonic

# The weight of failures in a row, with no success between them, that ejects a replica. A lane weighs more than a call.
_MAX_IN_A_ROW = 5
CALL, LANE = 1, 2
# Or the weight of failures within this time, when there are at least as many as successes.
_MANY, _RATE_SECONDS = 20, 10.0
_FIRST_SECONDS, _LONGEST_SECONDS = 1.0, 30.0
# After so long without a failure a replica counts as one that never failed.
_FORGIVEN_SECONDS = 60.0


class Ejection:
    """The state of one replica, by how its calls and lanes have ended."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._since = monotonic()
        self._well = self._ill = 0
        self._last_failure = float("-inf")
        self._until = 0.0
        self._seconds = 0.0
        self._on_trial = False

    @property
    def ejected(self) -> bool:
        """Whether the replica gets no calls now."""
        return self._until > monotonic()

    @property
    def trusted(self) -> bool:
        """Whether the replica is neither ejected nor on trial: then it gets as many calls as it has room for."""
        return not self._on_trial

    def succeeded(self) -> None:
        """Count a call that the replica has answered."""
        self._in_a_row = 0
        self._well += 1
        if self._on_trial and not self.ejected:
            self._on_trial = False

    def failed(self, weight: int) -> bool:
        """Count a failure of this weight. Returns whether it is one too many: then the replica should be ejected."""
        now = monotonic()
        if now - self._since > _RATE_SECONDS:
            self._since, self._well, self._ill = now, 0, 0
        if now - self._last_failure > _FORGIVEN_SECONDS:
            self._in_a_row, self._seconds = 0, 0.0
        self._last_failure = now
        self._in_a_row += weight
        self._ill += weight
        often = self._ill >= _MANY and self._ill >= self._well
        return not self.ejected and (self._on_trial or self._in_a_row >= _MAX_IN_A_ROW or often)

    def eject(self) -> float:
        """Eject the replica. Returns for how many seconds."""
        self._seconds = min(_LONGEST_SECONDS, 2 * self._seconds or _FIRST_SECONDS)
        self._until = monotonic() + self._seconds
        self._on_trial = True
        self._in_a_row = self._well = self._ill = 0
        return self._seconds

    def pardon(self) -> None:
        """Take the replica back before its time, since there is no other."""
        self._until = 0.0
        self._on_trial = False
