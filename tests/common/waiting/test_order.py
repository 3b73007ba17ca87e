"""The order of waiting: priorities, shares, deadlines, and what is predicted from them."""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Container, Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlatch.common.waiting.demand import Beside, Demand, Estimate
from unlatch.common.waiting.order import Policy

INTERACTIVE, NORMAL, BACKGROUND = 0, 1, 2
# The kinds of calls that have room where long calls have none.
SHORT = {False}


class Call:
    """A call as far as the order goes by it."""

    def __init__(
        self,
        *,
        name: str = "",
        priority: int = NORMAL,
        tenant: str = "",
        deadline: float = math.inf,
        cost_seconds: float = 0.0,
        long: bool = False,
        batch: Hashable | None = None,
    ) -> None:
        self.name = name
        self.demand = Demand("k", 0, tenant, priority, deadline, batch)
        self.estimate = Estimate(cost_seconds, long)


def taken(policy: Policy[Call], kinds: Container[Hashable] | None = None) -> Call | None:
    """Take the call whose turn it is, of all or of these kinds."""
    call = policy.first(kinds)
    if call is not None:
        policy.take_before_others(call)
    return call


def order(policy: Policy[Call]) -> list[str]:
    """The names of all that wait, as they are served."""
    names = []
    while (call := taken(policy)) is not None:
        names.append(call.name)
    return names


def filled(*calls: Call) -> Policy[Call]:
    policy = Policy[Call]()
    for call in calls:
        policy.add(call)
    return policy


def test_priority_goes_before_everything() -> None:
    """Interactive calls are served before normal ones and those before background ones, whatever the deadlines."""
    policy = filled(
        Call(name="background", priority=BACKGROUND, deadline=1.0),
        Call(name="normal", deadline=2.0),
        Call(name="interactive", priority=INTERACTIVE),
    )
    assert [call.name for call in policy] == ["interactive", "normal", "background"]
    assert order(policy) == ["interactive", "normal", "background"]


def test_earliest_deadline_is_first_and_then_who_came_first() -> None:
    """Within a tenant and a priority; a call without a deadline comes after all that have one."""
    policy = filled(
        Call(name="never"),
        Call(name="late", deadline=9.0),
        Call(name="soon", deadline=1.0),
        Call(name="soon too", deadline=1.0),
    )
    assert order(policy) == ["soon", "soon too", "late", "never"]


@pytest.mark.parametrize("weights", [{}, {"a": 3.0}, {"a": 1.0, "b": 0.25}])
def test_tenants_share_seconds_by_weight(weights: dict[str, float]) -> None:
    """Of two who always wait each gets its share of the seconds, though one's calls are ten times as long."""
    policy = Policy[Call](weights)
    costs = {"a": 0.1, "b": 0.01}
    used: defaultdict[str, float] = defaultdict(float)
    for tenant, seconds in costs.items():
        for _ in range(100):
            policy.add(Call(tenant=tenant, cost_seconds=seconds))
    for _ in range(5_000):
        call = taken(policy)
        assert call is not None
        used[call.demand.tenant] += call.estimate.seconds
        policy.add(Call(tenant=call.demand.tenant, cost_seconds=costs[call.demand.tenant]))
    shares = {tenant: used[tenant] / weights.get(tenant, 1.0) for tenant in costs}
    assert shares["a"] == pytest.approx(shares["b"], rel=0.02)


def test_what_is_charged_afterwards_counts_as_what_was_expected() -> None:
    """Shares hold where nothing is known beforehand and costs are known only when the runs have ended."""
    policy = Policy[Call]()
    dice = random.Random(1)
    used: defaultdict[str, float] = defaultdict(float)
    running: list[Call] = []
    for tenant in "ab":
        for _ in range(50):
            policy.add(Call(tenant=tenant))
    for _ in range(5_000):
        call = taken(policy)
        assert call is not None
        running.append(call)
        policy.add(Call(tenant=call.demand.tenant))
        if len(running) > 4:
            ended = running.pop(0)
            seconds = dice.uniform(0.5, 1.5) * (0.1 if ended.demand.tenant == "a" else 0.02)
            policy.charge(ended, seconds)
            used[ended.demand.tenant] += seconds
    assert used["a"] == pytest.approx(used["b"], rel=0.05)


