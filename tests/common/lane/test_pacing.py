"""The pace of a lane's messages: who may wait how long, and that the most urgent frame decides."""

import asyncio
from time import monotonic

from unlatch.common.lane.pacing import Pace, gathered


def test_a_lone_call_never_waits() -> None:
    """With one call outstanding on a lane a frame leaves within half a millisecond of the last message."""
    assert gathered(1, taken_seconds=10.0) <= 0.0005


def test_the_more_calls_the_longer_but_at_most_two_milliseconds() -> None:
    """Quick calls are gathered for as long as there are many of them, and no longer than the bound."""
    assert gathered(0) == 0.0
    assert gathered(2) < gathered(3) < gathered(4) == gathered(400) == 0.002


def test_a_slow_calls_reply_may_wait_for_an_eighth_of_its_time() -> None:
    """The wait is a share of the call's time so far, and bounded."""
    assert gathered(100, taken_seconds=0.08) == 0.01
    assert gathered(100, taken_seconds=60.0) == 0.016


async def test_the_first_message_is_due_at_once() -> None:
    """A lane that was quiet does not wait, whatever its frames would allow."""
    pace = Pace()
    pace.send_within(0.016)
    await asyncio.wait_for(pace.next(), 0.01)


async def test_the_most_urgent_frame_decides() -> None:
    """A frame that may wait for a minute does not hold up one that comes later and may not wait."""
    pace = Pace()
    pace.send_within(0.0)
    await pace.next()
    pace.sent()
    pace.send_within(60.0)
    following = asyncio.ensure_future(pace.next())
    await asyncio.sleep(0)
    assert not following.done()
    pace.send_within(0.0)
    await asyncio.wait_for(following, 1.0)


async def test_messages_leave_as_far_apart_as_their_frames_allow() -> None:
    """The next one is due so long after the last one, and not before."""
    pace = Pace()
    pace.send_within(0.0)
    await pace.next()
    pace.sent()
    sent = monotonic()
    pace.send_within(0.05)
    await asyncio.wait_for(pace.next(), 5.0)
    assert monotonic() - sent >= 0.045


async def test_nothing_is_due_when_nothing_was_said() -> None:
    """After a message the next one waits for a frame."""
    pace = Pace()
    pace.send_within(0.0)
    await pace.next()
    pace.sent()
    following = asyncio.ensure_future(pace.next())
    done, _ = await asyncio.wait((following,), timeout=0.02)
    assert not done
    following.cancel()
