"""The quotas of a tenant that hold for all units of a machine together, and the bytes that these hold in all."""

import math
from collections.abc import Sequence
from hashlib import blake2b
from operator import attrgetter
from typing import Any

from unlatch.common.lane.held_bytes import HeldBytes
from unlatch.common.rates import TokenBucket
from unlatch.gateway.tenants.quotas import QuotaLimits, Tenant
from unlatch.gateway.tenants.shared_usage import Cell, Gauge, Quota, SharedUsage, TenantUsage
from unlatch.gateway.totals import MachineTotals, Totals


class SharedBucket(TokenBucket):
    """A bucket that all units take tokens from. Each has a copy, and takes from it what the others say they took.

    A unit that looks late sees how much the others have taken, but not when, and so not whether the bucket was full in
    between. Hence each unit also tells when its copy will be full, as it was after it took tokens. No copy is later
    than it should be, so the latest is right. All times are those of the machine's monotonic clock.
    """

    __slots__ = ("_elsewhere", "_own", "_seen", "_usage")

    def __init__(self, rate: float, capacity: float, now: float, usage: TenantUsage, quota: Quota) -> None:
        super().__init__(rate, capacity, now)
        self._usage = usage
        self._own = getattr(usage.own, quota)
        self._elsewhere = usage.taken_elsewhere(quota)
        # Under this unit's number, by the process before this one.
        self._full_at(self._own.full_at, now)
        self._full_at(self._latest_elsewhere(), now)
        self._seen = self._amounts()

    def left(self, now: float) -> float:
        """How many tokens there are. What the other units have taken is gone from them."""
        if self._amounts() != self._seen:
            self._catch_up(now)
        return super().left(now)

    def take(self, amount: float, now: float) -> None:
        super().take(amount, now)
        self._tell(amount)

    def take_one(self, now: float) -> bool:
        if not super().take_one(now):
            return False
        self._tell(1.0)
        return True

    def _tell(self, amount: float) -> None:
        # In this order, and read in the other: who sees the second, and with it what is taken here, sees the first.
        self._own.amount += amount
        self._own.full_at = self._at + (self.capacity - self._left) / self.rate

    def _amounts(self) -> Sequence[float]:
        return [one.amount for one in self._elsewhere]

    def _latest_elsewhere(self) -> float:
        """When the bucket is full by the other units that count by the same limits."""
        limits, full_at = self._usage.own.limits, 0.0
        for one, counted in zip(self._elsewhere, self._usage.counts_elsewhere(), strict=True):
            if counted == limits and one.full_at > full_at:
                full_at = one.full_at
        return full_at

    def _catch_up(self, now: float) -> None:
        full_at = self._latest_elsewhere()
        amounts = self._amounts()
        counts = self._usage.counts_elsewhere()
        for before, after, counted in zip(self._seen, amounts, counts, strict=True):
            if counted:
                self._left -= after - before
        self._seen = amounts
        self._full_at(full_at, now)

    def _full_at(self, full_at: float, now: float) -> None:
        """Have the bucket full at this time, unless it is full later."""
        self._left = min(super().left(now), self.capacity - (full_at - now) * self.rate)


def _in_cell(gauge: Gauge) -> Any:
    """Make a property that is a figure of the object's `cell`. The other units see it if the cell is in the table."""

    def keep(counting: "SharedHeldBytes | UnitTenant", value: int) -> None:
        setattr(counting.cell, gauge, value)

    return property(attrgetter(f"cell.{gauge}"), keep)


