"""Quotas that hold for all units together: buckets, gauges, the file of tenants, and real processes that are killed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlatch.common.errors import ResourceExhausted
from unlatch.common.lane.held_bytes import HeldBytes
from unlatch.common.rates import TokenBucket
from unlatch.gateway.tenants.quotas import QuotaLimits, Tenant
from unlatch.gateway.tenants.shared_quotas import SharedBucket, UnitTenant
from unlatch.gateway.tenants.shared_usage import SharedUsage, UsageTable
from unlatch.gateway.tenants.tenants import Tenants

# Nothing is rounded: all times and amounts are multiples of powers of two.
RATE, CAPACITY = 4.0, 8.0


@contextmanager
def table_of(units: int) -> Iterator[UsageTable]:
    """A table for this number of units."""
    table = UsageTable(units)
    try:
        yield table
    finally:
        table.close()


def unit_of(table: UsageTable, unit: int, units: int) -> SharedUsage:
    """The table as a unit has it, from its start on."""
    return SharedUsage(os.dup(table.fd), unit, units)


def bucket_of(usage: SharedUsage, now: float) -> SharedBucket:
    """A tenant's bucket in a unit."""
    opened = usage.open("tenant")
    assert opened is not None
    opened.limit(1)
    return SharedBucket(RATE, CAPACITY, now, opened, "calls")


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["take_one", "take_one", "take_one", "take", "wait", "restart"]),
            st.integers(0, 2),
            st.integers(1, 24),
        ),
        max_size=80,
    )
)
def test_buckets_of_units_agree_with_one(events: Sequence[tuple[str, int, int]]) -> None:
    """Whichever units take tokens, and however late they look, each has what one bucket for all would have.

    A unit that dies and starts again has neither a full bucket nor an empty one.
    """
    now = 64.0
    one = TokenBucket(RATE, CAPACITY, now)
    with table_of(3) as table:
        buckets = [bucket_of(unit_of(table, unit, 3), now) for unit in range(3)]
        for event, unit, number in events:
            bucket = buckets[unit]
            if event == "wait":
                now += number / 8
            elif event == "take":
                bucket.take(number / 2, now)
                one.take(number / 2, now)
            elif event == "take_one":
                assert bucket.take_one(now) == one.take_one(now)
            else:
                table.leave(unit)
                buckets[unit] = bucket_of(unit_of(table, unit, 3), now)
        assert [bucket.left(now) for bucket in buckets] == [one.left(now)] * 3


def tenant_of(usage: SharedUsage, now: float = 0.0, **limits: float) -> UnitTenant:
    """A tenant with these limits, in a unit."""
    known = QuotaLimits.model_validate(limits)
    return UnitTenant("acme", "acme", known, now, HeldBytes(), usage, "acme")


def refusal(refused: Callable[[], object]) -> ResourceExhausted:
    """Return the error of what is refused."""
    with pytest.raises(ResourceExhausted) as caught:
        refused()
    assert caught.value.quota == "tenant:acme"
    return caught.value


def test_calls_in_flight_of_all_units_count() -> None:
    """The limit holds for their sum, as soon as a call begins or ends anywhere."""
    with table_of(2) as table:
        here, there = (tenant_of(unit_of(table, unit, 2), calls_in_flight=3) for unit in range(2))
        here.in_flight += 2
        there.admit(0.0)
        there.in_flight += 1
        assert "calls_in_flight=3" in refusal(lambda: there.admit(0.0)).message
        refusal(lambda: here.admit(0.0))
        here.in_flight -= 1
        there.admit(0.0)
        assert (here.in_flight, there.in_flight) == (1, 1)


def test_lanes_of_all_units_count() -> None:
    """A tenant may open no lane at one unit while it has its lanes at another."""
    with table_of(2) as table:
        here, there = (tenant_of(unit_of(table, unit, 2), lanes=2) for unit in range(2))
        here.lanes += 2
        assert "lanes=2" in refusal(lambda: there.check_lane(100, 0)).message
        here.lanes -= 1
        there.check_lane(100, 0)


def test_bytes_in_all_units_count() -> None:
    """The error says how many bytes all units hold."""
    with table_of(2) as table:
        here, there = (tenant_of(unit_of(table, unit, 2), live_bytes=100) for unit in range(2))
        here.held.hold(70)
        there.held.hold(20)
        assert "hold 90 of live_bytes=100" in refusal(lambda: there.held.check(11)).message
        there.held.charge(10)
        assert there.held.is_full
        here.held.free(70)
        assert (there.held.held, there.held.most) == (30, 100)


def test_share_of_bytes_is_of_the_units_own_bound() -> None:
    """A tenant with another quota may hold half of its unit's bound, whatever it holds at the others."""
    with table_of(2) as table:
        here, there = (tenant_of(unit_of(table, unit, 2), lanes=2) for unit in range(2))
        for tenant in (here, there):
            tenant.held.counts[1].max_bytes = 100
        here.held.hold(50)
        there.held.hold(50)
        assert "hold 50 of live_bytes=50" in refusal(lambda: there.held.check(1)).message


