"""The order of waiting: who is next when there is room. The front applies it to its queue, the gateway to its calls.

    priority      what is interactive goes before what is normal, and that before what is background, always.
    tenant        within a priority, whoever has used least for its weight: processor seconds, not calls.
    deadline      within a tenant's calls of one priority, the earliest first; then whoever came first.

**Shares.** Each tenant has a clock for each priority, which goes forward by what its calls cost over its weight; who is
furthest behind is next. (With one clock for all, who waits in vain for the processor with background calls would hold
back the time at which others come.) A call is charged what it is expected to cost when its turn comes, and the rest
when its cost is known. One who was away comes back at the time of those who wait: nobody saves up a share by not using
it. (Start-time fair queueing, Goyal, Vin and Cheng 1996: deficit round robin with a quantum as small as can be.)

A tenant's calls of one priority are two lists, of long calls and of others: some workers may take no long ones.
"""

import math
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from itertools import count
from typing import Generic, Protocol, TypeVar

# So many tenants that wait for nothing are remembered beyond those that wait, until the clocks have passed theirs.
_MOST_AWAY = 256


class Waiting(Protocol):
    """What the order goes by."""

    @property
    def priority(self) -> int:
        """The lower the sooner."""

    @property
    def tenant(self) -> str:
        """Who calls."""

    @property
    def deadline(self) -> float | None:
        """By the monotonic clock."""

    @property
    def cost_seconds(self) -> float:
        """What it is expected to cost; 0 where nothing is known."""

    @property
    def long(self) -> bool:
        """Whether that is long."""

    @property
    def batch(self) -> Hashable | None:
        """Calls that have the same one can run as one; None for a call that runs alone."""


Call = TypeVar("Call", bound=Waiting)
# A tenant's name and a priority.
_Key = tuple[str, int]


class _Line(Generic[Call]):
    """Calls of one tenant and one priority, the earliest deadline first."""

    def __init__(self) -> None:
        self.entries: list[tuple[float, int, Call]] = []
        self.seconds = 0.0


class _Tenant(Generic[Call]):
    """One who has calls of a priority that wait, or whose clock there is ahead."""

    def __init__(self, weight: float, clock: float) -> None:
        self.weight = weight
        self.clock = clock
        self.lines: dict[bool, _Line[Call]] = {}
        self.calls = 0


