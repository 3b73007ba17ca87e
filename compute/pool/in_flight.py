"""What is in one worker's hands: a run of the kernel, and one staged behind it, each of a call or of several.

given ──> begun ──> Done, or Failed ──> its calls are answered; several that failed together run again, each alone
│         ├─ nobody waits, or its time is over ─ grace ─>  the worker is killed: the core is free
│         └─ the worker ends ──> run again elsewhere, each alone, if the kernel is pure and it was the first time
└─ the worker ends ──> back to the queue, since it was not begun; where nobody knows that, only if it is pure

A call that must not run twice is begun only when its caller has said that it knows: a caller who does not know would
send it elsewhere if this replica were lost. What tells it may be lost with the replica, too: only the answer
is proof (docs/decisions/0014).
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import count
from time import monotonic

import structlog

from unlatch.common.errors import DeadlineExceeded, FailedPrecondition, ResourceExhausted, Unavailable, from_code
from unlatch.common.kernel.datatypes import is_held, is_served
from unlatch.compute.call import Call, Ran
from unlatch.compute.dispatch.queue import Queue
from unlatch.compute.intake.poison import Suspects
from unlatch.compute.ipc.arena import ReplySegments, Segment
from unlatch.compute.ipc.frames import Cancel, Done, Failed, Forget, Learn, Member, Result, RunFrame
from unlatch.compute.metrics import WorkerMetrics
from unlatch.compute.pool import exits as ends
from unlatch.compute.pool.exits import End
from unlatch.compute.pool.process import WorkerProcess

log = structlog.get_logger()

# One that runs and one staged.
_MOST_IN_HAND = 2
# What is staged behind a run as short as this is about to begin.
_SOON_SECONDS = 0.02
# How long a caller may take to say that it knows of its call's beginning. Meanwhile the worker stands still.
_HEARD_SECONDS = 5.0


class _Given:
    """A run in a worker's hands, and its calls with the numbers that the worker knows them by."""

    def __init__(self, numbers: dict[Call, int], segment: Segment, replies: ReplySegments) -> None:
        self.numbers = numbers
        self.segment = segment
        self.first = next(iter(numbers))
        self.expected_seconds = self.first.estimate.seconds * len(numbers)
        # Calls that may have effects: whose callers have yet to be told of their start, and to say that they know.
        # Until then the worker is not given the run.
        self.unannounced = [call for call in numbers if call.must_be_known]
        self.unheard: set[Call] = set()
        self.handed = False
        # Of the one that runs: since when, and what ends its time.
        self.begun = monotonic()
        self.timer: asyncio.TimerHandle | None = None
        self._replies = replies
        self._unread = len(numbers)

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for it."""
        return not self.first.ended or any(not call.ended for call in self.numbers)

    def read(self) -> None:
        """One reply less has to be read from the segment, or will ever be written to it."""
        self._unread -= 1
        if not self._unread:
            self._replies.give_back(self.segment)

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


class Hand:
    """One for each worker process: what it was given, what memory it knows, and what it says of its calls."""

    def __init__(
        self,
        worker: int,
        process: WorkerProcess,
        metrics: WorkerMetrics,
        queue: Queue,
        suspects: Suspects,
        *,
        kill_grace_seconds: float,
        long_call_seconds: float,
        max_reply_bytes: int,
    ) -> None:
        self._worker = worker
        self._process = process
        self._metrics = metrics
        self._queue = queue
        self._suspects = suspects
        self._kill_grace_seconds = kill_grace_seconds
        self._long_call_seconds = long_call_seconds
        self._max_reply_bytes = max_reply_bytes
        self._loop = asyncio.get_running_loop()
        self._numbers = count(1)
        self._in_hand: deque[_Given] = deque()
        # The worker's processor time when it last ended something: between its runs it uses none.
        self._cpu_seconds = process.cpu_seconds
        self._cpu_seconds_at_end = 0.0
        self._replies = ReplySegments()
        self._known_inputs: set[int] = set()
        self._known_replies: set[int] = set()
        # Calls that the worker has ended.
        self.calls = 0
        # Whom the worker is yet to hear of, by their numbers.
        self._cancelled: list[int] = []

    def __len__(self) -> int:
        return len(self._in_hand)

    @property
    def bytes(self) -> int:
        """How many bytes of tensors its calls bring."""
        return sum(call.size for given in self._in_hand for call in given.numbers)

    @property
    def runs_long(self) -> bool:
        """Whether the worker runs a call that takes long, or has one staged that it runs next."""
        return any(given.first.estimate.long for given in self._in_hand)

    @property
    def has_room(self) -> bool:
        """Whether the worker can take one more."""
        if self._process.ending:
            return False
        return not self._in_hand or (len(self._in_hand) < _MOST_IN_HAND and self._ends_soon(self._in_hand[0]))

    def _ends_soon(self, given: _Given) -> bool:
        """Whether a call may be staged behind a run: not behind one that is long, or turns out to be.

        Nor behind one that nobody waits for: that would be to wait for the grace and for a new worker.
        """
        return given.wanted and not given.first.estimate.long and monotonic() - given.begun < self._long_call_seconds

    def seconds_left(self, now: float) -> float:
        """What its runs are expected to take from now on."""
        if not self._in_hand:
            return 0.0
        left = self._in_hand[0].begun - now
        for given in self._in_hand:
            left += given.expected_seconds
        return max(0.0, left)

    def run(self, calls: Sequence[Call]) -> None:
        """Give the worker a call, or several of one kernel and the same parameters to run as one."""
        target = self._replies.lend()
        if target.number not in self._known_replies:
            self._known_replies.add(target.number)
            self._process.send(Learn(target.number, writable=True), target.fd)
        given = _Given({call: next(self._numbers) for call in calls}, target, self._replies)
        self._in_hand.append(given)
        before = self._in_hand[0]
        if given is before or 0.0 < before.expected_seconds < _SOON_SECONDS:
            self._announce(given)
        self._hand_over()

    def _announce(self, given: _Given) -> None:
        """Tell callers who must know that their calls are about to begin."""
        given.unheard = {call for call in given.unannounced if call.announce(partial(self._heard_of, given, call))}
        given.unannounced = []
        if given.unheard:
            self._loop.call_later(_HEARD_SECONDS, self._not_heard_of, given)

    def _heard_of(self, given: _Given, call: Call) -> None:
        """A call's caller knows that it is about to begin."""
        given.unheard.discard(call)
        self._hand_over()

    def _not_heard_of(self, given: _Given) -> None:
        """A caller has not said that it knows: it is stopped, or lost. Its call is in the way of others."""
        if given in self._in_hand and not given.handed:
            for call in tuple(given.unheard):
                call.fail(Unavailable("its caller has not said in time that it knows of its beginning"))
                self._take_out(given, call)

    def _hand_over(self) -> None:
        """Give the worker what it may begin, in order."""
        if self._process.ending:
            # It would be lost, and count as begun.
            return
        for given in self._in_hand:
            if given.unannounced or given.unheard:
                return
            if not given.handed:
                given.handed = True
                if given is self._in_hand[0]:
                    self._begin(given)
                members = tuple(
                    Member(number, self._input(call), call.tensors) for call, number in given.numbers.items()
                )
                first = given.first
                self._process.send(RunFrame(first.spec.name, first.arguments.parameters, given.segment.number, members))

    def abandon(self, call: Call) -> None:
        """Nobody waits for a call any more. The worker is told; one that goes on with it for long is killed."""
        given = next((given for given in self._in_hand if call in given.numbers), None)
        if given is None:
            return
        if not given.handed:
            self._take_out(given, call)
            return
        if not self._cancelled:
            # Those who leave together are told of together: a worker that listens to none has only so much room.
            self._loop.call_soon(self._tell_cancelled)
        self._cancelled.append(given.numbers[call])
        if given is self._in_hand[0] and not given.wanted:
            self._end_soon(given, ends.ABANDONED)

    def _take_out(self, given: _Given, call: Call) -> None:
        """A call that the worker has not been given is not to run."""
        del given.numbers[call]
        given.unheard.discard(call)
        if call in given.unannounced:
            given.unannounced.remove(call)
        given.read()
        self._queue.not_run(call)
        call.release()
        if not given.numbers:
            self._in_hand.remove(given)
            # Whoever has left is told of by and by: there may be room for another before that is over.
            self._loop.call_soon(self._queue.pump)
            if self._in_hand and self._in_hand[0].unannounced:
                self._announce(self._in_hand[0])
        self._hand_over()

    def refuse(self, run: str, end: End) -> None:
        """What the worker runs has taken too much: its caller hears what of its run, and the worker ends."""
        given = self._in_hand[0]
        if not given.handed:
            # It runs nothing, and none of its calls has done it.
            self._end_now(end)
            return
        if self._has_ended(given):
            # It has said so, and nobody has read it yet.
            return
        spec = given.first.spec
        ran = Ran(monotonic() - given.begun, self._worker, len(given.numbers))
        # Which of several it was shows when each runs alone, where that may be.
        if len(given.numbers) == 1 or not spec.pure:
            for call in given.numbers:
                call.fail(ResourceExhausted(f"kernel {spec.name} {run}"), ran)
        self._end_now(end)

    def sweep(self, dropped_inputs: list[int]) -> None:
        """Let the worker forget segments that are gone, and those of its own that it has not needed for a while."""
        inputs = [number for number in dropped_inputs if number in self._known_inputs]
        replies = self._replies.drop_idle()
        self._known_inputs.difference_update(inputs)
        self._known_replies.difference_update(replies)
        if inputs or replies:
            self._process.send(Forget(inputs, replies))

    def heard(self, frame: Done | Failed) -> bool:
        """The worker has ended a run. False where it cannot have: then it is killed."""
        given = self._in_hand[0] if self._in_hand and self._in_hand[0].handed else None
        named = [result.call for result in frame.results] if isinstance(frame, Done) else [frame.call]
        if given is None or not named or len(set(given.numbers.values()) & set(named)) < len(named):
            self._process.kill(ends.OTHER_CALL)
            return False
        results = {result.call: result for result in frame.results} if isinstance(frame, Done) else {}
        if isinstance(frame, Done) and not self._is_whole(results, given):
            self._process.kill(ends.UNSOUND_REPLY)
            return False
        ran = [call for call, number in given.numbers.items() if number in results] or list(given.numbers)
        # What nobody waits for any more may not have been begun, or may have stopped when it noticed.
        done = (bool(results) or len(ran) == 1) and given.wanted
        seconds = frame.run_nanoseconds / 1e9
        self.calls += len(ran)
        self._account(ran, seconds, self._process.cpu_seconds, done=done)
        for call in given.numbers.keys() - ran:
            self._queue.not_run(call)
        self._in_hand.popleft()
        given.stop_timer()
        self._metrics.rests()
        if self._in_hand:
            if self._in_hand[0].handed:
                self._begin(self._in_hand[0])
            elif self._in_hand[0].unannounced:
                self._announce(self._in_hand[0])
        if isinstance(frame, Failed) and frame.log:
            log.error("kernel failed", kernel=given.first.spec.name, worker=self._worker, story=frame.log)
        again = self._settle(given, frame, results, Ran(seconds, self._worker, len(ran)))
        # From the last to the first: each goes back before all that wait.
        for call in reversed(again):
            self._queue.run_again(call)
        return True

    def _settle(self, given: _Given, frame: Done | Failed, results: dict[int, Result], ran: Ran) -> list[Call]:
        """Answer the calls of a run that has ended; those that are to be run again."""
        again: list[Call] = []
        for call, number in given.numbers.items():
            if isinstance(frame, Failed) and len(given.numbers) > 1 and not call.ended:
                # Whoever it was among several: it alone is to fail.
                given.read()
                again.append(call)
                continue
            self._metrics.ran(call.spec.name, "ok" if number in results else "error")
            if not call.ended:
                self._suspects.clear(call)
            call.release()
            if call.ended:
                given.read()
            elif isinstance(frame, Failed):
                given.read()
                call.fail(from_code(frame.code, frame.message, field=frame.field), ran)
            else:
                call.answer(results[number].tensors, given.segment.view, ran, given.read)
        return again

    def lost(self, end: End, *, stopping: bool) -> int:
        """The worker has ended. Its calls go where they can; how many there were."""
        in_hand, self._in_hand = self._in_hand, deque()
        self._replies.close()
        lost = 0
        # From the last to the first: each goes back before all that wait.
        for given in reversed(in_hand):
            given.stop_timer()
            calls = list(given.numbers)
            begun = given is in_hand[0] and given.handed
            if begun:
                # Of a worker that ended by itself nobody knows better than that it may have used all of its time.
                elapsed = monotonic() - given.begun
                self._account(calls, elapsed, self._cpu_seconds_at_end or self._cpu_seconds + elapsed, done=False)
            for call in reversed(calls):
                if call.ended or stopping:
                    if not begun:
                        self._queue.not_run(call)
                    call.fail(Unavailable(f"worker {self._worker} ended: {end}"))
                    call.release()
                elif not begun and given.handed and end.went_on and not call.spec.pure:
                    # Who knows? What must not run twice is not run again.
                    self._queue.not_run(call)
                    call.fail(Unavailable(f"worker {self._worker} ended, and may have begun the call: {end}"))
                    call.release()
                elif not begun:
                    self._queue.put_back(call)
                elif end.is_strike:
                    self._struck(call, end, alone=len(calls) == 1)
                else:
                    self._ran_in_vain(call, end, None)
                given.read()
            lost += len(calls)
        return lost

    def _input(self, call: Call) -> int:
        """The segment that a call's bytes lie in, which the worker knows from now on; -1 for none."""
        if call.block is None:
            return -1
        segment = call.block.segment
        if segment.number not in self._known_inputs:
            self._known_inputs.add(segment.number)
            self._process.send(Learn(segment.number, writable=False), segment.fd)
        return segment.number

    def _begin(self, given: _Given) -> None:
        given.begun = now = monotonic()
        spec = given.first.spec
        self._metrics.begins(spec.name, now, len(given.numbers), batch=spec.batch)
        for call in given.numbers:
            call.begins(now)
            self._metrics.waited(now - call.landed)
        if not given.wanted:
            # It was told not to begin it, but may have begun before it heard.
            self._end_soon(given, ends.ABANDONED)
        elif spec.timeout_seconds is not None:
            given.timer = self._loop.call_later(spec.timeout_seconds, self._timed_out, given)

    def _has_ended(self, given: _Given) -> bool:
        """Whether a run whose time is over had ended before: a front that stood still hears its timers first."""
        self._process.hear()
        return not self._in_hand or self._in_hand[0] is not given

    def _timed_out(self, given: _Given) -> None:
        if self._has_ended(given):
            return
        spec = given.first.spec
        if spec.pure and len(given.numbers) > 1:
            # Whoever it was among several: each has the next worker, and the time, for itself.
            self._end_now(ends.TIMED_OUT)
            return
        error = DeadlineExceeded(f"kernel {spec.name} ran for longer than its timeout of {spec.timeout_seconds:.3g} s")
        ran = Ran(spec.timeout_seconds or 0.0, self._worker, len(given.numbers))
        for call in given.numbers:
            call.fail(error, ran)
        self._process.send(Cancel(list(given.numbers.values())))
        self._end_soon(given, ends.TIMED_OUT)

    def _end_soon(self, given: _Given, end: End) -> None:
        """Give a run that is for nothing the grace in which it may notice, and then its worker's end."""
        given.stop_timer()
        given.timer = self._loop.call_later(self._kill_grace_seconds, self._grace_over, given, end)

    def _grace_over(self, given: _Given, end: End) -> None:
        if not self._has_ended(given):
            self._end_now(end)

    def _end_now(self, end: End) -> None:
        # Once it is gone its clock is, too.
        self._cpu_seconds_at_end = self._process.cpu_seconds
        self._process.kill(end)

    def _account(self, calls: list[Call], seconds: float, cpu_seconds: float, *, done: bool) -> None:
        """Say what calls of a run have cost: each an equal part of what was used since others were accounted."""
        used = max(0.0, cpu_seconds - self._cpu_seconds) / len(calls)
        self._cpu_seconds = cpu_seconds
        for call in calls:
            self._queue.ran(call, seconds / len(calls), used, done=done)
            if call.ended:
                self._metrics.wasted(used)

    def _tell_cancelled(self) -> None:
        self._process.send(Cancel(self._cancelled))
        self._cancelled = []

    def _struck(self, call: Call, end: End, *, alone: bool) -> None:
        """A worker has died of a run that this call was in."""
        if alone:
            self._suspects.strike(call, end, partial(self._ran_in_vain, call, end))
        else:
            # Of several nobody knows which it was: each has the next worker for itself, and then it will be known.
            call.deaths += 1
            self._ran_in_vain(call, end, None)

    def _ran_in_vain(self, call: Call, end: End, poison: FailedPrecondition | None) -> None:
        """A run that its worker did not live to end: a pure kernel's goes back, unless it is poison."""
        if call.spec.pure and poison is None and not call.ended:
            self._queue.run_again(call)
            self._queue.pump()
        else:
            call.fail(poison or Unavailable(f"worker {self._worker} ended while it ran the call: {end}"))
            call.release()

    def _is_whole(self, results: dict[int, Result], given: _Given) -> bool:
        """Whether there is a sound result for each call of a run, but for those that need none any more."""
        return all(
            self._is_sound(results[number], given) if number in results else call.ended
            for call, number in given.numbers.items()
        )

    def _is_sound(self, result: Result, given: _Given) -> bool:
        """Whether a reply is one that the front can send on: whatever a worker writes, it must not hurt the front."""
        if len(result.tensors) != len(given.first.spec.outputs):
            return False
        end = 0
        for tensor in result.tensors:
            if not is_served(tensor.dtype) or not is_held(tensor.dtype, tensor.shape, tensor.length):
                return False
            end = max(end, tensor.offset + tensor.length)
        return end <= self._max_reply_bytes and given.segment.follow_growth_to(end)