def test_processor_seconds_of_all_units_count() -> None:
    """A tenant that has overdrawn its time at one unit waits at each. A refusal takes nothing."""
    with table_of(2) as table:
        here, there = (
            tenant_of(unit_of(table, unit, 2), cpu_seconds_per_minute=60, calls_per_second=2) for unit in range(2)
        )
        here.charge(61.0, 0.0)
        for tenant in (here, there) * 5:
            refusal(lambda: tenant.admit(0.0))  # noqa: B023 (called at once)
        for tenant in (here, there):
            tenant.admit(2.0)
        assert "calls_per_second=2" in refusal(lambda: here.admit(2.0)).message


def test_limits_of_a_tenant_change_at_one_unit_after_the_other() -> None:
    """New limits begin with a full bucket, also where a unit still counts by the old ones. Calls in flight stay."""
    with table_of(2) as table:
        here, there = (tenant_of(unit_of(table, unit, 2), cpu_seconds_per_minute=1) for unit in range(2))
        for tenant in (here, there):
            tenant.charge(1000.0, 0.0)
            tenant.in_flight = 1
        raised = QuotaLimits(cpu_seconds_per_minute=60, calls_in_flight=2)
        here.limit(raised, 0.0)
        assert "calls_in_flight" in refusal(lambda: here.admit(0.0)).message
        there.in_flight = 0
        here.admit(0.0)
        there.limit(raised, 0.0)
        for tenant in (here, there):
            tenant.admit(0.0)
        there.limit(QuotaLimits(), 0.0)
        here.limit(QuotaLimits(calls_in_flight=1), 0.0)
        refusal(lambda: here.admit(0.0))


def take(tenants: Tenants, text: str) -> None:
    """Take a file of tenants."""
    tenants._take(text.encode())


def test_file_of_tenants_is_read_again() -> None:
    """A tenant whose limits stay keeps its calls. A tenant that leaves the file takes its calls out of the sums."""
    file = "[tenants.acme]\ncalls_in_flight = 1\n"
    with table_of(2) as table:
        here, there = (Tenants("", HeldBytes(), usage=unit_of(table, unit, 2)) for unit in range(2))
        for tenants in (here, there):
            take(tenants, file)
        gone = here.of("acme")
        gone.in_flight += 1
        refusal(lambda: there.of("acme").admit(0.0))
        take(here, f"{file}[default]")
        refusal(lambda: there.of("acme").admit(0.0))
        with pytest.raises(ValueError, match="also belongs"):
            take(here, f"{file}[tenants.carl]\nidentities = ['acme']")
        refusal(lambda: there.of("acme").admit(0.0))
        take(here, "[default]")
        there.of("acme").admit(0.0)
        # Its call ends now, and counts in no cell.
        gone.in_flight -= 1
        take(here, file)
        assert here.of("acme").in_flight == 0


def test_callers_without_a_table_count_at_all_units() -> None:
    """Each by its own identity, also while a table has its name at one unit already."""
    with table_of(2) as table:
        here, there = (Tenants("", HeldBytes(), usage=unit_of(table, unit, 2)) for unit in range(2))
        for tenants in (here, there):
            take(tenants, "[default]\ncalls_in_flight = 1")
        here.of("carl").in_flight += 1
        with pytest.raises(ResourceExhausted):
            there.of("carl").admit(0.0)
        there.of("anna").admit(0.0)
        take(there, "[default]\ncalls_in_flight = 1\n[tenants.carl]\nidentities = ['anna']\ncalls_in_flight = 1")
        there.of("anna").admit(0.0)
        with pytest.raises(ResourceExhausted):
            there.of("carl").admit(0.0)


def test_callers_that_are_forgotten_leave_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgotten callers make room for others."""
    monkeypatch.setattr("unlatch.gateway.tenants.tenants._MAX_OTHERS", 4)
    monkeypatch.setattr("unlatch.gateway.tenants.shared_usage._WINDOW", 4)
    monkeypatch.setattr("unlatch.gateway.tenants.shared_usage._ROWS", 5)
    with table_of(1) as table:
        tenants = Tenants("", HeldBytes(), usage=unit_of(table, 0, 1))
        take(tenants, "[default]\nlanes = 1")
        for number in range(20):
            tenant = tenants.of(str(number))
            assert isinstance(tenant, UnitTenant)
            assert tenant._usage is not None


def test_tenants_without_quotas_are_not_in_the_table() -> None:
    """Nor is there a table without units."""
    with table_of(1) as table:
        tenant = Tenants("", HeldBytes(), usage=unit_of(table, 0, 1)).of("")
        assert isinstance(tenant, UnitTenant)
        assert tenant._usage is None
    assert type(Tenants("", HeldBytes()).of("")) is Tenant


# A unit's process: it has a tenant with quotas in the table, and does with it what follows.
PROCESS = """
import sys
from time import monotonic
from unlatch.common.errors import ResourceExhausted
from unlatch.common.lane.held_bytes import HeldBytes
from unlatch.gateway.tenants.quotas import QuotaLimits
from unlatch.gateway.tenants.shared_quotas import UnitTenant
from unlatch.gateway.tenants.shared_usage import SharedUsage

