"""Backlog, dispatcher, pool and runs as one machine: whatever happens in whatever order, no call is lost.

Workers, lanes and time are a test's; everything between is the product's own code. Time passes whenever the clock is
looked at, so that no decision may look twice.
"""

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from tests.support.dispatch import Desk, Loop, WorkerEnd, array, kernel, stand_in
from unlatch.common.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from unlatch.common.kernel.spec import ArraySpec
from unlatch.compute.call import Call
from unlatch.compute.ipc.frames import Done, Misfit, Result, Tensor, ToDispatcher
from unlatch.compute.pool import exits
from unlatch.compute.pool.in_flight import InFlight

OUTPUT = (ArraySpec(name="y", dtypes=(), dims=("...",)),)
KERNELS = [
    kernel("once"),
    kernel("pure", pure=True),
    kernel("batched", pure=True, batch=True, max_batch_size=4),
    kernel("batched_once", batch=True, max_batch_size=4),
    kernel("timed", timeout_seconds=0.5),
    kernel("timed_batched", pure=True, batch=True, max_batch_size=8, timeout_seconds=0.5),
    kernel("large", outputs=OUTPUT),
]
WORKERS = 3
# Longer than any time that something waits for: a backoff, a grace, a caller who does not confirm.
LONG_SECONDS = 30.0


