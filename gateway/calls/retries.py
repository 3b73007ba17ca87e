"""Retries: whether a run that was lost with its replica is sent again, and what for, so that retries feed no outage.

    its kernel is pure   a worker had begun it
    either               no                     sent elsewhere for free: nothing has happened
    yes                  yes, or nobody knows   sent again where the budget has one for it
    no                   yes, or nobody knows   its caller hears that it may have had effect

The budget is a tenth of the calls of late, and a reserve of what one replica's loss may cost: the most runs that one
has had at a time. So one replica may always be lost, however few calls there are; but when all are lost again and
again, what they are sent again is a tenth of what they are sent. (A token bucket, as Finagle's RetryBudget and gRPC's
retry throttling are: docs/decisions/0014.)
"""

import math
from collections.abc import Callable
from time import monotonic

from unlatch.common.errors import Unavailable
from unlatch.gateway.metrics import GatewayMetrics

# What each call adds.
_SHARE = 0.1
# What is above the reserve is forgotten by and by: the share is of the calls of this time, not of all that ever were.
_RECENT_SECONDS = 10.0
# However it ended: one that has met so many ends may well be what ended them.
_MOST_BEGUN = 3
# Of those that cost nothing: each time a replica was lost, and there cannot have been many while its callers wait.
_MOST_SENT = 10


class RetryBudget:
    """Tokens, one for each retry: `called` adds a tenth of one, and the reserve is there from the start."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._at = clock()
        self._tokens = 0.0
        self._reserve = 0

    @property
    def left(self) -> float:
        """How many retries it has."""
        self._forget()
        return self._tokens

    def called(self, at_stake: int) -> None:
        """A call is sent for the first time, to a replica that so many are at now."""
        self._forget()
        self._tokens += _SHARE
        if at_stake > self._reserve:
            self._tokens += at_stake - self._reserve
            self._reserve = at_stake

    def take(self) -> bool:
        """Whether there is a retry left; it is taken."""
        self._forget()
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def _forget(self) -> None:
        now = self._clock()
        if self._tokens > self._reserve:
            kept = math.exp((self._at - now) / _RECENT_SECONDS)
            self._tokens = self._reserve + (self._tokens - self._reserve) * kept
        self._at = now


class Retries:
    """What is sent again, and the count of it."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self._budget = RetryBudget()
        metrics.retry_budget(lambda: self._budget.left)

    def called(self, at_stake: int) -> None:
        """A run is sent for the first time, to a replica that so many are at now."""
        self._budget.called(at_stake)

    def refusal(self, *, pure: bool, begun: bool | None, times_begun: int, times_sent: int, why: str) -> str:
        """Why a run is not to be sent again; nothing where it is. `begun` is None where nobody knows.

        `why` is a label: how it was lost.
        """
        if begun is False and times_sent < _MOST_SENT:
            self._metrics.retried("not_begun")
            return ""
        if not pure and begun is not False:
            refused, told = "not_pure", "it was begun, or may have been, and may have had effect"
        elif times_begun >= _MOST_BEGUN or times_sent >= _MOST_SENT:
            refused, told = "attempts", f"it was sent {times_sent} times"
        elif self._budget.take():
            self._metrics.retried(why)
            return ""
        else:
            refused, told = "budget", "more calls are being lost than may be sent again"
        self._metrics.not_retried(refused)
        return told


def not_sent_again(error: Unavailable, told: str) -> Unavailable:
    """What the caller hears of a run that is lost for good."""
    return Unavailable(f"{error.message}; {told}", retry_after_milliseconds=error.retry_after_milliseconds)
