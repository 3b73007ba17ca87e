"""The backlog: which calls are sent, which are refused and why, and what their tenants are charged."""

import math
from collections.abc import Hashable

import pytest

from unlatch.common.errors import DeadlineExceeded, Internal, ResourceExhausted, Unavailable
from unlatch.common.waiting.backlog import Backlog, Refuse, Send
from unlatch.common.waiting.demand import Demand, Estimate

PLACE = "worker"
NOW = 1000.0


@pytest.fixture(autouse=True)
def clock_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a test may stand still itself, and that counts for no call's wait."""
    monkeypatch.setattr("unlatch.common.waiting.backlog.monotonic", lambda: NOW)


class Call:
    """A call of one second."""

    def __init__(
        self, name: str, *, seconds: float = 1.0, long: bool = False, deadline: float = math.inf, priority: int = 1
    ) -> None:
        self.name = name
        self.demand = Demand("k", 1000, "tenant", priority, deadline)
        self.estimate = Estimate(seconds, long)


def internal(error: Exception) -> Internal:
    return Internal(f"caught {error}")


def filled(*calls: Call, max_calls: float = math.inf) -> Backlog[Call]:
    backlog = Backlog[Call](
        {}, reply_seconds=0.0, caught=internal, max_calls=max_calls, full=lambda: ResourceExhausted("it is full")
    )
    for call in calls:
        assert backlog.add(call) is None
    return backlog


def turns(backlog: Backlog[Call], kinds: set[Hashable] | None = None, seconds: float = 0.0) -> list[str]:
    """Return the decisions while there is room for these kinds: a call's name, or its error's status."""
    roomy: set[Hashable] = {True, False} if kinds is None else kinds
    found = []
    while (turn := backlog.next(roomy, lambda _: PLACE, lambda *_: seconds)) is not None:
        found.append(turn.entry.name if isinstance(turn, Send) else turn.error.status)
    return found


def charged(backlog: Backlog[Call]) -> float:
    return sum(tenant.clock for tenant in backlog._policy._tenants.values())


def test_call_is_sent_to_its_place_and_charged() -> None:
    """The call whose turn it is, with the place that was found for it."""
    first, second = Call("first"), Call("second")
    backlog = filled(first, second)
    assert backlog.next({False}, lambda _: PLACE, lambda *_: 0.0) == Send(first, PLACE)
    assert len(backlog) == 1
    assert charged(backlog) == 1.0
    backlog.ran(first, 3.0)
    assert charged(backlog) == 3.0
    assert turns(backlog) == ["second"]
    assert backlog.next({False}, lambda _: PLACE, lambda *_: 0.0) is None


def test_kind_without_room_does_not_hold_up_the_others() -> None:
    """Whether its room was known to be gone, or no place is found for its first call."""
    backlog = filled(Call("long", long=True, deadline=NOW + 9.0), Call("short"))
    assert backlog.kinds == {True, False}
    assert turns(backlog, {False}) == ["short"]
    backlog.add(Call("another"))
    roomy: set[Hashable] = {True, False}
    turn = backlog.next(roomy, lambda call: None if call.estimate.long else PLACE, lambda *_: 0.0)
    assert isinstance(turn, Send)
    assert turn.entry.name == "another"
    assert roomy == {False}
    assert len(backlog) == 1


@pytest.mark.parametrize(
    ("left", "seconds", "decided"),
    [
        (-1.0, 0.0, "DEADLINE_EXCEEDED"),
        (1.0, 0.0, "call"),
        (1.0, 0.7, "call"),
        (1.0, 0.9, "DEADLINE_EXCEEDED"),
        (math.inf, 1e9, "call"),
    ],
)
def test_call_that_would_be_done_too_late_is_refused(left: float, seconds: float, decided: str) -> None:
    """By its deadline, with a quarter of the prediction as margin; a refused call costs its tenant nothing."""
    backlog = filled(Call("call", deadline=NOW + left))
    assert turns(backlog, seconds=seconds) == [decided]
    assert charged(backlog) == (1.0 if decided == "call" else 0.0)
    assert not len(backlog)


def test_call_whose_place_cannot_be_found_by_a_mistake_is_refused() -> None:
    """With the error that the mistake is told as; the next call has its turn all the same."""
    backlog = filled(Call("wrong"), Call("right"))

    def place_of(call: Call) -> str:
        if call.name == "wrong":
            raise ValueError("a mistake")
        return PLACE

    turn = backlog.next({False}, place_of, lambda *_: 0.0)
    assert isinstance(turn, Refuse)
    assert (turn.entry.name, str(turn.error)) == ("wrong", "caught a mistake")
    assert turns(backlog) == ["right"]


