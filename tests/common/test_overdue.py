"""Overdue: one timer for many waits, and what lasts too long is told once."""

import asyncio
import gc
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial

import pytest

from tests.support.dispatch import Loop
from unlatch.common.overdue import Overdue


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    """An event loop with a time of its own, by which waits are measured, too."""
    with closing(Loop()) as loop:
        monkeypatch.setattr("unlatch.common.overdue.monotonic", loop.clock)
        yield loop


def test_waits_that_last_too_long_are_told_once(loop: Loop) -> None:
    """Waits that end in time are not told, nor those that begin anew. Late ones are told in order, and forgotten."""
    told: list[str] = []
    overdue = Overdue[str](0.05, told.extend)
    for wait in ("first", "in time", "begun anew", "second"):
        loop.do(partial(overdue.begin, wait))
    assert overdue.end("in time")
    assert not overdue.end("in time")
    loop.advance(0.03)
    assert overdue.end("begun anew")
    loop.do(partial(overdue.begin, "begun anew"))
    loop.advance(0.03)
    assert told == ["first", "second"]
    assert not overdue.end("first")
    loop.advance(0.03)
    assert told == ["first", "second", "begun anew"]


async def test_timer_runs_only_while_there_are_waits() -> None:
    """After the last wait nothing keeps the loop, or the waits, from ending."""
    late: list[Sequence[int]] = []
    overdue = Overdue[int](0.01, late.append)
    overdue.begin(1)
    overdue.end(1)
    await asyncio.sleep(0.05)
    gc.collect()
    assert overdue._timer is None
    assert late == []