def test_weight_may_change_while_a_tenant_waits() -> None:
    """A tenant's new weight decides its share from now on, even if it has waited before."""
    weights = {"a": 1.0, "b": 1.0}
    policy = Policy[Call](weights)

    def shares() -> Counter[str]:
        for tenant in ("a", "b"):
            for _ in range(100):
                policy.add(Call(name=tenant, tenant=tenant, cost_seconds=1.0))
        return Counter(order(policy)[:100])

    assert shares() == {"a": 50, "b": 50}
    weights["a"] = 4.0
    assert abs(shares()["a"] - 80) <= 1


def test_nobody_saves_up_a_share() -> None:
    """A tenant that was away comes back as an equal: neither long before all others, nor after them."""
    policy = filled(*(Call(tenant="busy", cost_seconds=1.0) for _ in range(200)))
    for _ in range(100):
        taken(policy)
    for _ in range(100):
        policy.add(Call(tenant="back", cost_seconds=1.0))
    served = Counter(call.demand.tenant for call in (taken(policy) for _ in range(40)) if call is not None)
    assert served["back"] == pytest.approx(20, abs=1)


def test_who_waits_in_vain_saves_nobody_up_a_share() -> None:
    """Background calls that never get their turn do not hold back the time at which others come."""
    policy = filled(
        Call(tenant="patient", priority=BACKGROUND, cost_seconds=1.0),
        *(Call(tenant="busy", cost_seconds=1.0) for _ in range(200)),
    )
    for _ in range(100):
        taken(policy)
    for _ in range(100):
        policy.add(Call(tenant="new", cost_seconds=1.0))
    served = Counter(call.demand.tenant for call in (taken(policy) for _ in range(40)) if call is not None)
    assert served["new"] == pytest.approx(20, abs=1)


def test_debt_is_not_forgotten_by_leaving() -> None:
    """A tenant whose last call cost much waits for the others' clocks, though it waited for nothing meanwhile."""
    policy = filled(*(Call(name="patient", tenant="patient", cost_seconds=1.0) for _ in range(20)))
    policy.charge(Call(tenant="greedy"), 5.0)
    policy.add(Call(name="greedy", tenant="greedy", cost_seconds=1.0))
    assert order(policy).index("greedy") == pytest.approx(5, abs=1)


def test_tenants_who_left_are_forgotten() -> None:
    """Tenants that come once and never again leave nothing behind that grows with them."""
    policy = Policy[Call]()
    for number in range(10_000):
        call = Call(tenant=str(number), cost_seconds=0.001)
        policy.add(call)
        taken(policy)
        policy.charge(call, 1.0)
    assert len(policy._tenants) < 1_000


def test_call_put_back_is_next_and_may_leave() -> None:
    """Calls put back go before all others, the last one first; one whose caller leaves is dropped."""
    first, second, third = Call(name="first"), Call(name="second"), Call(name="third")
    policy = filled(first, second, third, Call(name="urgent", priority=INTERACTIVE))
    assert taken(policy) is not None
    assert taken(policy) is first
    assert taken(policy) is second
    policy.put_back(second)
    policy.put_back(first)
    assert [call.name for call in policy] == ["first", "second", "third"]
    assert policy.remove(second)
    assert not policy.remove(second)
    assert len(policy) == 2
    assert order(policy) == ["first", "third"]


