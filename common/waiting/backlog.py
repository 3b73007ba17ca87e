"""The backlog: calls that wait. In a gateway they wait for room at a replica, in a replica for a worker.

    refusal_in_time ──> add ──────────────> waits ──> next ──> Send: to its place
      └ refused: it could   └ Refuse: one     │         └ Refuse: it would be done too late
        not be in time        call too many   └ refusals ──> Refuse: there is no place for its kind any more

The policy chooses the next call (common/waiting/order.py), and the forecast predicts run times
(common/waiting/forecast.py). The backlog only decides: it returns the calls to send, and the calls to refuse with their
errors. Its owner (the fleet or the dispatcher) carries the decisions out.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from copy import copy
from itertools import islice
from time import monotonic
from typing import Generic, NamedTuple, TypeVar

from unlatch.common.errors import DeadlineExceeded, ResourceExhausted, UnlatchError
from unlatch.common.waiting.forecast import Forecast
from unlatch.common.waiting.order import Policy, Waiting, by_length

Entry = TypeVar("Entry", bound=Waiting)
Place = TypeVar("Place")

# A prediction is a mean, and a call that is done too late has kept a worker from a call that would have been in time.
# So this many times the predicted seconds must fit before the deadline. The margin costs nothing under overload.
MARGIN = 1.25
_SHORTEST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 0.01, 10.0


def retry_milliseconds(seconds: float) -> int:
    """How long a refused caller is told to wait when room is expected in `seconds`."""
    return round(min(max(seconds, _SHORTEST_RETRY_SECONDS), _LONGEST_RETRY_SECONDS) * 1e3)


class Send(NamedTuple, Generic[Entry, Place]):
    """The decision to send a call to a place. The call has left the backlog."""

    entry: Entry
    place: Place


class Refuse(NamedTuple, Generic[Entry]):
    """The decision to refuse a call. The call has left the backlog, and its tenant is not charged."""

    entry: Entry
    error: UnlatchError


class Backlog(Generic[Entry]):
    """Hold the calls that wait, and decide which one is sent or refused next.

    `reply_seconds` is the expected time of a call beyond its wait and its run. `kind` groups calls: either all calls of
    a kind can find room, or none. `max_calls` trades memory and waiting against refusals; `full` makes the error for a
    call beyond it. `caught` makes the error for a call about which the owner's code has raised an exception.
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
        # The kinds of the calls that wait: a live view.
        self.kinds = self._policy.kinds
        self._reply_seconds = reply_seconds
        self._caught = caught
        self._max_calls = max_calls
        self._full = full
        self._shut: UnlatchError | None = None

    def __len__(self) -> int:
        return len(self._policy)

    @property
    def is_shut(self) -> bool:
        """Whether new calls are refused."""
        return self._shut is not None

    def seconds(self, *, short: bool = False) -> float:
        """Return the expected cost of all calls that wait. With `short`, of those that are not long."""
        return self._policy.seconds(short=short)

    def seconds_before(self, entry: Entry, *, short: bool = False) -> float:
        """Return the seconds of work before a call that is not added yet. With `short`, of calls that are not long."""
        return self._policy.seconds_before(entry, short=short)

    def refusal_in_time(
        self, entry: Entry, *, wait_seconds: float, run_seconds: float
    ) -> ResourceExhausted | DeadlineExceeded | None:
        """Return the error for a new call that could not wait, run and be answered in time; None if it could."""
        demand = entry.demand
        left_seconds = demand.deadline - monotonic()
        needed = MARGIN * (wait_seconds + run_seconds) + self._reply_seconds
        # A call that finds an idle worker may try, whatever is expected of it: else nothing new would ever be learned.
        if not wait_seconds or needed <= left_seconds:
            return None
        if left_seconds <= 0:
            return DeadlineExceeded(f"the deadline passed before kernel {demand.kernel} could be begun")
        if MARGIN * run_seconds + self._reply_seconds > left_seconds:
            self.forecast.doubt(demand.kernel, demand.size)
        return ResourceExhausted(
            f"kernel {demand.kernel} would be done in {needed:.2g} s, with what waits before it, and the deadline is "
            f"in {left_seconds:.2g} s",
            retry_after_milliseconds=retry_milliseconds(needed - left_seconds),
        )

    def add(self, entry: Entry) -> Refuse[Entry] | None:
        """Add a call. Returns a call to refuse if too many wait, or this call if the backlog is shut."""
        if self._shut is not None:
            return Refuse(entry, copy(self._shut))
        self._policy.add(entry)
        if len(self._policy) <= self._max_calls:
            return None
        refused = self._policy.one_too_many(entry)
        self._policy.remove(refused)
        return Refuse(refused, self._full())

    def take_at_once(self, entry: Entry) -> None:
        """Charge the tenant of a new call that is sent at once, because there is room for it."""
        self._policy.take_at_once(entry)

    def next(
        self,
        kinds: set[Hashable],
        place_of: Callable[[Entry], Place | None],
        seconds_until_done: Callable[[Entry, Place], float],
    ) -> Send[Entry, Place] | Refuse[Entry] | None:
        """Decide about the next call among the `kinds` with room; None if no waiting call finds room.

        `place_of` returns the place for a call. If it returns None, the call's kind has no room after all: the kind is
        removed from `kinds`, and the other kinds go on. A call that would be done too late is refused, because it must
        not occupy a worker that could finish another call in time. `seconds_until_done` returns 0 for a call that may
        run even if it could be late.
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
                late = f"the deadline passed, or would have, while kernel {entry.demand.kernel} waited"
                return Refuse(entry, DeadlineExceeded(late))
            self._policy.take_before_others(entry)
            return Send(entry, place)
        return None

    def alike(self, entry: Entry) -> Iterator[Entry]:
        """Return waiting calls that could run as one with `entry`, by priority and arrival.

        Add and remove no calls while the iterator is used.
        """
        return self._policy.alike(entry)

    def take(self, entry: Entry) -> None:
        """Remove a call that is sent in a batch with another call, and charge its tenant the expected cost."""
        self._policy.take(entry)

    def take_out(self, fits: Callable[[Entry], bool], at_most: int) -> list[Entry]:
        """Remove and return the first calls for which `fits` is true, `at_most` so many."""
        found = list(islice(filter(fits, self._policy), at_most))
        for entry in found:
            self._policy.remove(entry)
        return found

    def withdraw(self, entry: Entry) -> bool:
        """Remove a call whose caller has left. Returns whether the call was waiting here."""
        return self._policy.remove(entry)

    def put_back(self, entry: Entry) -> Refuse[Entry] | None:
        """Put back a call whose turn it was, at the head of the backlog, even beyond `max_calls`.

        Returns the call, to be refused, if the backlog is shut.
        """
        if self._shut is not None:
            self.not_run(entry)
            return Refuse(entry, copy(self._shut))
        self._policy.put_back(entry)
        return None

    def put_back_after_run(self, entry: Entry) -> Refuse[Entry] | None:
        """Put back a call that has run and will run again. Its tenant stays charged for the first run."""
        # Putting it back refunds the expected cost, which `ran` has settled already.
        self._policy.charge(entry, entry.estimate.seconds)
        return self.put_back(entry)

    def not_run(self, entry: Entry) -> None:
        """Refund the expected cost of a call that was taken but did not run."""
        self._policy.charge(entry, -entry.estimate.seconds)

    def ran(self, entry: Entry, cost_seconds: float) -> None:
        """Charge the real cost of a call, minus the expected cost, which is charged already."""
        self._policy.charge(entry, cost_seconds - entry.estimate.seconds)

    def shut(self, error: UnlatchError | None) -> None:
        """Refuse all new calls; None opens the backlog again. `refusals_while_shut` refuses those that wait."""
        self._shut = error

    def refusals(self, error_of: Callable[[Hashable], UnlatchError | None]) -> Iterator[Refuse[Entry]]:
        """Refuse the calls of every kind for which `error_of` returns an error, one after another.

        Calls may be added and removed between two steps, because each step looks up the next call.
        """
        errors = {kind: error for kind in self.kinds if (error := error_of(kind)) is not None}
        while (entry := self._policy.first(errors)) is not None:
            error = errors[self._policy.kind_of(entry)]
            self._policy.remove(entry)
            yield Refuse(entry, copy(error))

    def refusals_while_shut(self) -> Iterator[Refuse[Entry]]:
        """Refuse the waiting calls, one after another, as long as the backlog is shut."""
        while (error := self._shut) is not None and (entry := self._policy.first()) is not None:
            self._policy.remove(entry)
            yield Refuse(entry, copy(error))
