"""What one tenant may: its limits, and how far it has used them up."""

from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from unlatch.common.errors import PermissionDenied, ResourceExhausted
from unlatch.common.waiting.priority import NAMES, PARAMETER, RANKS, take_priority
from unlatch.protos.unlatch_pb2 import Priority, Request

_MINUTE_SECONDS = 60.0
# Nobody can tell when a call in flight ends: a guess.
_IN_FLIGHT_RETRY_MILLISECONDS = 100
_MOST_RETRY_MILLISECONDS = 60_000

Amount = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Limits(BaseModel):
    """A tenant's table in the file. What is not said is not limited."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    # Who it is: names that tokens or certificates give, where * stands for anything. Its own name, unless said.
    identities: tuple[str, ...] = ()
    calls_per_second: Amount | None = None
    # After a rest so many may come at once; a second's worth unless said.
    burst_calls: Amount | None = None
    calls_in_flight: Annotated[int, Field(gt=0)] | None = None
    # What its calls' runs take, by the worker's clock. A call that is let in may overdraw it: its cost is known later.
    cpu_seconds_per_minute: Amount | None = None
    kernels: tuple[str, ...] = ("*",)
    # The highest.
    priority: Literal["interactive", "normal", "background"] = "interactive"
    # Its share where calls wait.
    weight: Amount = 1.0


class Bucket:
    """So much comes back a second, up to `most`; what is taken may be more than there is."""

    __slots__ = ("_at", "_left", "most", "rate")

    def __init__(self, rate: float, most: float, now: float) -> None:
        self.rate = rate
        self.most = most
        self._left = most
        self._at = now

    def left(self, now: float) -> float:
        """What there is."""
        self._left = min(self.most, self._left + (now - self._at) * self.rate)
        self._at = now
        return self._left

    def take(self, amount: float, now: float) -> None:
        """Take so much."""
        self._left = self.left(now) - amount

    def seconds_until(self, amount: float, now: float) -> float:
        """When there is so much, from now on."""
        return max(0.0, (amount - self.left(now)) / self.rate)


class Tenant:
    """One tenant: what its calls ask for is allowed, then admitted; what they have cost is charged."""

    def __init__(self, name: str, label: str, limits: Limits, now: float) -> None:
        self.name = name
        # What metrics call it.
        self.label = label
        self.in_flight = 0
        self._begin(limits, now)

    def limit(self, limits: Limits, now: float) -> None:
        """Hold it to these from now on."""
        if limits != self.limits:
            self._begin(limits, now)

    def _begin(self, limits: Limits, now: float) -> None:
        self.limits = limits
        rate, share = limits.calls_per_second, limits.cpu_seconds_per_minute
        self._calls = None if rate is None else Bucket(rate, max(1.0, limits.burst_calls or rate), now)
        self._cpu = None if share is None else Bucket(share / _MINUTE_SECONDS, share, now)

    def allow(self, request: Request) -> Priority.ValueType:
        """Hold what a call asks for against what is allowed; its priority. Raises PermissionDenied, InvalidArgument."""
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
        """Take one call's worth of its quotas. Raises ResourceExhausted with when to come back."""
        limits = self.limits
        if limits.calls_in_flight is not None and self.in_flight >= limits.calls_in_flight:
            raise self._used_up(f"calls_in_flight={limits.calls_in_flight}", _IN_FLIGHT_RETRY_MILLISECONDS / 1e3)
        if self._cpu is not None and self._cpu.left(now) <= 0:
            limit = f"cpu_seconds_per_minute={limits.cpu_seconds_per_minute:g}"
            raise self._used_up(limit, self._cpu.seconds_until(self._cpu.rate / 10, now))
        if self._calls is not None:
            if self._calls.left(now) < 1:
                limit = f"calls_per_second={limits.calls_per_second:g}"
                raise self._used_up(limit, self._calls.seconds_until(1, now))
            self._calls.take(1, now)

    def charge(self, run_seconds: float, now: float) -> None:
        """One of its calls has cost so much."""
        if self._cpu is not None:
            self._cpu.take(run_seconds, now)

    @property
    def _who(self) -> str:
        return f"tenant {self.name!r}" if self.name else "a caller without a name"

    def _used_up(self, limit: str, seconds: float) -> ResourceExhausted:
        wait = min(_MOST_RETRY_MILLISECONDS, max(1, round(seconds * 1e3)))
        return ResourceExhausted(
            f"{self._who} has used up {limit}", quota=f"tenant:{self.name}", retry_after_milliseconds=wait
        )