def test_short_calls_pass_long_ones_where_only_they_may_go() -> None:
    """With `short` long calls are passed over, those put back too, and keep their places."""
    long, returned = Call(name="long", long=True), Call(name="returned", long=True)
    policy = filled(returned)
    assert taken(policy) is returned
    policy.put_back(returned)
    policy.add(long)
    assert taken(policy, SHORT) is None
    policy.add(Call(name="short"))
    call = taken(policy, SHORT)
    assert call is not None
    assert call.name == "short"
    assert order(policy) == ["returned", "long"]


def test_who_can_best_do_without() -> None:
    """The last is of the lowest priority, then of who has most waiting for its weight, then the latest deadline."""
    policy = Policy[Call]({"heavy": 10.0})
    for number in range(3):
        policy.add(Call(name=f"light {number}", tenant="light", deadline=10.0 - number))
    for number in range(9):
        policy.add(Call(name=f"heavy {number}", tenant="heavy"))
    for came, gone in (
        (Call(name="came", tenant="heavy"), "light 0"),
        (Call(name="came", tenant="light", deadline=1.0), "came"),
        (Call(name="came", priority=BACKGROUND), "came"),
        (Call(name="came", priority=INTERACTIVE), "came, in the background"),
    ):
        policy.add(came)
        assert policy.one_too_many(came).name == gone
        policy.remove(came)
        if gone == "came" and came.demand.priority == BACKGROUND:
            policy.add(Call(name="came, in the background", priority=BACKGROUND, tenant="heavy"))


def test_alike_are_those_of_one_batch() -> None:
    """In the order of their arrival, whoever they are from; not who has left or has been taken."""
    calls = [Call(name=str(number), tenant=str(number % 2), batch="k", priority=number % 3) for number in range(6)]
    policy = filled(*calls, Call(name="other", batch="l"), Call(name="alone"))
    policy.remove(calls[3])
    policy.take(calls[4])
    assert [call.name for call in policy.alike(calls[0])] == ["0", "1", "2", "5"]
    assert not list(policy.alike(Call()))


def test_weights_that_are_filled_in_later_count() -> None:
    """A gateway makes its backlog before it reads the file of tenants, whose weights come into the same mapping."""
    weights: dict[str, float] = {}
    policy = Policy[Call](weights)
    weights["heavy"] = 3.0
    for tenant in ("heavy", "light"):
        for number in range(4):
            policy.add(Call(name=tenant, tenant=tenant, deadline=number, cost_seconds=1.0))
    assert Counter(order(policy)[:4]) == {"heavy": 3, "light": 1}


def test_call_that_cannot_be_charged_still_waits() -> None:
    """An exception between charge and removal would leave the call nowhere: neither waiting nor sent."""

    class Weights(dict[str, float]):
        broken = False

        def get(self, *_: object) -> float:
            if self.broken:
                raise ValueError("a mistake")
            return 1.0

    weights = Weights()
    policy = Policy[Call](weights)
    call = Call(name="call")
    policy.add(call)
    for take in (policy.take, policy.take_before_others):
        weights.broken = True
        with pytest.raises(ValueError, match="a mistake"):
            take(call)
        weights.broken = False
        assert list(policy) == [call]
    assert order(policy) == ["call"]


def test_prediction_is_what_is_served_before() -> None:
    """Higher priorities whole, earlier deadlines of one's own, and of others no more than their shares."""
    policy = filled(
        *(Call(priority=INTERACTIVE, cost_seconds=1.0) for _ in range(2)),
        *(Call(tenant="me", deadline=float(number), cost_seconds=1.0) for number in range(10)),
        *(Call(tenant="crowd", cost_seconds=1.0) for _ in range(100)),
        *(Call(priority=BACKGROUND, cost_seconds=100.0) for _ in range(3)),
    )
    late, early = Call(tenant="me", deadline=99.0, cost_seconds=1.0), Call(tenant="me", deadline=-1.0, cost_seconds=1.0)
    assert policy.seconds_before(late) == pytest.approx(2 + 10 + 11)
    assert policy.seconds_before(early) == pytest.approx(2 + 0 + 1)
    assert policy.seconds_before(Call(priority=INTERACTIVE)) == pytest.approx(2)
    policy.add(Call(tenant="me", long=True, cost_seconds=50.0, deadline=0.0))
    assert policy.seconds_before(early, short=True) == pytest.approx(3)