def test_one_call_too_many_is_refused() -> None:
    """The one that can best do without: not the new one, if it is of a higher priority."""
    waiting, urgent, late = Call("waiting"), Call("urgent", priority=0), Call("late")
    backlog = filled(waiting, max_calls=1)
    refused = backlog.add(late)
    assert refused is not None
    assert (refused.entry, str(refused.error)) == (late, "it is full")
    refused = backlog.add(urgent)
    assert refused is not None
    assert refused.entry is waiting
    assert turns(backlog) == ["urgent"]


def test_shut_backlog_refuses_what_waits_and_what_comes() -> None:
    """And what comes back from a worker, which has cost its tenant nothing; until it is opened again."""
    out, waiting = Call("out"), Call("waiting")
    backlog = filled(out)
    assert turns(backlog) == ["out"]
    backlog.add(waiting)
    backlog.shut(Unavailable("no workers"))
    refused = [backlog.add(Call("new")), backlog.put_back(out), *backlog.refusals_while_shut()]
    assert [(one.entry.name, str(one.error)) for one in refused if one is not None] == [
        ("new", "no workers"),
        ("out", "no workers"),
        ("waiting", "no workers"),
    ]
    assert len({id(one.error) for one in refused if one is not None}) == 3, "each caller has an error of its own"
    assert charged(backlog) == 0.0
    backlog.shut(None)
    assert backlog.add(waiting) is None
    assert not list(backlog.refusals_while_shut())
    assert turns(backlog) == ["waiting"]


def test_call_put_back_is_next_and_is_charged_once() -> None:
    """Before all others. One that was run once has its first run charged as well."""
    backlog = filled(Call("first"), Call("second"))
    turn = backlog.next({False}, lambda _: PLACE, lambda *_: 0.0)
    assert isinstance(turn, Send)
    first = turn.entry
    assert backlog.put_back(first) is None
    assert charged(backlog) == 0.0
    assert backlog.next({False}, lambda _: PLACE, lambda *_: 0.0) == turn
    backlog.ran(first, 5.0)
    backlog.put_back_after_run(first)
    assert charged(backlog) == 5.0
    assert turns(backlog) == ["first", "second"]


def test_calls_of_kinds_without_a_place_are_refused() -> None:
    """Those alone, and also calls that come or leave between two refusals."""
    long = [Call(str(number), long=True) for number in range(4)]
    backlog = filled(*long[:3], Call("short"))
    refusals = backlog.refusals(lambda kind: Unavailable("it is gone") if kind is True else None)
    refused = [next(refusals)]
    assert backlog.withdraw(long[1])
    backlog.add(long[3])
    refused += refusals
    assert [one.entry.name for one in refused] == ["0", "2", "3"]
    assert turns(backlog) == ["short"]


def test_new_call_that_cannot_be_in_time_is_refused_before_it_waits() -> None:
    """With when to come back; one that finds an idle worker may try."""
    backlog = filled()
    call = Call("call", deadline=NOW + 1.0)
    assert backlog.refusal_in_time(call, wait_seconds=0.0, run_seconds=9.0) is None
    assert backlog.refusal_in_time(call, wait_seconds=0.5, run_seconds=0.1) is None
    refusal = backlog.refusal_in_time(call, wait_seconds=2.0, run_seconds=0.1)
    assert isinstance(refusal, ResourceExhausted)
    assert refusal.retry_after_milliseconds == pytest.approx(1625, abs=20)


def test_new_call_whose_deadline_has_passed_is_late() -> None:
    """More room would not have helped, so the error does not say when to try again. The forecast is not doubted."""
    backlog = filled()
    backlog.forecast.learn("k", 1000, 0.1)
    call = Call("call", deadline=NOW - 1e-5)
    refusal = backlog.refusal_in_time(call, wait_seconds=0.5, run_seconds=0.1)
    assert isinstance(refusal, DeadlineExceeded)
    assert str(refusal) == "the deadline passed before kernel k could be begun"
    assert backlog.forecast.expected("k", 1000) == 0.1


def test_calls_are_taken_out_and_in_company() -> None:
    """Calls that fit are taken out, in order and uncharged; calls that run with another one are charged."""
    calls = [Call(str(number)) for number in range(4)]
    backlog = filled(*calls)
    assert backlog.take_out(lambda call: call.name != "1", 2) == [calls[0], calls[2]]
    assert charged(backlog) == 0.0
    backlog.take(calls[1])
    assert charged(backlog) == 1.0
    assert turns(backlog) == ["3"]


def test_late_call_is_told_that_it_waited_too_long() -> None:
    """The error names the kernel."""
    backlog = filled(Call("call", deadline=NOW - 1.0))
    turn = backlog.next({False}, lambda _: PLACE, lambda *_: 0.0)
    assert isinstance(turn, Refuse)
    assert isinstance(turn.error, DeadlineExceeded)
    assert str(turn.error) == "the deadline passed, or would have, while kernel k waited"