class Machine(RuleBasedStateMachine):
    """Three workers, one of them reserved for calls that are not long, and callers."""

    calls: Bundle[Call] = Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        self.loop = Loop()
        self.patch = pytest.MonkeyPatch()
        stand_in(self.patch, self.loop)
        self.desk = self.loop.do(
            lambda: Desk(
                WORKERS,
                kernels=KERNELS,
                reserved_workers=1,
                max_calls=24,
                clock=self.loop.clock,
                settings={"stopped_worker_seconds": 0, "worker_start_seconds": 5},
            )
        )
        self.starting = self.loop.create_task(self.desk.start())
        self.loop.rounds()
        self.made: list[Call] = []
        self.left: set[Call] = set()

    @rule(target=calls, data=st.data(), count=st.integers(1, 8))
    def send(self, data: st.DataObject, count: int) -> Any:
        """Calls come, all alike, so that some may run as one."""
        spec = data.draw(st.sampled_from(KERNELS))
        x = array(data.draw(st.sampled_from([1, 3, 600])), float(data.draw(st.integers(0, 1))))
        milliseconds = data.draw(st.sampled_from([0, 0, 0, 5, 50, 1000]))
        tenant, attempt = data.draw(st.sampled_from(["", "other"])), data.draw(st.integers(0, 1))
        made = []
        for _ in range(count):
            with suppress(ResourceExhausted, DeadlineExceeded):  # it could not be answered in time
                made.append(
                    self.loop.do(
                        lambda: self.desk.sent(
                            x, remaining_microseconds=1000 * milliseconds, spec=spec, tenant=tenant, attempt=attempt
                        )
                    )
                )
        self.made += made
        return multiple(*made)

    @rule(call=consumes(calls))
    def leave(self, call: Call) -> None:
        """A caller leaves."""
        if not call.ended:
            self.left.add(call)
        self.loop.do(call.abandon)

    @rule(data=st.data())
    def confirm(self, data: st.DataObject) -> None:
        """A caller says that it knows that its call begins."""
        if unheard := self.desk.lane.unheard:
            number = data.draw(st.sampled_from(sorted(unheard)))
            self.loop.do(unheard.pop(number))

    @rule(data=st.data(), seconds=st.sampled_from([0.001, 0.05, 0.2]))
    def answer_some(self, data: st.DataObject, seconds: float) -> None:
        """Workers answer their runs."""
        for _ in range(data.draw(st.integers(1, 6))):
            self.answer(data, seconds, fails=False)

    @rule(data=st.data(), seconds=st.sampled_from([0.001, 0.05, 0.2]), fails=st.booleans())
    def answer(self, data: st.DataObject, seconds: float, *, fails: bool) -> None:
        """A worker answers its run."""
        busy = [end for end in self.desk.living if end.runs and not end.ending]
        if busy:
            end = data.draw(st.sampled_from(busy))
            self.loop.advance(seconds)
            if end.runs and not end.ending:
                self.loop.do(lambda: end.fail(seconds) if fails else end.done(seconds))

    @rule(data=st.data(), code=st.sampled_from([0, -9, -11]))
    def die(self, data: st.DataObject, code: int) -> None:
        """A worker dies, whatever it is doing."""
        end = self._worker(data)
        self.loop.do(lambda: end.exit(code))

    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        """A worker is found stopped, and killed for that."""
        end = self._worker(data)
        self.loop.do(lambda: end.kill(exits.STOPPED))

    @rule(data=st.data(), how=st.sampled_from(["other", "empty", "misses one", "outputs", "starts"]))
    def talk_nonsense(self, data: st.DataObject, how: str) -> None:
        """A worker says what cannot be."""
        end = self._worker(data)
        first = end.runs[0].members[0].call if end.runs else 1
        frames: dict[str, ToDispatcher] = {
            "other": Done((Result(10_000, ()),), 0),
            "empty": Done((), 0),
            "misses one": Done((Result(first, ()),), 0),
            "outputs": Done((Result(first, (Tensor("float64", (1,), 0, 8),) * 9),), 0),
            "starts": Misfit("no"),
        }
        if how != "misses one" or not end.runs or len(end.runs[0].members) > 1:
            self.loop.do(lambda: end.say(frames[how]))

    @rule(data=st.data())
    def exceed_memory(self, data: st.DataObject) -> None:
        """A worker's run takes too much memory."""
        if flights := [flight for flight in self.desk.in_flight if len(flight)]:
            flight = data.draw(st.sampled_from(flights))
            self.loop.do(lambda: flight.refuse("took too much", exits.OVER_LIMIT))

    @rule()
    def exit_as_told(self) -> None:
        """Workers that were killed exit."""
        for end in self.desk.living:
            if end.ending:
                self.loop.do(end.exit)

    @rule(seconds=st.sampled_from([0.001, 0.03, 0.09, 0.3, 6.0]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.loop.advance(seconds)

    @rule(tick=st.sampled_from([0.0, 1e-6, 0.02, 0.06]))
    def tick(self, tick: float) -> None:
        """From now on so much time passes with each look at the clock."""
        self.loop.tick = tick

    @rule()
    def send_replies(self) -> None:
        """Replies that were large are sent."""
        unsent, self.desk.lane.unsent = self.desk.lane.unsent, []
        for sent in unsent:
            self.loop.do(sent)

    @rule(really=st.sampled_from([False, False, True]))
    def shut_and_open(self, *, really: bool) -> None:
        """No worker can be started, and then one can."""
        if not really:
            return
        self.loop.do(lambda: self.desk.dispatcher.shut(Unavailable("no")))
        self.loop.do(lambda: self.desk.dispatcher.shut(None))

    def _worker(self, data: st.DataObject) -> WorkerEnd:
        self.loop.advance(0.0 if self.desk.living else LONG_SECONDS)
        return data.draw(st.sampled_from(self.desk.living))

    @invariant()
    def no_exception_was_met(self) -> None:
        """No guard had to catch anything, and nothing got past the guards."""
        assert not self.loop.failures, self.loop.failures
        assert not self.desk.errors._caught._series

    @invariant()
    def each_call_is_in_one_place(self) -> None:
        """A call that has not ended waits, or is in one worker's runs; its memory is kept as long, and no longer."""
        waiting = list(self.desk.backlog)
        running = [call for flight in self.desk.in_flight for run in flight._runs for call in run.numbers]
        assert len({*waiting, *running}) == len(waiting) + len(running)
        assert not [call for call in waiting if call.ended]
        assert {call for call in self.made if not call.ended} <= {*waiting, *running}
        assert self.desk.arena.used_bytes == sum(call.size for call in (*waiting, *running))
        assert all(len(flight) <= 2 for flight in self.desk.in_flight)

    @invariant()
    def no_caller_hears_twice(self) -> None:
        """A call that has ended had one reply, or none where its caller had left."""
        for call in self.made:
            assert len(self.desk.replies(call)) == (call.ended and call not in self.left)

    @invariant()
    def kept_counts_equal_a_scan(self) -> None:
        """The kept counts, order and waits of the workers equal what a look at each slot finds."""
        pool, occupancy, now = self.desk.pool, self.desk.occupancy, self.loop.now
        flights = [flight for flight in self.desk.in_flight if len(flight)]
        long = [flight for flight in flights if any(run.first.estimate.long for run in flight._runs)]
        assert (occupancy.busy, occupancy.long) == (len(flights), len(long))
        assert pool.busy_ratio == len(flights) / WORKERS
        roomy = [(len(flight), _bytes(flight)) for flight in self.desk.in_flight if flight.has_room(now)]
        opening = pool.opening(now)
        assert (opening is not None) == bool(roomy)
        if opening is not None:
            found = opening.in_flight
            assert isinstance(found, InFlight)
            assert (len(found), _bytes(found)) == min(roomy)
            assert opening.takes_long == (not pool.keeps_some_free(now) or len(long) < WORKERS - 1)
        for before in (0.0, 2.0):
            for short in (False, True):
                wait = pool.wait_seconds(before, now, short=short)
                assert wait == pytest.approx(self._wait_seconds(before, now, short=short), abs=1e-5)
            assert pool.wait_seconds(before, now, short=False) <= pool.longest_wait_seconds(before) + 1e-5

    def _wait_seconds(self, before: float, now: float, *, short: bool) -> float:
        """The seconds that the pool's workers take for their runs and for what is before, by a look at each slot."""
        left, count, idle = before, 0, False
        for slot in self.desk.slots:
            runs = slot.in_flight._runs if isinstance(slot.in_flight, InFlight) else ()
            if runs and short and any(run.first.estimate.long for run in runs):
                continue
            count += 1
            idle |= not runs
            left += max(0.0, runs[0].begun + sum(run.expected_seconds for run in runs) - now) if runs else 0.0
        if not count:
            return math.inf
        return 0.0 if idle and not before else left / count

    @invariant()
    @precondition(lambda self: not self.loop.tick)
    def no_worker_is_left_idle(self) -> None:
        """Nothing waits while a worker has nothing to do, but for long calls where workers are reserved."""
        idle = [flight for flight in self.desk.in_flight if flight.has_room(self.loop.now) and not flight]
        assert not idle or all(call.estimate.long for call in self.desk.backlog)

    def teardown(self) -> None:
        """In the end all calls have ended, and nothing is held."""
        try:
            self.loop.tick = 0.0
            for _ in range(200):
                if all(call.ended for call in self.made) and not any(map(len, self.desk.in_flight)):
                    break
                self._go_on()
            self.send_replies()
            self.no_exception_was_met()
            self.no_caller_hears_twice()
            assert all(call.ended for call in self.made)
            self.desk.nothing_is_held()
        finally:
            with stopped(self.desk, self.loop):
                self.patch.undo()

    def _go_on(self) -> None:
        self.exit_as_told()
        for number in sorted(self.desk.lane.unheard):
            self.loop.do(self.desk.lane.unheard.pop(number))
        for end in self.desk.living:
            if end.runs and not end.ending:
                self.loop.do(end.done)
        self.loop.advance(1.0)


def _bytes(flight: InFlight) -> int:
    return sum(call.size for run in flight._runs for call in run.numbers)


@contextmanager
def stopped(desk: Desk, loop: Loop) -> Iterator[None]:
    """Stop the pool afterwards, and close its loop."""
    yield
    stop = loop.create_task(desk.stop())
    for _ in range(3):
        loop.rounds()
        for end in desk.living:
            end.exit()
    loop.run_until_complete(asyncio.wait_for(stop, None))
    desk.poison.close()
    loop.close()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
