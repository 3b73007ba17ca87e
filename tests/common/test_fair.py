"""Work by turns: in order, and in slices so short that others on the loop do not wait for all of it."""

import asyncio
from functools import partial
from time import monotonic

import pytest

from unlatch.common.fair import Turns

MANY = 20


def work_for_a_round() -> None:
    end = monotonic() + 0.002
    while monotonic() < end:
        pass


async def test_what_there_is_time_for_is_done_at_once() -> None:
    """Work that fits into the time is done at once, without a wait."""
    turns, done = Turns(), list[int]()
    for number in range(3):
        work = turns.take(partial(done.append, number))
        with pytest.raises(StopIteration):
            work.send(None)
    assert done == [0, 1, 2]


async def test_others_run_between_turns() -> None:
    """Of many that come together each has its turn, in order, and the loop goes round in between."""
    turns, rounds, done = Turns(), 0, list[tuple[int, int]]()

    def work(number: int) -> None:
        work_for_a_round()
        done.append((number, rounds))

    working = asyncio.gather(*(turns.take(partial(work, number)) for number in range(MANY)))
    while not working.done():
        await asyncio.sleep(0)
        rounds += 1
    assert [number for number, _ in done] == list(range(MANY))
    assert len({when for _, when in done}) >= MANY - 1


async def test_what_goes_wrong_is_heard_by_who_wanted_it() -> None:
    """An exception reaches the caller that wanted the result and delays no other. A caller that has left is skipped."""
    turns, done = Turns(), list[int]()
    first = asyncio.ensure_future(turns.take(work_for_a_round))
    wrong = asyncio.ensure_future(turns.take(partial(int, "no number")))  # type: ignore[arg-type]  # it never returns
    gone = asyncio.ensure_future(turns.take(partial(done.append, 1)))
    last = asyncio.ensure_future(turns.take(partial(done.append, 2)))
    # All have asked for their turns, and only the first has had one.
    await asyncio.sleep(0)
    gone.cancel()
    await first
    with pytest.raises(ValueError, match="no number"):
        await wrong
    await last
    assert done == [2]
