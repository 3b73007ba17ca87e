"""How workers end: a label is one of few, whatever a worker does, and the rest is told beside it."""

from unlatch.compute.pool import exits as ends
from unlatch.compute.pool.exits import End


def test_worker_chooses_no_label() -> None:
    """Every exit code and every signal that there is comes under a dozen reasons, none of which has a number."""
    codes = [*range(-64, 256), None]
    found = {ends.by_itself(code) for code in codes}
    reasons = {end.reason for end in found}
    assert len(reasons) == 13
    assert not any(character.isdigit() for reason in reasons for character in reason)
    # What is told of them tells them apart all the same, but for two that nobody saw.
    assert len({str(ends.by_itself(code)) for code in codes}) == len(codes) - 1


def test_detail_is_no_label() -> None:
    """What a system call says is told, and counted under what it was about."""
    detailed = ends.DEAF.with_detail("No buffer space available")
    assert str(detailed) == "its socket refuses frames: No buffer space available"
    assert detailed.reason == ends.DEAF.reason


def test_what_follows_from_each_end() -> None:
    """Whom nobody waits for is replaced at once and blamed for nothing; what a kernel did is its call's strike."""
    named = {name: value for name, value in vars(ends).items() if isinstance(value, End)}
    of_limits = {"OVER_LIMIT", "GROWN", "HAS_RUN"}
    at_once = {"ABANDONED", "TIMED_OUT", "STOPPED", "HALF_GONE"} | of_limits
    assert {name for name, end in named.items() if end.at_once} == at_once
    blameless = {"POOL_STOPS", "ABANDONED", "TIMED_OUT", "MISFIT", "UNREADY"} | of_limits
    assert {name for name, end in named.items() if not end.is_strike} == blameless
    assert all(ends.by_itself(code).is_strike and not ends.by_itself(code).at_once for code in (-9, -11, 0, 3, None))
