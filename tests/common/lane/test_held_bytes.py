"""Bytes that callers make a service hold: each count has its bound, and is a part of the one above it."""

import pytest

from unlatch.common.errors import ResourceExhausted
from unlatch.common.lane.held_bytes import HeldBytes


def test_bytes_are_held_up_to_the_bound() -> None:
    """Bytes that do not fit are refused with the bound's name, and none of them is held."""
    held = HeldBytes("max_live_bytes", 100)
    held.charge(60)
    held.charge(100, instead_of=60)
    assert held.is_full
    with pytest.raises(ResourceExhausted, match="1 bytes do not fit: calls hold 100 of max_live_bytes=100") as refused:
        held.charge(1)
    assert refused.value.retry_after_milliseconds > 0
    assert held.held == 100
    held.free(100)
    assert held.held == 0


def test_tenant_counts_in_the_whole_too() -> None:
    """A tenant's bytes are bounded by its quota and by the service's bound, and each refusal names its own bound."""
    whole = HeldBytes("max_live_bytes", 100)
    carl, dora = (HeldBytes("live_bytes", 70, whole, quota=f"tenant:{name}") for name in ("carl", "dora"))
    carl.charge(60)
    with pytest.raises(ResourceExhausted, match="live_bytes=70") as refused:
        carl.charge(20)
    assert refused.value.quota == "tenant:carl"
    with pytest.raises(ResourceExhausted, match="max_live_bytes=100") as refused:
        dora.charge(50)
    assert refused.value.quota == ""
    assert (carl.held, dora.held, whole.held) == (60, 0, 60)
    dora.charge(40)
    assert dora.is_full
    carl.free(60)
    dora.free(40)
    assert (carl.held, dora.held, whole.held) == (0, 0, 0)


def test_bytes_that_are_here_already_are_held_beyond_the_bound() -> None:
    """`hold` never refuses; what comes after it is refused until there is room again."""
    held = HeldBytes("max_live_bytes", 10)
    held.hold(25)
    assert held.is_full
    with pytest.raises(ResourceExhausted):
        held.check(0)
    held.free(20)
    held.charge(5)


def test_tenants_without_a_quota_share_the_whole() -> None:
    """Each may hold half of what the others leave, so there is room for one more, however many hold all they may."""
    whole = HeldBytes("max_live_bytes", 96)
    carl, dora, erna = (HeldBytes("live_bytes", None, whole, quota=f"tenant:{name}") for name in ("c", "d", "e"))
    carl.charge(48)
    assert carl.is_full
    with pytest.raises(ResourceExhausted, match="1 bytes do not fit: calls hold 48 of live_bytes=48") as refused:
        carl.charge(1)
    assert refused.value.quota == "tenant:c"
    dora.charge(24)
    assert dora.is_full
    erna.charge(12)
    carl.free(48)
    assert not dora.is_full
    dora.charge(42, instead_of=24)
    assert (dora.is_full, whole.held) == (True, 54)
