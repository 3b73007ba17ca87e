"""A tenant's quotas: its limits, and how much of them it has used."""

from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from unlatch.common.errors import PermissionDenied, ResourceExhausted
from unlatch.common.rates import TokenBucket
from unlatch.common.waiting.priority import NAMES, PARAMETER, RANKS, take_priority
from unlatch.protos.unlatch_pb2 import Priority, Request

_MINUTE_SECONDS = 60.0
# A guess: the gateway cannot know when a call in flight ends.
_IN_FLIGHT_RETRY_MILLISECONDS = 100
_MAX_RETRY_MILLISECONDS = 60_000

Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class QuotaLimits(BaseModel):
    """A tenant's table in the file of tenants. What the table does not name is not limited."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    # The callers that are this tenant: names that tokens or certificates give, where * stands for anything. By default
    # the tenant's own name.
    identities: tuple[str, ...] = ()
    calls_per_second: Amount | None = None
    # The calls that may come at once after a rest; by default those of one second.
    burst_calls: Amount | None = None
    calls_in_flight: Annotated[int, Field(gt=0)] | None = None
    # The time that its calls' runs take, by the worker's clock. A call that is let in may overdraw it: what a call
    # costs is known only later.
    cpu_seconds_per_minute: Amount | None = None
    kernels: tuple[str, ...] = ("*",)
    # The highest priority that its calls may ask for.
    priority: Literal["interactive", "normal", "background"] = "interactive"
    # Its share where calls wait, relative to other tenants.
    weight: Amount = 1.0


class Tenant:
    """A tenant and its quotas. Its calls are allowed, then admitted, and charged their cost afterwards."""

    def __init__(self, name: str, label: str, limits: QuotaLimits, now: float) -> None:
        self.name = name
        # Its name in metrics.
        self.label = label
        self.in_flight = 0
        self._begin(limits, now)

    def limit(self, limits: QuotaLimits, now: float) -> None:
        """Hold the tenant to these limits from now on. Limits that stay keep what was used of them."""
        if limits != self.limits:
            self._begin(limits, now)

    def _begin(self, limits: QuotaLimits, now: float) -> None:
        self.limits = limits
        rate, share = limits.calls_per_second, limits.cpu_seconds_per_minute
        self._calls = None if rate is None else TokenBucket(rate, max(1.0, limits.burst_calls or rate), now)
        self._cpu = None if share is None else TokenBucket(share / _MINUTE_SECONDS, share, now)

    def allow(self, request: Request) -> Priority.ValueType:
        """Check that a call may ask for its kernel; returns its priority. Raises PermissionDenied, InvalidArgument."""
        if not any(fnmatchcase(request.kernel, allowed) for allowed in self.limits.kernels):
            raise PermissionDenied(f"{self._who} may not call kernel {request.kernel[:64]!r}", field="kernel")
        most = NAMES[self.limits.priority]
        asks = PARAMETER in request.parameters
        priority = take_priority(request)
        if RANKS[priority] >= RANKS[most]:
            return priority
        if asks:
            raise PermissionDenied(f"{self._who} may ask for priority {self.limits.priority} at most", field=PARAMETER)
        return most

    def admit(self, now: float) -> None:
        """Take one call from the quotas. Raises ResourceExhausted, with the time after which to try again."""
        limits = self.limits
        if limits.calls_in_flight is not None and self.in_flight >= limits.calls_in_flight:
            raise self._used_up(f"calls_in_flight={limits.calls_in_flight}", _IN_FLIGHT_RETRY_MILLISECONDS / 1e3)
        if self._cpu is not None and self._cpu.left(now) <= 0:
            limit = f"cpu_seconds_per_minute={limits.cpu_seconds_per_minute:g}"
            raise self._used_up(limit, self._cpu.seconds_until(self._cpu.rate / 10, now))
        if self._calls is not None and not self._calls.take_one(now):
            limit = f"calls_per_second={limits.calls_per_second:g}"
            raise self._used_up(limit, self._calls.seconds_until(1, now))

    def charge(self, run_seconds: float, now: float) -> None:
        """Charge the tenant for what one of its calls has cost."""
        if self._cpu is not None:
            self._cpu.take(run_seconds, now)

    @property
    def _who(self) -> str:
        return f"tenant {self.name!r}" if self.name else "a caller without a name"

    def _used_up(self, limit: str, seconds: float) -> ResourceExhausted:
        wait = min(_MAX_RETRY_MILLISECONDS, max(1, round(seconds * 1e3)))
        return ResourceExhausted(
            f"{self._who} has used up {limit}", quota=f"tenant:{self.name}", retry_after_milliseconds=wait
        )
