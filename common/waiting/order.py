"""The order of waiting: which call is next when there is room, at a gateway and at a replica.

    priority      interactive calls go before normal ones, and those before background ones, always.
    tenant        within a priority, the tenant that has used least for its weight: processor seconds, not calls.
    deadline      within a tenant's calls of one priority, the earliest first; then the call that came first.

**Shares.** Each tenant has a clock for each priority, which goes forward by what its calls cost over its weight; the
tenant that is furthest behind is next. (With one clock for all priorities, a tenant that waits in vain with background
calls would hold back the time at which new tenants begin.) A call is charged its expected cost when its turn comes, and
the rest when its cost is known. A tenant that was away comes back at the time of those that wait: no tenant saves up a
share by not using it. (Start-time fair queueing, Goyal, Vin and Cheng 1996: deficit round robin with a quantum as small
as can be.)

**Kinds.** Room may be there for calls of some kinds and not for others: a replica keeps workers free of long calls, a
gateway has full replicas for one kernel and not for another. A tenant's calls of one priority lie in one line for each
kind, so that the next call among the kinds with room is found without a search through the others.
"""

import math
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Container, Hashable, Iterator, Mapping
from itertools import count
from typing import Generic, Protocol, TypeVar

from unlatch.common.waiting.demand import Demand, Estimate

# Tenants without waiting calls that are remembered until the clocks have passed theirs.
_MAX_AWAY = 256


class Waiting(Protocol):
    """A call that waits. Both values may be replaced while it waits: its place goes by those that it came with."""

    @property
    def demand(self) -> Demand:
        """The demand of its caller."""

    @property
    def estimate(self) -> Estimate:
        """The estimate of its run."""


Call = TypeVar("Call", bound=Waiting)
# A tenant's name and a priority.
_Key = tuple[str, int]


class _Line(Generic[Call]):
    """Calls of one tenant, one priority and one kind, the earliest deadline first."""

    __slots__ = ("beside", "entries", "kind", "long", "seconds")

    def __init__(self, kind: Hashable, *, long: bool, beside: bool) -> None:
        self.kind = kind
        self.long = long
        # Whether they wait for async workers, and so for other workers than the rest.
        self.beside = beside
        self.entries: list[tuple[float, int, Call]] = []
        self.seconds = 0.0


class _Tenant(Generic[Call]):
    """A tenant that has waiting calls of one priority, or whose clock there is ahead."""

    __slots__ = ("calls", "clock", "lines", "weight")

    def __init__(self, clock: float) -> None:
        self.weight = 1.0
        self.clock = clock
        self.lines: dict[Hashable, _Line[Call]] = {}
        self.calls = 0


def by_length(call: Waiting) -> Hashable:
    """A call's kind where only its length matters: whether it is long."""
    return call.estimate.long


