"""Calls, executions and coalescing over lanes whose other end is the test: every state, without a network."""

import asyncio
from typing import Any

import pytest

from tests.support.replicas import HandGateway, hand_gateway
from tests.support.watching import until
from unlatch.common.errors import (
    Aborted,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from unlatch.common.lane.body import WHOLE_BYTES, Body
from unlatch.protos.unlatch_pb2 import Reply

LARGE = 4 * WHOLE_BYTES


def learn(gateway: HandGateway, seconds: float) -> None:
    """Teach the fleet how long runs of the pure kernel take, so that coalescing digests its calls."""
    for _ in range(30):
        call, _ = gateway.begin()
        gateway.sent[-1].answer(b"y", run_seconds=seconds)
        call.leave()
    gateway.replicas[0].lane.calls.clear()
    gateway.metrics.codes.clear()


async def test_answered_call_holds_nothing() -> None:
    """The caller and the record hear of one end; its replica's window, its bytes and its tenant's count are free."""
    async with hand_gateway() as gateway:
        call, answer = gateway.begin()
        (sent,) = gateway.sent
        assert len(gateway.calls) == 1
        sent.answer(b"result")
        call.leave()
        assert [body.buffers for body in answer.bodies] == [[b"result"]]
        assert (answer.errors, gateway.metrics.codes) == ([], ["OK"])
        assert gateway.at_rest()
        assert gateway.errors.places == []


@pytest.mark.parametrize(
    ("kernel", "settings", "error"),
    [
        ("no_such_kernel", {}, NotFound),
        ("pure", {"max_live_bytes": 3}, ResourceExhausted),
    ],
)
async def test_refused_call_is_over_as_it_begins(kernel: str, settings: dict[str, Any], error: type) -> None:
    """`begin` raises nothing: the caller is told, and so is the record, once."""
    async with hand_gateway(**settings) as gateway:
        call, answer = gateway.begin(kernel)
        call.leave()
        assert [type(one) for one in answer.errors] == [error]
        assert gateway.metrics.codes == [answer.errors[0].status]
        assert gateway.sent == []
        assert gateway.at_rest()


async def test_call_of_too_many_tensors_is_refused() -> None:
    """257 are one too many."""
    async with hand_gateway() as gateway:
        _, answer = gateway.begin(body=Body([0] * 257, [b""] * 257))
        assert [type(error) for error in answer.errors] == [InvalidArgument]
        assert gateway.at_rest()


async def test_lost_execution_is_sent_to_the_other_replica() -> None:
    """Its bytes are sent again from the start, and the caller knows nothing of it."""
    async with hand_gateway() as gateway:
        call, answer = gateway.begin()
        (first,) = gateway.sent
        first.lane.ended = True
        first.lose()
        (second,) = [sent for sent in gateway.sent if sent is not first]
        assert second.lane is not first.lane
        assert second.body.buffers == [b"body"]
        assert (first.descriptor.attempt, second.descriptor.attempt) == (1, 2)
        second.answer(b"result")
        call.leave()
        assert (len(answer.replies), answer.errors, gateway.metrics.codes) == (1, [], ["OK"])
        assert gateway.at_rest()


@pytest.mark.parametrize(
    ("kernel", "begun", "again"), [("pure", True, True), ("stateful", False, True), ("stateful", True, False)]
)
async def test_what_was_begun_is_sent_again_only_if_pure(kernel: str, *, begun: bool, again: bool) -> None:
    """A worker that has begun a call with effects is waited for; its loss reaches the caller as ABORTED."""
    async with hand_gateway() as gateway:
        call, answer = gateway.begin(kernel)
        (first,) = gateway.sent
        if begun:
            assert first.begin is not None
            assert first.begin() is (kernel == "stateful")
        first.lane.ended = True
        first.lose()
        assert len(gateway.sent) == (2 if again else 1)
        assert [type(error) for error in answer.errors] == ([] if again else [Aborted])
        if again:
            next(sent for sent in gateway.sent if sent is not first).answer(b"result")
        call.leave()
        assert gateway.metrics.codes == (["OK"] if again else ["ABORTED"])
        assert gateway.at_rest()


@pytest.mark.parametrize("kernel", ["pure", "stateful"])
@pytest.mark.parametrize("answered", [True, False])
async def test_only_replica_that_ends_costs_no_call(kernel: str, *, answered: bool) -> None:
    """A call that the replica has refused or left, as not begun, is sent again though there is no other replica."""
    async with hand_gateway(replicas=1) as gateway:
        calls = [gateway.begin(kernel) for _ in range(8)]
        for sent in list(gateway.sent):
            if answered:
                sent.fail(Unavailable("this replica is ending", not_begun=True))
            else:
                sent.lose(not_begun=True)
        await until(lambda: len(gateway.sent) == 16, "they are sent again")
        for again in gateway.sent[8:]:
            again.answer(b"result")
        for call, answer in calls:
            call.leave()
            assert (len(answer.replies), answer.errors) == (1, [])
        # The replica has not failed: another one may soon be at its address.
        assert not gateway.replicas[0].ejection.ejected
        assert gateway.metrics.codes == ["OK"] * 8
        assert gateway.at_rest()


async def test_half_a_reply_is_replaced_by_another() -> None:
    """A lane that breaks in the middle of a pure kernel's reply: the caller gets a new body, and one end."""
    async with hand_gateway() as gateway:
        call, answer = gateway.begin()
        (first,) = gateway.sent
        first.begin_answer(LARGE).feed(memoryview(bytes(LARGE // 2)))
        assert gateway.metrics.codes == []
        first.lane.ended = True
        first.lose()
        second = next(sent for sent in gateway.sent if sent is not first)
        body = second.begin_answer(LARGE)
        body.feed(memoryview(bytes(LARGE)))
        assert [len(answer.replies), len(answer.errors)] == [2, 0]
        assert answer.bodies[-1] is body
        assert gateway.metrics.codes == ["OK"]
        call.leave()
        assert gateway.at_rest()


async def test_half_a_reply_of_a_kernel_with_effects_fails_its_call() -> None:
    """Nothing is sent again; the request's bytes were let go with the reply's first."""
    async with hand_gateway() as gateway:
        call, answer = gateway.begin("stateful")
        (sent,) = gateway.sent
        sent.begin_answer(LARGE)
        assert sent.body.buffers == []
        sent.lose()
        call.leave()
        assert [type(error) for error in answer.errors] == [Aborted]
        assert gateway.metrics.codes == ["ABORTED"]
        assert gateway.at_rest()


async def test_caller_who_leaves_cancels_the_execution() -> None:
    """On its replica, also when half of the reply is here."""
    async with hand_gateway() as gateway:
        for half in (False, True):
            call, answer = gateway.begin()
            sent = next(one for one in gateway.sent if not one.cancelled)
            if half:
                sent.begin_answer(LARGE).feed(memoryview(bytes(10)))
            call.leave()
            assert sent.cancelled
            assert answer.errors == []
        assert gateway.metrics.codes == ["CANCELLED", "CANCELLED"]
        assert gateway.at_rest()


async def test_caller_who_leaves_with_a_whole_reply_was_answered() -> None:
    """A caller that leaves while it is being told has what it asked for."""
    async with hand_gateway() as gateway:
        call, answer = gateway.begin()
        answer.replied = lambda *_: call.leave()  # type: ignore[method-assign]
        gateway.sent[0].answer(b"result")
        assert gateway.metrics.codes == ["OK"]
        assert gateway.at_rest()


async def test_deadline_ends_a_call() -> None:
    """By the gateway's own clock, with DEADLINE_EXCEEDED, and the replica is told."""
    async with hand_gateway() as gateway:
        _, answer = gateway.begin(seconds=0.03)
        await asyncio.sleep(0.06)
        assert [type(error) for error in answer.errors] == [DeadlineExceeded]
        assert gateway.metrics.codes == ["DEADLINE_EXCEEDED"]
        assert gateway.sent[0].cancelled
        assert gateway.at_rest()


async def test_reply_that_fits_no_more_fails_its_call() -> None:
    """`max_live_bytes` counts requests and replies together."""
    async with hand_gateway(max_live_bytes=LARGE) as gateway:
        _, answer = gateway.begin()
        gateway.sent[0].begin_answer(2 * LARGE)
        assert [type(error) for error in answer.errors] == [ResourceExhausted]
        assert gateway.sent[0].cancelled
        assert gateway.metrics.codes == ["RESOURCE_EXHAUSTED"]
        assert gateway.at_rest()


async def test_refusal_by_an_early_deadline_is_not_that_of_a_later_one() -> None:
    """Of two that share an execution the one whose deadline was sent is refused; for the other it is sent again."""
    async with hand_gateway(1) as gateway:
        learn(gateway, 0.2)
        soon, refused = gateway.begin(name="soon", seconds=1.0)
        later, answered = gateway.begin(name="later", seconds=30.0)
        (sent,) = gateway.sent
        sent.fail(DeadlineExceeded("too late"))
        assert [type(error) for error in refused.errors] == [DeadlineExceeded]
        assert answered.errors == []
        assert len(gateway.sent) == 2
        gateway.sent[1].answer(b"result")
        for call in (soon, later):
            call.leave()
        assert sorted(gateway.metrics.codes) == ["DEADLINE_EXCEEDED", "OK"]
        assert gateway.at_rest()


@pytest.mark.parametrize("size", [4, LARGE])
async def test_identical_calls_share_one_execution(size: int) -> None:
    """Each caller has the reply under its own id; when all but one have left it still runs."""
    async with hand_gateway(1) as gateway:
        learn(gateway, 0.2)
        begun = [gateway.begin(body=bytes(size), name=name) for name in ("a", "b", "c")]
        other = gateway.begin(body=b"\1" + bytes(size - 1), name="other")
        await asyncio.sleep(0.05)
        assert [sent.descriptor.request.id for sent in gateway.sent] == ["a", "other"]
        begun[0][0].leave()
        assert not gateway.sent[0].cancelled
        gateway.sent[0].answer(b"shared")
        gateway.sent[1].answer(b"own")
        assert [answer.replies[0].response.id for _, answer in begun[1:]] == ["b", "c"]
        assert [answer.bodies[0].buffers for _, answer in [*begun[1:], other]] == [[b"shared"], [b"shared"], [b"own"]]
        for call, _ in [*begun, other]:
            call.leave()
        assert sorted(gateway.metrics.codes) == ["CANCELLED", "OK", "OK", "OK"]
        assert gateway.at_rest()


async def test_shared_reply_in_pieces_is_read_by_each_at_its_pace() -> None:
    """Buffers that all cursors have passed are freed; a call after the reply has an execution of its own."""
    async with hand_gateway(1) as gateway:
        learn(gateway, 0.2)
        calls = [gateway.begin(name=name) for name in ("a", "b")]
        body = gateway.sent[0].begin_answer(20)
        cursors = [answer.bodies[0].subscribe(lambda: None) for _, answer in calls]
        body.let_go()
        body.feed(memoryview(b"0123456789"))
        assert cursors[0].next(100) == b"0123456789"
        assert body.buffers == [b"0123456789"]
        late = gateway.begin(name="late")
        assert len(gateway.sent) == 2
        assert [cursors[1].next(4), cursors[1].next(100)] == [b"0123", b"456789"]
        assert body.buffers == [b""]
        body.feed(memoryview(b"abcdefghij"))
        assert gateway.metrics.codes == ["OK", "OK"]
        gateway.sent[1].answer(b"late")
        for call, _ in [*calls, late]:
            call.leave()
        assert gateway.at_rest()


async def test_failure_of_a_shared_execution_reaches_all() -> None:
    """Each caller has an error of its own, and the record of each is told."""
    async with hand_gateway(1) as gateway:
        learn(gateway, 0.2)
        calls = [gateway.begin(name=name) for name in ("a", "b")]
        gateway.sent[0].fail(InvalidArgument("x: wrong", field="x"))
        errors = [error for _, answer in calls for error in answer.errors]
        assert [(type(error), error.field) for error in errors] == [(InvalidArgument, "x")] * 2
        assert errors[0] is not errors[1]
        assert gateway.metrics.codes == ["INVALID_ARGUMENT"] * 2
        assert gateway.at_rest()


async def test_call_that_is_left_while_it_is_digested_keeps_no_bytes() -> None:
    """Its pieces are freed with its execution, and not when the garbage collector comes."""
    async with hand_gateway(1) as gateway:
        learn(gateway, 2.0)
        body = Body([2 * LARGE])
        call, _ = gateway.begin(body=body)
        body.feed(memoryview(bytes(LARGE)))
        call.leave()
        assert body.buffers == []
        await asyncio.sleep(0.01)
        assert gateway.sent == []
        assert gateway.at_rest()


async def test_drain_waits_for_the_last_caller() -> None:
    """Calls that come meanwhile are refused."""
    async with hand_gateway() as gateway:
        call, _ = gateway.begin()
        draining = asyncio.ensure_future(gateway.calls.drain())
        await asyncio.sleep(0)
        _, refused = gateway.begin()
        assert [type(error) for error in refused.errors] == [Unavailable]
        gateway.sent[0].answer(b"result")
        await asyncio.sleep(0)
        assert not draining.done()
        call.leave()
        await asyncio.wait_for(draining, 1.0)


async def test_reply_for_a_call_that_is_over_changes_nothing() -> None:
    """A replica that answers twice, or late, is not listened to."""
    async with hand_gateway() as gateway:
        call, answer = gateway.begin()
        (sent,) = gateway.sent
        sent.answer(b"result")
        sent.answer(b"again")
        sent.fail(Unavailable("late"))
        sent.listener.replied(Reply(), Body((), []))
        call.leave()
        assert (len(answer.replies), answer.errors, gateway.metrics.codes) == (1, [], ["OK"])
        assert gateway.at_rest()