limits = QuotaLimits.model_validate_json(sys.argv[1])
usage = SharedUsage(*map(int, sys.argv[2:]))
tenant = UnitTenant("acme", "acme", limits, monotonic(), HeldBytes(), usage, "acme")

def admitted():
    global now
    now = monotonic()
    try:
        tenant.admit(now)
    except ResourceExhausted:
        return False
    return True

print("ready", flush=True)
sys.stdin.readline()
"""


class Unit:
    """A process that counts as a unit, and does some work once it is told to begin."""

    def __init__(self, table: UsageTable, unit: int, units: int, work: str, limits: Mapping[str, float]) -> None:
        arguments = (json.dumps(limits), *map(str, (table.fd, unit, units)))
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROCESS + work, *arguments],
            pass_fds=(table.fd,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def said(self) -> list[str]:
        """Return the words of its next line."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().split()

    def begin(self) -> None:
        """Tell it to begin."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def units_at(table: UsageTable, work: str, *numbers: int, units: int = 2, **limits: float) -> Iterator[list[Unit]]:
    """Start a process for each number of a unit. All begin their work once each has opened the tenant."""
    started = [Unit(table, number, units, work, limits) for number in numbers]
    try:
        assert [unit.said() for unit in started] == [["ready"]] * len(started)
        for unit in started:
            unit.begin()
        yield started
    finally:
        for unit in started:
            unit.kill()


def test_two_processes_admit_as_many_calls_as_one() -> None:
    """Both admit calls as fast as they can. In all they admit what one bucket gives in that time, within 5 %."""
    work = """
calls, began = 0, monotonic()
while (was_admitted := admitted()) or now < began + 1 or not calls:
    calls += was_admitted
print(calls, began, now, flush=True)
"""
    # A bucket that is full while neither process gets a core for a while would be another one.
    limits = {"calls_per_second": 200, "burst_calls": 2000}
    with table_of(2) as table, units_at(table, work, 0, 1, **limits) as units:
        calls, begins, ends = zip(*(map(float, unit.said()) for unit in units), strict=True)
    assert min(calls) > 0
    # Both have gone on until the bucket was empty.
    assert sum(calls) == pytest.approx(2000 + 200 * (max(ends) - min(begins)), rel=0.05)


def test_two_processes_exceed_calls_in_flight_by_one_at_most() -> None:
    """Each of the two may let in a call at the same moment, when there is room for one of them."""
    work = """
most = calls = 0
for number in range(20_000):
    if admitted():
        tenant.in_flight += 1
        calls += 1
        most = max(most, tenant.in_flight + tenant._elsewhere("in_flight"))
    elif tenant.in_flight:
        tenant.in_flight -= 1 + number % tenant.in_flight
tenant.in_flight = 0
print(calls, most, flush=True)
"""
    with table_of(2) as table, units_at(table, work, 0, 1, calls_in_flight=4) as units:
        calls, most = zip(*(map(int, unit.said()) for unit in units), strict=True)
    assert min(calls) > 0
    assert 4 <= max(most) <= 5


def test_killed_process_leaves_what_it_took_and_nothing_in_use() -> None:
    """The supervisor takes out what a killed unit had in use. What it took from the buckets stays taken."""
    work = """
while tenant.in_flight < 3 and admitted():
    tenant.in_flight += 1
tenant.lanes += 2
tenant.held.hold(700)
print("used", flush=True)
while True:
    tenant.held.hold(1)
    tenant.held.free(1)
"""
    # No token comes back meanwhile.
    limits = {"calls_per_second": 1e-6, "burst_calls": 10, "calls_in_flight": 4, "live_bytes": 1000, "lanes": 8}
    with table_of(3) as table:
        here = tenant_of(unit_of(table, 0, 3), monotonic(), **limits)
        with units_at(table, work, 1, units=3, **limits) as (unit,):
            assert unit.said() == ["used"]
            assert (here._elsewhere("in_flight"), here._elsewhere("lanes")) == (3, 2)
            assert here.held.most in {300, 299}
            unit.kill()
        table.leave(1)
        assert (here._elsewhere("in_flight"), here._elsewhere("lanes"), here.held.most) == (0, 0, 1000)
        here.admit(monotonic())
        successor = tenant_of(unit_of(table, 1, 3), monotonic(), **limits)
        for tenant in (here, successor):
            assert tenant._calls is not None
            assert tenant._calls.left(monotonic()) == pytest.approx(6, abs=0.1)


def test_process_that_is_killed_while_it_opens_tenants_keeps_no_other_waiting() -> None:
    """Nothing is left of it either, wherever it was."""
    work = """
from itertools import cycle
for name in cycle("abcdefgh"):
    if name == "a":
        print(name, flush=True)
    one = usage.open(name)
    one.own.in_flight = 1
    one.close()
"""
    with table_of(2) as table:
        here = unit_of(table, 0, 2)
        with units_at(table, work, 1) as (unit,):
            assert unit.said() == ["a"]
            unit.kill()
        table.leave(1)
        for name in "abcdefgh":
            usage = here.open(name)
            assert usage is not None
            assert usage.elsewhere("in_flight") == 0