class Policy(Generic[Call]):
    """The calls that wait, in their order. A tenant that `weights` does not name has the weight 1."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = weights or {}
        self._tenants: dict[_Key, _Tenant[Call]] = {}
        self._waiting: dict[_Key, _Tenant[Call]] = {}
        # Where each is, by identity: a caller who leaves is found without a search.
        self._places: dict[int, tuple[_Line[Call], float, int]] = {}
        self._returned: list[Call] = []
        self._batches: dict[Hashable, dict[int, dict[int, Call]]] = {}
        # Of each priority, the time of those who wait.
        self._clocks: defaultdict[int, float] = defaultdict(float)
        self._arrivals = count()

    def __len__(self) -> int:
        return len(self._places) + len(self._returned)

    def seconds(self, *, short: bool = False) -> float:
        """What those that wait are expected to cost together. With `short`, those that are not long."""
        lines = (found for tenant in self._waiting.values() for found in tenant.lines.items())
        return sum(line.seconds for long, line in lines if not (short and long))

    def __iter__(self) -> Iterator[Call]:
        """The calls in their order as it is now, as long as none is added or removed."""
        yield from reversed(self._returned)
        tenants = sorted(self._waiting.items(), key=lambda found: found[1].clock)
        lines = [((priority, long), line) for (_, priority), tenant in tenants for long, line in tenant.lines.items()]
        for _, line in sorted(lines, key=lambda found: found[0]):
            for _, _, call in line.entries:
                yield call

    def add(self, call: Call) -> None:
        """A call begins to wait."""
        tenant = self._tenant(call)
        if not tenant.calls:
            tenant.clock = max(tenant.clock, self._clocks[call.priority])
            self._waiting[_key(call)] = tenant
        tenant.calls += 1
        line = tenant.lines.setdefault(call.long, _Line())
        deadline, arrival = math.inf if call.deadline is None else call.deadline, next(self._arrivals)
        insort(line.entries, (deadline, arrival, call))
        line.seconds += call.cost_seconds
        self._places[id(call)] = line, deadline, arrival
        if call.batch is not None:
            self._batches.setdefault(call.batch, {}).setdefault(call.priority, {})[id(call)] = call

    def put_back(self, call: Call) -> None:
        """A call whose turn it was waits again, before all others: it was not begun, or is to be begun again."""
        self.charge(call, -call.cost_seconds)
        self._returned.append(call)

    def remove(self, call: Call) -> bool:
        """A call waits no more, if it did: its caller has left."""
        place = self._places.pop(id(call), None)
        if place is None:
            # There are as many as workers have just ended: a handful.
            if call in self._returned:
                self._returned.remove(call)
                return True
            return False
        line, deadline, arrival = place
        del line.entries[bisect_left(line.entries, (deadline, arrival))]
        line.seconds -= call.cost_seconds
        tenant = self._waiting[_key(call)]
        tenant.calls -= 1
        if not line.entries:
            del tenant.lines[call.long]
        if not tenant.calls:
            del self._waiting[_key(call)]
        if call.batch is not None:
            alike = self._batches[call.batch]
            del alike[call.priority][id(call)]
            if not alike[call.priority]:
                del alike[call.priority]
            if not alike:
                del self._batches[call.batch]
        return True

    def take_at_once(self, call: Call) -> None:
        """A call has come that need not wait, since there is room for it: its tenant is charged as if it had."""
        tenant = self._tenant(call)
        now = self._clocks[call.priority]
        tenant.clock = max(tenant.clock, now)
        if not any(priority == call.priority for _, priority in self._waiting):
            self._clocks[call.priority] = tenant.clock
        self.charge(call, call.cost_seconds)

    def take_before_others(self, call: Call) -> None:
        """A call that waits has its turn; for those before it there is no room where they could go."""
        behind = min(tenant.clock for (_, priority), tenant in self._waiting.items() if priority == call.priority)
        self._clocks[call.priority] = max(self._clocks[call.priority], behind)
        self.take(call)

    def take(self, call: Call) -> None:
        """A call that waits has its turn: it waits no more, and its tenant is charged what it is expected to cost."""
        if self.remove(call):
            self.charge(call, call.cost_seconds)

    def next(self, *, short: bool = False) -> Call | None:
        """The call whose turn it is, taken; None when nobody waits. With `short`, of those that are not long."""
        for call in reversed(self._returned):
            if not (short and call.long):
                self.take(call)
                return call
        best: tuple[int, float, float, int] | None = None
        chosen: Call | None = None
        behind: defaultdict[int, float] = defaultdict(lambda: math.inf)
        for (_, priority), tenant in self._waiting.items():
            behind[priority] = min(behind[priority], tenant.clock)
            for long, line in tenant.lines.items():
                if short and long:
                    continue
                deadline, arrival, call = line.entries[0]
                rank = priority, tenant.clock, deadline, arrival
                if best is None or rank < best:
                    best, chosen = rank, call
        if chosen is not None:
            now = behind[chosen.priority]
            self._clocks[chosen.priority] = max(self._clocks[chosen.priority], now)
            self.take(chosen)
        return chosen

    def one_too_many(self, came: Call) -> Call:
        """Who is to go when a call has come that is one too many.

        Of the lowest priority, of the tenant with most calls for its weight, the latest; but that very call, if it is
        one of these: nobody who waits gives way to an equal.
        """
        lowest = max(priority for _, priority in self._waiting)
        lines = [
            (len(line.entries) / tenant.weight, line)
            for (_, priority), tenant in self._waiting.items()
            for line in tenant.lines.values()
            if priority == lowest
        ]
        _, longest = max(lines, key=lambda found: found[0])
        latest = longest.entries[-1][2]
        return came if (latest.tenant, latest.priority) == (came.tenant, came.priority) else latest

    def alike(self, call: Call) -> Iterator[Call]:
        """Who waits and could run as one with a call, by priority and arrival, as long as none is added or removed."""
        waiting = self._batches.get(call.batch, {})
        return (other for priority in sorted(waiting) for other in waiting[priority].values())

    def charge(self, call: Call, seconds: float) -> None:
        """A call whose turn it was has cost its tenant so much more than was expected, or less."""
        charged = self._tenant(call)
        charged.clock += seconds / charged.weight

    def seconds_before(self, call: Call, *, short: bool = False) -> float:
        """What is expected to be done before a call that has yet to be added. With `short`, of what is not long.

        All of a higher priority; of its own, its tenant's calls with an earlier deadline, and what the others' shares
        are meanwhile.
        """
        before = own = everyone = others = 0.0
        for (name, priority), tenant in self._waiting.items():
            competes = False
            for long, line in tenant.lines.items():
                if short and long:
                    continue
                if priority < call.priority:
                    before += line.seconds
                elif priority == call.priority and name == call.tenant:
                    own += _seconds_until(line, call.deadline)
                elif priority == call.priority:
                    competes = True
                    everyone += line.seconds
            others += tenant.weight if competes else 0.0
        share = (own + call.cost_seconds) * others / self._weights.get(call.tenant, 1.0)
        return before + own + min(everyone, share)

    def _tenant(self, call: Call) -> _Tenant[Call]:
        key = _key(call)
        tenant = self._tenants.get(key)
        if tenant is None:
            if len(self._tenants) > 2 * len(self._waiting) + _MOST_AWAY:
                self._forget()
            clock = self._clocks[call.priority]
            tenant = self._tenants[key] = _Tenant(self._weights.get(call.tenant, 1.0), clock)
        else:
            # It may be another by now.
            tenant.weight = self._weights.get(call.tenant, 1.0)
        return tenant

    def _forget(self) -> None:
        """One who waits for nothing and is not ahead is as one who never came; beyond the bound, so is anyone away."""
        ahead = [
            (tenant.clock - self._clocks[key[1]], key)
            for key, tenant in self._tenants.items()
            if not tenant.calls and tenant.clock > self._clocks[key[1]]
        ]
        ahead.sort(reverse=True)
        self._tenants = self._waiting | {key: self._tenants[key] for _, key in ahead[:_MOST_AWAY]}


def _key(call: Waiting) -> _Key:
    return call.tenant, call.priority


def _seconds_until(line: _Line[Call], deadline: float | None) -> float:
    """What a line's calls with no later deadline cost: as much of the whole as they are of its calls."""
    if deadline is None:
        return line.seconds
    return line.seconds * bisect_left(line.entries, (deadline, math.inf)) / len(line.entries)
