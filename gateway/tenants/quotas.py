"""A tenant's quotas: its limits, and how much of them it has used."""

import math
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from unlatch.common.errors import PermissionDenied, ResourceExhausted
from unlatch.common.lane.held_bytes import HeldBytes, share
from unlatch.common.rates import TokenBucket
from unlatch.common.waiting.priority import NAMES, NORMAL, PARAMETER, RANKS, take_priority
from unlatch.gateway.tenants.shared_usage import Gauge, Quota
from unlatch.protos.unlatch_pb2 import Priority, Request

_MINUTE_SECONDS = 60.0
# A guess: the gateway cannot know when a call in flight ends.
_RETRY_SECONDS = 0.1
_MAX_RETRY_MILLISECONDS = 60_000

Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class QuotaLimits(BaseModel):
    """A tenant's table in the file of tenants. What the table does not name is not limited, except for its shares."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    # The callers that are this tenant: names that tokens or certificates give, where * stands for anything. By default
    # the tenant's own name.
    identities: tuple[str, ...] = ()
    calls_per_second: Amount | None = None
    # The calls that may come at once after a rest; by default those of one second.
    burst_calls: Amount | None = None
    calls_in_flight: Annotated[int, Field(gt=0)] | None = None
    # Its open lanes. By default its share of max_lanes.
    lanes: Annotated[int, Field(gt=0)] | None = None
    # The bytes that the gateway holds for it: its calls, and replies that are not read yet. By default its share of
    # max_live_bytes.
    live_bytes: Annotated[int, Field(gt=0)] | None = None
    # The time that its calls' runs take, by the worker's clock. A call that is let in may overdraw it: what a call
    # costs is known only later.
    cpu_seconds_per_minute: Amount | None = None
    kernels: tuple[str, ...] = ("*",)
    # The highest priority that its calls may ask for.
    priority: Literal["interactive", "normal", "background"] = "interactive"
    # Its share where calls wait, relative to other tenants.
    weight: Amount = 1.0


class Tenant:
    """A tenant and its quotas. Its calls are allowed, then admitted, and charged their cost afterwards.

    The bytes that it makes the gateway hold are counted in `within` too. No tenant may fill a bound of the gateway
    alone: without a quota each may take its share (common/lane/held_bytes.py). Where callers are not identified, all
    are one tenant, which has no name and no share.
    """

    def __init__(self, name: str, label: str, limits: QuotaLimits, now: float, within: HeldBytes) -> None:
        self.name = name
        # Its name in metrics.
        self.label = label
        self.in_flight = 0
        # Calls whose answers are not sent yet count here too.
        self.live_calls = 0
        self.lanes = 0
        self.held = self._held_bytes(within, f"tenant:{name}")
        self._begin(limits, now)

    def limit(self, limits: QuotaLimits, now: float) -> None:
        """Hold the tenant to these limits from now on. Limits that stay keep what was used of them."""
        if limits != self.limits:
            self._begin(limits, now)

    def _begin(self, limits: QuotaLimits, now: float) -> None:
        self.limits = limits
        self.held.max_bytes = limits.live_bytes or (None if self.name else math.inf)
        # Looked at for every call.
        self._every_kernel = "*" in limits.kernels
        rate, share = limits.calls_per_second, limits.cpu_seconds_per_minute
        burst = max(1.0, limits.burst_calls or rate or 0.0)
        self._calls = None if rate is None else self._bucket("calls", rate, burst, now)
        self._cpu = None if share is None else self._bucket("run_seconds", share / _MINUTE_SECONDS, share, now)

    # What follows is different where several units share the quotas (shared_quotas.py).

    def forget(self) -> None:
        """Count no more for other units: this tenant is no longer one of the gateway's."""

    def _held_bytes(self, within: HeldBytes, quota: str) -> HeldBytes:
        return HeldBytes("live_bytes", within=within, quota=quota)

    def _bucket(self, _: Quota, rate: float, capacity: float, now: float) -> TokenBucket:
        return TokenBucket(rate, capacity, now)

    def _elsewhere(self, _: Gauge) -> int:
        """Return how much the tenant has in use in other units."""
        return 0

    def allow(self, request: Request) -> Priority.ValueType:
        """Check that a call may ask for its kernel; returns its priority. Raises PermissionDenied, InvalidArgument."""
        if not self._every_kernel and not any(fnmatchcase(request.kernel, one) for one in self.limits.kernels):
            raise PermissionDenied(f"{self._who} may not call kernel {request.kernel[:64]!r}", field="kernel")
        most = NAMES[self.limits.priority]
        asked = take_priority(request)
        priority = NORMAL if asked is None else asked
        if RANKS[priority] >= RANKS[most]:
            return priority
        if asked is not None:
            raise PermissionDenied(f"{self._who} may ask for priority {self.limits.priority} at most", field=PARAMETER)
        return most

    def admit(self, now: float) -> None:
        """Take one call from the quotas. Raises ResourceExhausted, with the time after which to try again."""
        limits = self.limits
        most = limits.calls_in_flight
        if most is not None and self.in_flight + self._elsewhere("in_flight") >= most:
            raise self._used_up(f"calls_in_flight={most}", _RETRY_SECONDS)
        if self._cpu is not None and self._cpu.left(now) <= 0:
            limit = f"cpu_seconds_per_minute={limits.cpu_seconds_per_minute:g}"
            raise self._used_up(limit, self._cpu.seconds_until(self._cpu.rate / 10, now))
        if self._calls is not None and not self._calls.take_one(now):
            limit = f"calls_per_second={limits.calls_per_second:g}"
            raise self._used_up(limit, self._calls.seconds_until(1, now))

    def check_call(self, max_live_calls: int, live_calls: int) -> None:
        """Raise ResourceExhausted if the tenant may have no more calls. All tenants have `live_calls`."""
        if self.name and self.live_calls >= (most := share(max_live_calls, live_calls, self.live_calls)):
            raise self._used_up(f"its share of max_live_calls={max_live_calls}: {most:.0f}", _RETRY_SECONDS)

    def check_lane(self, max_lanes: int, lanes: int) -> None:
        """Raise ResourceExhausted if the tenant may not open one more lane. All tenants have `lanes` open."""
        if (quota := self.limits.lanes) is not None:
            if self.lanes + self._elsewhere("lanes") >= quota:
                raise self._used_up(f"lanes={quota}", _RETRY_SECONDS)
        elif self.name and self.lanes >= (most := share(max_lanes, lanes, self.lanes)):
            raise self._used_up(f"its share of max_lanes={max_lanes}: {most:.0f}", _RETRY_SECONDS)

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
