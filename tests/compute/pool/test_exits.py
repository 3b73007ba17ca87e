"""How workers end: a reason is one of few codes, whatever a worker does, and a message says the rest."""

import re
from itertools import chain

from tests.support.mesh import ROOT
from unlatch.compute.pool import exits
from unlatch.compute.pool.exits import Exit

NAMED = {name: value for name, value in vars(exits).items() if isinstance(value, Exit)}
CODES = [*range(-64, 256), None]


def test_reasons_are_distinct_codes() -> None:
    """Each way to end that is declared has a snake_case code of its own, a message, and a place in the docs."""
    declared = [*NAMED.values(), *{end.reason: end for end in map(exits.by_itself, CODES)}.values()]
    reasons = [end.reason for end in declared]
    assert len(set(reasons)) == len(reasons)
    assert [reason for reason in reasons if not re.fullmatch(r"[a-z]+(_[a-z]+)*", reason)] == []
    assert [end for end in declared if " " not in end.message] == []
    _, _, chapter = (ROOT / "docs" / "operations" / "metrics.md").read_text().partition("\n### Reasons\n")
    documented = set(
        re.findall(r"`([a-z_]+)`", chapter.partition("\nThe reasons of `unlatch_unauthenticated_total`")[0])
    )
    # A pool that stops replaces nothing, so that metrics never have this one.
    assert documented - {"reason", "message", "unlatch_worker_restarts_total"} == set(reasons) - {"pool_stopped"}


def test_worker_chooses_no_label() -> None:
    """Every exit code and every signal that there is comes under a dozen reasons, none of which has a number."""
    found = {exits.by_itself(code) for code in CODES}
    reasons = {end.reason for end in found}
    assert len(reasons) == 13
    assert not any(map(str.isdigit, chain.from_iterable(reasons)))
    # What is told of them tells them apart all the same.
    assert len({str(exits.by_itself(code)) for code in CODES}) == len(CODES)


def test_detail_is_no_label() -> None:
    """A system error is told as a message, and counted under its reason."""
    detailed = exits.DEAF.with_detail("No buffer space available")
    assert str(detailed) == "the worker's socket refused a frame: No buffer space available"
    assert detailed.reason == exits.DEAF.reason


def test_what_follows_from_each_end() -> None:
    """Whom nobody waits for is replaced at once and blamed for nothing; what a kernel did is its call's strike."""
    of_limits = {"OVER_LIMIT", "GROWN", "HAS_RUN"}
    at_once = {"ABANDONED", "TIMED_OUT", "STOPPED", "HALF_GONE"} | of_limits
    assert {name for name, end in NAMED.items() if end.at_once} == at_once
    blameless = {"POOL_STOPS", "ABANDONED", "TIMED_OUT", "MISFIT", "UNREADY", "INTERNAL_ERROR"} | of_limits
    assert {name for name, end in NAMED.items() if not end.blames_call} == blameless
    by_itself = [exits.by_itself(code) for code in (-9, -11, 0, 3, None)]
    assert all(end.blames_call and not end.at_once for end in by_itself)
    told = {"NO_FRAME", "OTHER_CALL", "UNASKED", "UNSOUND_REPLY", "INTERNAL_ERROR"}
    assert {name for name, end in NAMED.items() if end.may_have_begun_next} == told
