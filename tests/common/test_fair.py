"""Work by turns: in order, and in slices so short that others on the loop do not wait for all of it."""

import asyncio
from collections.abc import Iterator
from functools import partial
from time import monotonic

import pytest

from unlatch.common.fair import ByTurns, Turns

MANY = 20


def work_for_a_round() -> None:
    end = monotonic() + 0.002
    while monotonic() < end:
        pass


async def test_what_there_is_time_for_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that fits into the time is done at once, without a wait."""
    monkeypatch.setattr("unlatch.common.fair.monotonic", lambda: 1000.0)
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


class Counted:
    """Steps that are counted, of which some fail."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self.caught: list[str] = []
        self.work = ByTurns(self._steps, at_once=3, caught=lambda error: self.caught.append(str(error)))
        self.steps = range(7)
        self.again_at = 99

    def _steps(self) -> Iterator[None]:
        return map(self._step, self.steps)

    def _step(self, number: int) -> None:
        self.done.append(number)
        if number == self.again_at:
            self.again_at = 99
            self.work.start()
        if number < 0:
            raise ValueError(f"step {number}")


async def test_steps_are_done_some_in_each_round() -> None:
    """The first ones at once, in order, and the loop goes round before the others."""
    counted = Counted()
    counted.work.start()
    rounds = [len(counted.done)]
    for _ in range(3):
        await asyncio.sleep(0)
        rounds.append(len(counted.done))
    assert rounds == [3, 6, 7, 7]
    assert counted.done == list(range(7))


async def test_work_that_is_started_again_begins_anew_with_its_next_turn() -> None:
    """Work runs once at a time, however often it is started; work that is over begins at once."""
    counted = Counted()
    for _ in range(3):
        counted.work.start()
    assert counted.done == [0, 1, 2]
    await asyncio.sleep(0)
    assert counted.done == [0, 1, 2, 0, 1, 2]
    for _ in range(3):
        await asyncio.sleep(0)
    assert counted.done == [0, 1, 2, *range(7)]
    counted.work.start()
    assert counted.done[-3:] == [0, 1, 2]


@pytest.mark.parametrize("last", [1, 6])
async def test_step_that_starts_the_work_again_is_followed_by_the_new_steps(last: int) -> None:
    """Also the last step, after which the old work has none."""
    counted = Counted()
    counted.again_at = last
    counted.work.start()
    for _ in range(6):
        await asyncio.sleep(0)
    assert counted.done == [*range(last + 1), *range(7)]


async def test_step_that_raises_does_not_keep_the_next_ones() -> None:
    """The exception goes to the guard, in the first turn and in later ones."""
    counted = Counted()
    counted.steps = range(-2, 5)
    counted.work.start()
    assert counted.done == [-2, -1, 0]
    for _ in range(3):
        await asyncio.sleep(0)
    assert counted.done == list(range(-2, 5))
    assert counted.caught == ["step -2", "step -1"]