class SharedHeldBytes(HeldBytes):
    """A tenant's bytes in this unit, or those of all tenants. A bound also counts the bytes in the other units."""

    __slots__ = ("_usage", "cell")
    held: int = _in_cell("held_bytes")

    def __init__(
        self, bound: str, max_bytes: float | None = math.inf, within: HeldBytes | None = None, *, quota: str = ""
    ) -> None:
        self._usage: TenantUsage | MachineTotals | None = None
        self.cell: Cell | Totals = Cell()
        super().__init__(bound, max_bytes, within, quota=quota)

    def share(self, usage: TenantUsage | MachineTotals | None, cell: Cell | Totals) -> None:
        """Tell the other units of the bytes, and count theirs, from now on."""
        cell.held_bytes = self.held
        self._usage, self.cell = usage, cell

    @property
    def most(self) -> float:
        """The bytes that may be held in this unit, as things are now."""
        return super().most if self.max_bytes is None else self.max_bytes - self._elsewhere

    @property
    def use(self) -> str:
        """How much is held in all units, and of what."""
        if self.max_bytes is None:
            return super().use
        return f"{self.held + self._elsewhere} of {self.bound}={self.max_bytes:.0f}"

    @property
    def _elsewhere(self) -> int:
        return 0 if self._usage is None else self._usage.elsewhere("held_bytes")


class UnitTenant(Tenant):
    """A tenant of one unit among several. What it uses in the other units counts against its quotas too.

    Its shares of the gateway's bounds are those of this unit's gateway. A tenant without quotas is not in the table.
    """

    in_flight: int = _in_cell("in_flight")
    lanes: int = _in_cell("lanes")
    held: SharedHeldBytes

    def __init__(
        self, name: str, label: str, limits: QuotaLimits, now: float, within: HeldBytes, table: SharedUsage, key: str
    ) -> None:
        self._table = table
        self._key = key
        self._usage: TenantUsage | None = None
        self.cell = Cell()
        super().__init__(name, label, limits, now, within)

    def forget(self) -> None:
        """Count no more for the other units: this tenant is no longer one of the gateway's."""
        if (usage := self._usage) is not None:
            self._share(None, Cell())
            usage.close()

    def _begin(self, limits: QuotaLimits, now: float) -> None:
        numbers = _numbers(limits)
        if not any(numbers):
            self.forget()
        elif (usage := self._usage or self._table.open(self._key)) is not None:
            usage.limit(_digest(numbers))
            self._share(usage, usage.own)
        super()._begin(limits, now)

    def _share(self, usage: TenantUsage | None, cell: Cell) -> None:
        # What is in use already goes with it.
        self.held.share(usage, cell)
        cell.in_flight, cell.lanes = self.in_flight, self.lanes
        self._usage, self.cell = usage, cell

    def _held_bytes(self, within: HeldBytes, quota: str) -> SharedHeldBytes:
        return SharedHeldBytes("live_bytes", within=within, quota=quota)

    def _bucket(self, quota: Quota, rate: float, capacity: float, now: float) -> TokenBucket:
        if self._usage is None:
            return super()._bucket(quota, rate, capacity, now)
        return SharedBucket(rate, capacity, now, self._usage, quota)

    def _elsewhere(self, gauge: Gauge) -> int:
        return 0 if self._usage is None else self._usage.elsewhere(gauge)


def bytes_of_all(max_live_bytes: int, usage: SharedUsage | None) -> HeldBytes:
    """Return the count of the bytes that all tenants make this gateway hold, and its siblings if it has any."""
    if usage is None:
        return HeldBytes("max_live_bytes", max_live_bytes)
    held = SharedHeldBytes("max_live_bytes", max_live_bytes)
    held.share(usage.totals, usage.totals.own)
    return held


def _numbers(limits: QuotaLimits) -> Sequence[float]:
    """The limits that hold for all units together; 0 where there is none."""
    return [
        limit or 0
        for limit in (
            limits.calls_per_second,
            limits.burst_calls,
            limits.calls_in_flight,
            limits.lanes,
            limits.live_bytes,
            limits.cpu_seconds_per_minute,
        )
    ]


def _digest(numbers: Sequence[float]) -> int:
    # A cell with no limits yet has 0.
    return int.from_bytes(blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") or 1
