"""The table that units share: where tenants are in it, what a unit leaves behind, and what there is no room for."""

import os
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from unlatch.common.errors import ResourceExhausted
from unlatch.gateway.tenants import shared_usage
from unlatch.gateway.tenants.shared_quotas import bytes_of_all
from unlatch.gateway.tenants.shared_usage import SharedUsage, TenantUsage, UsageTable

UNITS = 3


def units_of(table: UsageTable) -> list[SharedUsage]:
    """The table as each of its units has it, here all in one process."""
    return [SharedUsage(os.dup(table.fd), unit, UNITS) for unit in range(UNITS)]


@pytest.fixture
def table() -> Iterator[UsageTable]:
    """A table for three units."""
    made = UsageTable(UNITS)
    yield made
    made.close()


@pytest.fixture
def units(table: UsageTable) -> Sequence[SharedUsage]:
    """Its units."""
    return units_of(table)


def collide(patch: pytest.MonkeyPatch, rows: int) -> None:
    """Have all tenants in the same few rows."""
    patch.setattr(shared_usage, "_WINDOW", rows)
    patch.setattr(shared_usage, "_ROWS", rows + 1)


def opened(unit: SharedUsage, tenant: str) -> TenantUsage:
    """Open a tenant for which there is room."""
    usage = unit.open(tenant)
    assert usage is not None
    return usage


def test_units_see_one_another(units: Sequence[SharedUsage]) -> None:
    """Each unit sees what a tenant has in use in the others, and nothing of other tenants."""
    other = opened(units[0], "other")
    first, second, third = (opened(unit, "one") for unit in units)
    other.own.in_flight = 100
    first.own.in_flight, second.own.in_flight, third.own.lanes = 1, 2, 4
    assert [one.elsewhere("in_flight") for one in (first, second, third)] == [2, 1, 3]
    assert [one.elsewhere("lanes") for one in (first, second, third)] == [4, 4, 0]
    assert other.elsewhere("in_flight") == 0


def test_units_count_their_totals_together(table: UsageTable) -> None:
    """Each unit sees what the others hold. A unit that has died holds nothing."""
    first, second, third = (unit.totals for unit in units_of(table))
    first.own.live_calls, second.own.live_calls, third.own.lanes = 1, 2, 4
    assert [one.elsewhere("live_calls") for one in (first, second, third)] == [2, 1, 3]
    assert [one.elsewhere("lanes") for one in (first, second, third)] == [4, 4, 0]
    table.leave(1)
    assert [one.elsewhere("live_calls") for one in (first, second, third)] == [0, 1, 1]


def test_bytes_of_all_units_fill_the_bound(units: Sequence[SharedUsage]) -> None:
    """A unit may hold all bytes of the bound, less those that the other units hold."""
    one, other = (bytes_of_all(100, unit) for unit in units[:2])
    one.charge(90)
    with pytest.raises(ResourceExhausted, match="11 bytes do not fit: calls hold 90 of max_live_bytes=100"):
        other.check(11)
    other.charge(10)
    assert one.is_full
    assert other.is_full
    one.free(90)
    other.check(90)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["open", "close", "die"]), st.integers(0, UNITS - 1), st.integers(0, 5), st.integers(1, 9)
        ),
        max_size=60,
    )
)
def test_sums_are_right_whatever_collides(events: Sequence[tuple[str, int, int, int]]) -> None:
    """Six tenants in four rows are opened and closed, and units die. Each sum is that of the tenant's other units."""
    table = UsageTable(UNITS)
    units = units_of(table)
    usages: dict[tuple[int, int], TenantUsage] = {}
    with pytest.MonkeyPatch.context() as patch:
        collide(patch, 4)
        for event, unit, tenant, held in events:
            if event == "open" and (unit, tenant) not in usages:
                usage = units[unit].open(str(tenant))
                if usage is None:
                    # The rows are all other tenants'.
                    assert len({one for _, one in usages} - {tenant}) >= 4
                    continue
                usage.own.held_bytes = held
                usages[unit, tenant] = usage
            elif event == "close" and (unit, tenant) in usages:
                usages.pop((unit, tenant)).close()
            elif event == "die":
                table.leave(unit)
                usages = {at: usage for at, usage in usages.items() if at[0] != unit}
            for (at, name), usage in usages.items():
                others = [one for key, one in usages.items() if key[0] != at and key[1] == name]
                assert usage.elsewhere("held_bytes") == sum(one.own.held_bytes for one in others)
    table.close()


def test_full_table_is_said_once(units: Sequence[SharedUsage], monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant for which there is no room is counted in its unit alone. Where a row is given back there is room."""
    collide(monkeypatch, 2)
    first = opened(units[0], "first")
    opened(units[1], "second")
    with capture_logs() as lines:
        assert units[0].open("third") is None
        assert units[0].open("fourth") is None
    (line,) = lines
    assert line == {
        "log_level": "warning",
        "event": "quotas counted in this unit alone",
        "reason": "table_is_full",
        "tenant": "third",
    }
    first.close()
    opened(units[0], "third")


def test_two_units_that_open_a_tenant_at_one_moment_take_one_row(
    units: Sequence[SharedUsage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second unit has chosen another row already, which was free when the first looked."""
    collide(monkeypatch, 2)
    blocking = opened(units[0], "another")
    # So that neither row is preferred as never used.
    opened(units[0], "earlier").close()
    found = SharedUsage._find
    moments = iter(["chosen"])

    def find(unit: SharedUsage, key: int, first: int) -> int | None:
        row = found(unit, key, first)
        for _ in moments:
            # Row 0 is given back after the one unit has looked, and before the other one does.
            blocking.close()
            usages.append(opened(units[2], "tenant"))
        return row

    usages: list[TenantUsage] = []
    monkeypatch.setattr(SharedUsage, "_find", find)
    usages.append(opened(units[1], "tenant"))
    for usage in usages:
        usage.own.lanes = 1
    assert [usage.elsewhere("lanes") for usage in usages] == [1, 1]


def test_table_of_another_version_is_not_used(table: UsageTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit of a new version counts alone under a supervisor of the old one."""
    monkeypatch.setattr(shared_usage, "_LAYOUT", shared_usage._LAYOUT + 1)
    with capture_logs() as lines:
        (unit, *_) = units_of(table)
        assert unit.open("one") is None
    assert [line["reason"] for line in lines] == ["table_of_another_version"] * UNITS


def test_names_of_any_text_are_counted(units: Sequence[SharedUsage]) -> None:
    """A token may bring a name that is not valid Unicode."""
    opened(units[0], "\ud800").own.lanes = 1
    assert opened(units[1], "\ud800").elsewhere("lanes") == 1