class Policy(Generic[Call]):
    """The calls that wait, in their order. A tenant that `weights` does not name has the weight 1.

    `kind` tells which calls find room together. Calls of one kind are all long, or none of them is, and
    all wait for async workers, or none of them does.
    """

    def __init__(
        self, weights: Mapping[str, float] | None = None, kind: Callable[[Call], Hashable] = by_length
    ) -> None:
        self._weights = {} if weights is None else weights
        self._kind = kind
        self._tenants: dict[_Key, _Tenant[Call]] = {}
        self._waiting: dict[_Key, _Tenant[Call]] = {}
        # By the call's identity, its line, its arrival, and the values that it came with: a call whose caller leaves is
        # found without a search.
        self._places: dict[int, tuple[_Line[Call], int, Demand, Estimate]] = {}
        self._returned: list[tuple[Hashable, Call]] = []
        # How many lines there are of each kind, and calls that were put back.
        self._kinds: dict[Hashable, int] = {}
        # The kinds of the calls that wait, as they are at any time.
        self.kinds = self._kinds.keys()
        self._batches: dict[Hashable, dict[int, dict[int, Call]]] = {}
        # By priority, the time of the tenants that wait.
        self._clocks: defaultdict[int, float] = defaultdict(float)
        self._arrivals = count()

    def __len__(self) -> int:
        return len(self._places) + len(self._returned)

    def kind_of(self, call: Call) -> Hashable:
        """The kind that a call waits under; of a call that does not wait, the kind that it has now."""
        place = self._places.get(id(call))
        if place is not None:
            return place[0].kind
        return next((kind for kind, returned in reversed(self._returned) if returned is call), self._kind(call))

    def seconds(self, *, short: bool = False) -> float:
        """The expected cost of all calls that wait. With `short`, of those that are not long."""
        lines = (line for tenant in self._waiting.values() for line in tenant.lines.values())
        return sum(line.seconds for line in lines if not (short and line.long))

    def __iter__(self) -> Iterator[Call]:
        """The calls in their order as it is now, as long as none is added or removed."""
        for _, call in reversed(self._returned):
            yield call
        tenants = sorted(self._waiting.items(), key=lambda found: found[1].clock)
        lines = [(priority, line) for (_, priority), tenant in tenants for line in tenant.lines.values()]
        for _, line in sorted(lines, key=lambda found: (found[0], found[1].long)):
            for _, _, call in line.entries:
                yield call

    def add(self, call: Call) -> None:
        """Let a call wait."""
        demand, estimate, kind = call.demand, call.estimate, self._kind(call)
        tenant = self._tenant(demand)
        if not tenant.calls:
            tenant.clock = max(tenant.clock, self._clocks[demand.priority])
            self._waiting[demand.tenant, demand.priority] = tenant
        tenant.calls += 1
        line = tenant.lines.get(kind)
        if line is None:
            line = tenant.lines[kind] = _Line(kind, long=estimate.long, beside=estimate.beside is not None)
            self._kinds[kind] = self._kinds.get(kind, 0) + 1
        arrival = next(self._arrivals)
        insort(line.entries, (demand.deadline, arrival, call))
        line.seconds += estimate.seconds
        self._places[id(call)] = line, arrival, demand, estimate
        if demand.batch is not None:
            self._batches.setdefault(demand.batch, {}).setdefault(demand.priority, {})[id(call)] = call

    def put_back(self, call: Call) -> None:
        """Let a call whose turn it was wait again, before all others: it was not begun, or is to be begun again."""
        self.charge(call, -call.estimate.seconds)
        kind = self._kind(call)
        self._returned.append((kind, call))
        self._kinds[kind] = self._kinds.get(kind, 0) + 1

    def remove(self, call: Call) -> bool:
        """Remove a call, for example when its caller has left; whether it waited."""
        place = self._places.pop(id(call), None)
        if place is None:
            return self._remove_returned(call)
        line, arrival, demand, estimate = place
        del line.entries[bisect_left(line.entries, (demand.deadline, arrival))]
        line.seconds -= estimate.seconds
        tenant = self._waiting[demand.tenant, demand.priority]
        tenant.calls -= 1
        if not line.entries:
            del tenant.lines[line.kind]
            self._forget_kind(line.kind)
        if not tenant.calls:
            del self._waiting[demand.tenant, demand.priority]
        if demand.batch is not None:
            self._forget_alike(call, demand)
        return True

    def take_at_once(self, call: Call) -> None:
        """Charge the tenant of a new call that need not wait, since there is room for it, as if it had waited."""
        demand = call.demand
        tenant = self._tenant(demand)
        tenant.clock = max(tenant.clock, self._clocks[demand.priority])
        if not any(priority == demand.priority for _, priority in self._waiting):
            self._clocks[demand.priority] = tenant.clock
        tenant.clock += call.estimate.seconds / tenant.weight

    def take_before_others(self, call: Call) -> None:
        """Take a waiting call whose turn has come, since there is no room for the calls of other kinds before it."""
        if id(call) in self._places:
            self._move_clock(call.demand.priority)
        self.take(call)

    def take(self, call: Call) -> None:
        """Take a waiting call: it waits no more, and its tenant is charged the expected cost."""
        # The charge comes first: if it raises, the call still waits.
        self.charge(call, call.estimate.seconds)
        self.remove(call)

    def first(self, kinds: Container[Hashable] | None = None) -> Call | None:
        """The call whose turn it is, of all or of these kinds, without taking it; None when no such call waits."""
        for kind, call in reversed(self._returned):
            if kinds is None or kind in kinds:
                return call
        # Arrivals differ, so that calls are never compared.
        heads = [
            (priority, tenant.clock, *line.entries[0])
            for (_, priority), tenant in self._waiting.items()
            for kind, line in tenant.lines.items()
            if kinds is None or kind in kinds
        ]
        return min(heads)[-1] if heads else None

    def one_too_many(self, came: Call) -> Call:
        """The call to refuse when `came` is one call too many: the latest of the tenant with most calls for its weight.

        Looked for in the lowest priority. When that is a call of the same tenant and priority as `came`, it is `came`:
        a call that waits does not give way to an equal.
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
        return came if _key(latest.demand) == _key(came.demand) else latest

    def alike(self, call: Call) -> Iterator[Call]:
        """Calls that wait and could run as one with `call`, by priority and arrival; none may be added or removed."""
        waiting = self._batches.get(call.demand.batch, {})
        return (other for priority in sorted(waiting) for other in waiting[priority].values())

    def charge(self, call: Call, seconds: float) -> None:
        """Charge a call's tenant for what the call has cost beyond what was expected; less than that is negative."""
        tenant = self._tenant(call.demand)
        tenant.clock += seconds / tenant.weight

    def seconds_before(self, call: Call, *, short: bool = False) -> float:
        """Seconds of work expected before a call that has yet to be added. With `short`, of calls that are not long.

        All work of a higher priority; of its own priority, its tenant's calls with an earlier deadline, and the shares
        of the other tenants meanwhile. Calls for async workers and all others do not wait for one another.
        """
        demand, beside = call.demand, call.estimate.beside is not None
        before = own = everyone = others = 0.0
        for (name, priority), tenant in self._waiting.items():
            competes = False
            for line in tenant.lines.values():
                if line.beside is not beside or (short and line.long):
                    continue
                if priority < demand.priority:
                    before += line.seconds
                elif priority == demand.priority and name == demand.tenant:
                    own += _seconds_until(line, demand.deadline)
                elif priority == demand.priority:
                    competes = True
                    everyone += line.seconds
            others += tenant.weight if competes else 0.0
        share = (own + call.estimate.seconds) * others / self._weights.get(demand.tenant, 1.0)
        return before + own + min(everyone, share)

    def _move_clock(self, priority: int) -> None:
        """Move a priority's time on to that of its tenant that is furthest behind."""
        behind = min([tenant.clock for (_, other), tenant in self._waiting.items() if other == priority])
        self._clocks[priority] = max(self._clocks[priority], behind)

    def _remove_returned(self, call: Call) -> bool:
        # The last ones are taken first. There may be thousands, if an async worker has just ended.
        for at in range(len(self._returned) - 1, -1, -1):
            kind, returned = self._returned[at]
            if returned is call:
                del self._returned[at]
                self._forget_kind(kind)
                return True
        return False

    def _forget_kind(self, kind: Hashable) -> None:
        if self._kinds[kind] == 1:
            del self._kinds[kind]
        else:
            self._kinds[kind] -= 1

    def _forget_alike(self, call: Call, demand: Demand) -> None:
        alike = self._batches[demand.batch]
        del alike[demand.priority][id(call)]
        if not alike[demand.priority]:
            del alike[demand.priority]
        if not alike:
            del self._batches[demand.batch]

    def _tenant(self, demand: Demand) -> _Tenant[Call]:
        key = demand.tenant, demand.priority
        tenant = self._tenants.get(key)
        if tenant is None:
            if len(self._tenants) > 2 * len(self._waiting) + _MAX_AWAY:
                self._forget_tenants()
            tenant = self._tenants[key] = _Tenant(self._clocks[demand.priority])
        # Set anew each time: the weights may be others by now.
        tenant.weight = self._weights.get(demand.tenant, 1.0)
        return tenant

    def _forget_tenants(self) -> None:
        """Forget tenants that wait for nothing and are not ahead; beyond the bound, those least ahead too."""
        ahead = [
            (tenant.clock - self._clocks[key[1]], key)
            for key, tenant in self._tenants.items()
            if not tenant.calls and tenant.clock > self._clocks[key[1]]
        ]
        ahead.sort(reverse=True)
        self._tenants = self._waiting | {key: self._tenants[key] for _, key in ahead[:_MAX_AWAY]}


def _key(demand: Demand) -> _Key:
    return demand.tenant, demand.priority


def _seconds_until(line: _Line[Call], deadline: float) -> float:
    """The cost of a line's calls with no later deadline: the share of the whole that they are of its calls."""
    if deadline == math.inf:
        return line.seconds
    return line.seconds * bisect_left(line.entries, (deadline, math.inf)) / len(line.entries)