Steps = st.lists(
    st.tuples(st.sampled_from("aanrtpb"), st.integers(0, 2), st.sampled_from("xyz"), st.integers(0, 5), st.booleans()),
    max_size=60,
)


@given(Steps)
def test_nothing_is_lost_and_nothing_comes_twice(steps: list[tuple[str, int, str, int, bool]]) -> None:
    """Whatever is added, taken, put back and removed: each call is in or out, once, and the sums are right."""
    policy = Policy[Call]({"x": 2.0})
    waiting: list[Call] = []
    out: list[Call] = []
    for what, priority, tenant, number, long in steps:
        if what == "a":
            call = Call(
                priority=priority, tenant=tenant, deadline=float(number) if number else math.inf, long=long,
                cost_seconds=0.25, batch=number or None,
            )  # fmt: skip
            policy.add(call)
            waiting.append(call)
        elif what in "nb":
            found = taken(policy, SHORT if what == "b" else None)
            assert (found is None) == (not any(not (what == "b" and call.estimate.long) for call in waiting))
            if found is not None:
                waiting.remove(found)
                out.append(found)
        elif what == "p" and out:
            call = out.pop()
            policy.put_back(call)
            waiting.append(call)
        elif waiting:
            call = waiting.pop(number % len(waiting))
            if what == "r":
                assert policy.remove(call)
            else:
                policy.take(call)
            assert not policy.remove(call)
        assert len(policy) == len(waiting)
        assert {id(call) for call in policy} == {id(call) for call in waiting}
        if policy._places:
            assert policy.one_too_many(waiting[0]) in waiting
    assert policy.seconds() <= 0.25 * len(waiting) + 1e-9


def shared_turns(policy: Policy[Call]) -> Counter[str]:
    """Whose turns the next ten are, of two tenants who have ten calls each that wait."""
    for tenant in ("old", "new"):
        for number in range(10):
            policy.add(Call(tenant=tenant, cost_seconds=1.0, deadline=float(number)))
    return Counter(call.demand.tenant for call in (taken(policy) for _ in range(10)) if call is not None)


def test_what_ran_while_nobody_waited_is_not_held_against_its_tenant() -> None:
    """Calls that found room at once move the time on with their tenant: later it shares as one who has just come."""
    policy = Policy[Call]()
    for _ in range(100):
        policy.take_at_once(Call(tenant="old", cost_seconds=1.0))
    turns = shared_turns(policy)
    assert abs(turns["old"] - turns["new"]) <= 2, turns


def test_turns_out_of_order_move_the_time_on_as_others_do() -> None:
    """Where calls are served as there is room for them, who comes later has saved up no share."""
    policy = Policy[Call]()
    waiting = [Call(tenant="old", cost_seconds=1.0) for _ in range(100)]
    for call in waiting:
        policy.add(call)
    for call in waiting:
        policy.take_before_others(call)
    assert len(policy) == 0
    turns = shared_turns(policy)
    assert abs(turns["old"] - turns["new"]) <= 2, turns


def test_calls_for_async_workers_are_no_work_before_others() -> None:
    """Seconds of calls for one kind of worker do not count as a wait for the other."""
    waits = Call(cost_seconds=5.0)
    waits.estimate = Estimate(5.0, beside=Beside("fetches", 100))
    plain = Call(cost_seconds=1.0)
    policy = Policy[Call](kind=lambda call: call.estimate.beside)
    policy.add(waits)
    policy.add(plain)
    another = Call(cost_seconds=1.0)
    assert policy.seconds_before(another) == 1.0
    another.estimate = waits.estimate
    assert policy.seconds_before(another) == 5.0
