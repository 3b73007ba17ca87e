"""The backlog: calls that wait, in a gateway for room at a replica, in a replica for a worker.

    refusal_in_time ──> add ──────────────> waits ──> next ──> Send: to its place
      └ refused: it could   └ Refuse: one     │         └ Refuse: it would be done too late
        not be in time        call too many   └ refusals ──> Refuse: there is no place for its kind any more

The policy says which call is next (common/waiting/order.py), the forecast what runs take (common/waiting/forecast.py).
The backlog decides, and changes nothing but itself: it returns the calls to send, and those to refuse and with which
error. Its owner performs that.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from copy import copy
from itertools import islice
from time import monotonic
from typing import Generic, NamedTuple, TypeVar

from unlatch.common.errors import ResourceExhausted, UnlatchError
from unlatch.common.waiting.admission import MARGIN, refusal_in_time, too_late
from unlatch.common.waiting.forecast import Forecast
from unlatch.common.waiting.order import Policy, Waiting, by_length

Entry = TypeVar("Entry", bound=Waiting)
Place = TypeVar("Place")


class Send(NamedTuple, Generic[Entry, Place]):
    """The decision to send a call, which waits no more, to a place."""

    entry: Entry
    place: Place


class Refuse(NamedTuple, Generic[Entry]):
    """The decision to refuse a call, which waits no more and has cost its tenant nothing."""

    entry: Entry
    error: UnlatchError


class Backlog(Generic[Entry]):
    """The calls that wait. `caught` makes the error that a call is refused with from an exception of its owner's code.

    `reply_seconds` is what a call is expected to take beyond its wait and its run. `kind` tells which calls find room
    together. `max_calls` trades memory and waiting against refusals; `full` makes the error of a call beyond it.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        reply_seconds: float,
        caught: Callable[[Exception], UnlatchError],
        kind: Callable[[Entry], Hashable] = by_length,
        max_calls: float = math.inf,
        full: Callable[[], ResourceExhausted] = lambda: ResourceExhausted("too many calls wait"),
    ) -> None:
        self.forecast = Forecast()
        self._policy = Policy[Entry](weights, kind)
        # The kinds of the calls that wait, as they are at any time.
        self.kinds = self._policy.kinds
        self._reply_seconds = reply_seconds
        self._caught = caught
        self._max_calls = max_calls
        self._full = full
        self._shut: UnlatchError | None = None

    def __len__(self) -> int:
        return len(self._policy)

    def seconds(self, *, short: bool = False) -> float:
        """The expected cost of all calls that wait. With `short`, of those that are not long."""
        return self._policy.seconds(short=short)

    def seconds_before(self, entry: Entry, *, short: bool = False) -> float:
        """Seconds of work expected before a call that has yet to be added. With `short`, of calls that are not long."""
        return self._policy.seconds_before(entry, short=short)

    def refusal_in_time(self, entry: Entry, *, wait_seconds: float, run_seconds: float) -> ResourceExhausted | None:
        """The refusal of a new call that could not wait, run and be answered before its deadline; None if it could."""
        if not wait_seconds:
            # It finds an idle worker, and may try.
            return None
        demand = entry.demand
        return refusal_in_time(
            demand,
            self.forecast,
            wait_seconds=wait_seconds,
            run_seconds=run_seconds,
            reply_seconds=self._reply_seconds,
            left_seconds=demand.deadline - monotonic(),
        )

    def add(self, entry: Entry) -> Refuse[Entry] | None:
        """Let a call wait. Returns a call to refuse when too many wait, or this one when the backlog is shut."""
        if self._shut is not None:
            return Refuse(entry, copy(self._shut))
        self._policy.add(entry)
        if len(self._policy) <= self._max_calls:
            return None
        refused = self._policy.one_too_many(entry)
        self._policy.remove(refused)
        return Refuse(refused, self._full())

    def take_at_once(self, entry: Entry) -> None:
        """Charge the tenant of a new call that need not wait, since there is room for it."""
        self._policy.take_at_once(entry)

    def next(
        self,
        kinds: set[Hashable],
        place_of: Callable[[Entry], Place | None],
        seconds_until_done: Callable[[Entry, Place], float],
    ) -> Send[Entry, Place] | Refuse[Entry] | None:
        """Decide about the call whose turn it is, of those `kinds` that have room; None when no such call has room.

        `place_of` says where a call goes. None means that its kind has no room after all: the kind is removed from
        `kinds`, and does not hold up the others. A call that would be done too late is refused: it must not keep a
        worker from a call that would be in time. `seconds_until_done` is 0 for a call that may try all the same.
        """
        while kinds and (entry := self._policy.first(kinds)) is not None:
            try:
                place = place_of(entry)
                if place is None:
                    kinds.discard(self._policy.kind_of(entry))
                    continue
                deadline = entry.demand.deadline
                is_late = deadline < math.inf and (deadline - monotonic() < MARGIN * seconds_until_done(entry, place))
            except Exception as error:  # noqa: BLE001 (the call that cannot be placed fails, the others go on)
                self._policy.remove(entry)
                return Refuse(entry, self._caught(error))
            if is_late:
                self._policy.remove(entry)
                return Refuse(entry, too_late(entry.demand.kernel))
            self._policy.take_before_others(entry)
            return Send(entry, place)
        return None

    def alike(self, entry: Entry) -> Iterator[Entry]:
        """Calls that wait and could run as one with `entry`, by priority and arrival; none may be added or removed."""
        return self._policy.alike(entry)

    def take(self, entry: Entry) -> None:
        """Take a call that is sent in the company of another: its tenant is charged the expected cost."""
        self._policy.take(entry)

    def take_out(self, fits: Callable[[Entry], bool], at_most: int) -> list[Entry]:
        """Remove the first calls that fit, at most so many, and return them."""
        found = list(islice(filter(fits, self._policy), at_most))
        for entry in found:
            self._policy.remove(entry)
        return found

    def withdraw(self, entry: Entry) -> bool:
        """Remove a call whose caller has left; whether it waited."""
        return self._policy.remove(entry)

    def put_back(self, entry: Entry) -> Refuse[Entry] | None:
        """Let a call whose turn it was wait again, before all others. No bound stops it: it has waited its turn.

        Returns the call to refuse when the backlog is shut.
        """
        if self._shut is not None:
            self.not_run(entry)
            return Refuse(entry, copy(self._shut))
        self._policy.put_back(entry)
        return None

    def put_back_after_run(self, entry: Entry) -> Refuse[Entry] | None:
        """Let a call that was run wait again, to run once more: what its first run cost stays charged."""
        # Putting it back refunds the expected cost, which `ran` has settled already.
        self._policy.charge(entry, entry.estimate.seconds)
        return self.put_back(entry)

    def not_run(self, entry: Entry) -> None:
        """Refund the expected cost of a call whose turn it was and which is not run after all."""
        self._policy.charge(entry, -entry.estimate.seconds)

    def ran(self, entry: Entry, cost_seconds: float) -> None:
        """Settle what a call has cost, of which the expected cost is charged already."""
        self._policy.charge(entry, cost_seconds - entry.estimate.seconds)

    def shut(self, error: UnlatchError | None) -> None:
        """Refuse every call that comes from now on; None opens the backlog again. `refusals` ends those that wait."""
        self._shut = error

    def refusals(self, error_of: Callable[[Hashable], UnlatchError | None]) -> Iterator[Refuse[Entry]]:
        """Refuse the calls of every kind that `error_of` has an error for, one after another.

        Calls may come and go between two of them: which call is next is looked up each time.
        """
        errors = {kind: error for kind in self.kinds if (error := error_of(kind)) is not None}
        while (entry := self._policy.first(errors)) is not None:
            error = errors[self._policy.kind_of(entry)]
            self._policy.remove(entry)
            yield Refuse(entry, copy(error))

    def refusals_while_shut(self) -> Iterator[Refuse[Entry]]:
        """Refuse the calls that wait, one after another, as long as the backlog is shut."""
        while (error := self._shut) is not None and (entry := self._policy.first()) is not None:
            self._policy.remove(entry)
            yield Refuse(entry, copy(error))
