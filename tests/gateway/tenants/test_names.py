"""Names of tenants: callers without a table are apart from every table, and from one another."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlatch.common.lane.held_bytes import HeldBytes
from unlatch.gateway.tenants.tenants import Tenants

NAMES = st.text(alphabet="~a.*", min_size=1, max_size=4)


def take(tenants: Tenants, *tables: str) -> None:
    """Take a file with these tables, none of which has the caller of its own name."""
    named = (f"[tenants.{json.dumps(table)}]\nidentities = ['one of {at}']\n" for at, table in enumerate(tables))
    tenants._take("".join((*named, "[default]\n")).encode())


def test_callers_with_and_without_a_tilde_are_two() -> None:
    """A table [tenants.carl] of other callers makes neither the caller carl nor ~carl another's tenant."""
    made = Tenants("", HeldBytes())
    take(made, "carl")
    names = [made.of(identity).name for identity in ("carl", "~carl", "~~carl", "clara")]
    assert len({*names, "carl"}) == 5


@given(st.sets(NAMES.filter(lambda name: not name.startswith("~")), min_size=1, max_size=4), st.sets(NAMES))
def test_names_of_tenants_are_injective(tables: set[str], callers: set[str]) -> None:
    """Two callers never share a tenant's name, and none has a table's. It stays so when the tables change."""
    made = Tenants("", HeldBytes())
    for held in (tables, {"a", *list(tables)[1:]}):
        take(made, *held)
        names = [made.of(caller).name for caller in callers]
        assert len({*names, *held}) == len(callers) + len(held)


@pytest.mark.parametrize("name", ["~carl", "~", "other"])
def test_table_whose_name_could_be_anothers_is_refused(name: str) -> None:
    """The error names the table."""
    with pytest.raises(ValueError, match=f"tenants.{name}: a tenant's name is not 'other', and does not begin with ~"):
        Tenants("", HeldBytes())._take(f'[tenants."{name}"]\n'.encode())
