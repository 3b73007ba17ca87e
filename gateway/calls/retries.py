"""Retries: whether an execution that was lost with its replica is sent again, so that retries feed no outage.

    its kernel is pure   a worker had begun it
    either               no                     sent elsewhere for free: nothing has happened
    yes                  yes, or unknown        sent again where the budget has a retry for it
    no                   yes, or unknown        its caller hears that it may have had an effect

The budget is a tenth of recent calls, and a reserve for the loss of all replicas at once: the most executions that they
have had at a time. So the whole fleet may be lost once, however few calls there are. But when it is lost again and
again, retries are a tenth of what is sent to it. (A token bucket, as Finagle's RetryBudget and gRPC's retry throttling
are: docs/decisions/0014.)
"""

import math
from collections.abc import Callable
from time import monotonic

from unlatch.common.errors import POSSIBLE_EFFECT
from unlatch.gateway.metrics import GatewayMetrics

# Tokens that each call adds.
_SHARE = 0.1
# Time in which tokens above the reserve decay: the share is of recent calls, not of all that ever were.
_RECENT_SECONDS = 10.0
# Times that an execution may be begun: after as many lost workers or replicas it may well be the cause.
_MAX_BEGUN = 3
# Times that an execution may be sent, retries for free included. Each time a replica was lost, and few can have been
# lost while the callers wait.
_MAX_SENT = 10


class RetryBudget:
    """Tokens, one for each retry: `called` adds a tenth of one, and the reserve is there from the start."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._at = clock()
        self._tokens = 0.0
        self._reserve = 0

    @property
    def left(self) -> float:
        """The number of retries that there may be now."""
        self._forget()
        return self._tokens

    def called(self, at_stake: int) -> None:
        """Add a new call's share. `at_stake` is how many executions its fleet's replicas have now."""
        self._forget()
        self._tokens += _SHARE
        if at_stake > self._reserve:
            self._tokens += at_stake - self._reserve
            self._reserve = at_stake

    def take(self) -> bool:
        """Take one retry; returns whether there was one."""
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
    """Decides which executions are sent again, and counts them."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._metrics = metrics
        self.budget = RetryBudget()
        metrics.retry_budget(lambda: self.budget.left)

    def refusal(self, *, pure: bool, begun: bool | None, times_begun: int, times_sent: int, why: str) -> str:
        """Return why an execution is not sent again; "" where it is.

        `begun` is None where that is unknown. `why`, how the execution was lost, is a label of the count.
        """
        if begun is False and times_sent < _MAX_SENT:
            self._metrics.retries.add(1, "not_begun")
            return ""
        if not pure and begun is not False:
            refused, told = "not_pure", POSSIBLE_EFFECT
        elif times_begun >= _MAX_BEGUN or times_sent >= _MAX_SENT:
            refused, told = "attempts", f"it was sent {times_sent} times"
        elif self.budget.take():
            self._metrics.retries.add(1, why)
            return ""
        else:
            refused, told = "budget", "more calls are being lost than may be sent again"
        self._metrics.retries_refused.add(1, refused)
        return told
