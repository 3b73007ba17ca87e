"""Poison: when two calls are equal, and which calls that killed workers are remembered for how long."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest

from tests.support.dispatch import Desk, kernel
from tests.support.watching import until
from unlatch.common.errors import FailedPrecondition, Unavailable, UnlatchError, error_class
from unlatch.common.kernel.spec import KernelSpec
from unlatch.compute.call import Call
from unlatch.compute.dispatch.outcomes import REQUEUE, Strike
from unlatch.compute.pool import exits

SIGKILL = exits.by_itself(-9)
# Read by a thread.
LARGE = 1 << 19


class Ward(Desk):
    """A dispatcher without workers."""

    def __init__(self, poison_seconds: float = 600.0) -> None:
        super().__init__(poison_seconds=poison_seconds)

    def taken(self) -> Call:
        """The one call that waits, as a worker gets it."""
        (call,) = self.take(lambda _: True, 2)
        return call

    def take(self, fits: Callable[[Call], bool], most: int) -> list[Call]:
        """The first calls that wait and fit: they wait no more."""
        found = list(islice(filter(fits, self.backlog), most))
        for call in found:
            self.backlog.remove(call)
        return found

    async def struck(self, call: Call) -> FailedPrecondition | None:
        """Return the error that a call gets when a worker has died of it and the call is poison."""
        self.dispatcher.settle(call, Strike(str(SIGKILL), Unavailable("its worker ended")))
        await until(lambda: call.ended, "it is read")
        (reply,) = self.replies(call)
        error = error_class(reply.failure.code)(reply.failure.message)
        assert isinstance(error, FailedPrecondition | Unavailable)
        return error if isinstance(error, FailedPrecondition) else None


A, B = np.arange(6.0), np.ones(6)


def optional(arrays: str) -> KernelSpec:
    """A kernel of these arrays, all but `a` optional."""
    spec = kernel(arrays=tuple(arrays))
    return replace(spec, inputs=tuple(replace(array, optional=array.name != "a") for array in spec.inputs))


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one element": ({"a": A}, {"a": A + (A == 5)}),
    "the sign of zero": ({"a": B * 0.0}, {"a": B * -0.0}),
    "the dtype": ({"a": A}, {"a": A.view("i8")}),
    "the shape": ({"a": A.reshape(2, 3)}, {"a": A.reshape(3, 2)}),
    "which array it is": ({"a": A, "b": B}, {"a": B, "b": A}),
    "a parameter": ({"a": A, "k": 1.0}, {"a": A, "k": 1.5}),
    "the version": ({"a": A, "version": "1"}, {"a": A, "version": "2"}),
    "a large one's last element": ({"a": np.zeros(LARGE)}, {"a": np.arange(LARGE) // (LARGE - 1) * 1.0}),
    "which array is left out": (
        {"a": A, "b": B, "spec": optional("abc")},
        {"a": A, "b": B, "spec": optional("acb")},
    ),
    "an empty array": ({"a": A, "spec": optional("ab")}, {"a": A, "b": np.zeros(0), "spec": optional("ab")}),
    "nothing in it": ({"a": np.zeros(0), "k": 1.0}, {"a": np.zeros(0), "k": 2.0}),
}


@pytest.mark.parametrize("what", CALLS)
async def test_calls_are_told_apart(what: str) -> None:
    """A call that killed twice is refused under any id; one that differs in anything a kernel sees is let through."""
    ward, (deadly, harmless) = Ward(), CALLS[what]
    ward.sent(**deadly, identity="one")
    assert await ward.struck(ward.taken()) is None
    ward.sent(**deadly, identity="two")
    await until(lambda: len(ward.backlog), "it waits for a worker")
    poison = await ward.struck(ward.taken())
    assert poison is not None
    assert poison.message.startswith(
        "2 workers ended while they ran this call, the last time because the worker was killed by SIGKILL"
    )
    refused = ward.sent(**deadly, identity="three")
    waiting = ward.sent(**harmless)
    await until(lambda: len(ward.backlog) and refused.ended, "one is let through and one is not")
    assert ward.taken() is waiting
    assert not waiting.ended
    waiting.release()
    assert not ward.arena.used_bytes


async def test_what_waits_is_held_against_what_is_known_now() -> None:
    """Calls like one that turns out to be poison leave the queue, whenever they came; others wait on."""
    ward = Ward()
    calls = [ward.sent(A + 1 if number % 3 else A) for number in range(100)]
    deadly, *_ = ward.take(lambda _: True, 1)
    assert await ward.struck(deadly) is None
    # These are read when they come, as the others were not.
    calls += [ward.sent(A + 1 if number % 3 else A) for number in range(100)]
    deadly, *_ = ward.take(lambda call: bool(call.digest), 1)
    assert await ward.struck(deadly) is not None
    alike = [call for number, call in enumerate(calls) if not number % 100 % 3][1:]
    await until(lambda: all(call.ended for call in alike if call is not deadly), "they are refused")
    await until(lambda: len(ward.backlog) == 132, "the rest waits")
    assert {call.ended for call in ward.take(lambda _: True, 200)} == {False}


@pytest.mark.parametrize("how", ["strike", "offer"])
async def test_caller_who_leaves_while_the_call_is_read(how: str) -> None:
    """Its memory is given back when the reading is over, not before, and the call goes nowhere."""
    ward, x = Ward(), np.zeros(LARGE)
    ward.sent(x)
    leaver = ward.taken()
    if how == "strike":
        ward.dispatcher.settle(leaver, Strike(str(SIGKILL), Unavailable("its worker ended")))
    else:
        assert await ward.struck(leaver) is None
        leaver = ward.sent(x)
    leaver.abandon()
    assert ward.arena.used_bytes == x.nbytes
    await until(lambda: not ward.arena.used_bytes, "its memory is free")
    assert not ward.replies(leaver)
    assert not len(ward.backlog)


async def test_what_is_remembered_is_bounded() -> None:
    """Of many that killed once the oldest are forgotten first."""
    ward = Ward()
    for number in range(1100):
        ward.sent(np.array([float(number)]))
        assert await ward.struck(ward.taken()) is None
    for number, is_known in ((0, False), (1099, True)):
        ward.sent(np.array([float(number)]))
        assert (await ward.struck(ward.taken()) is not None) == is_known
    assert len(ward.poison._remembered) == sum(ward.poison._kinds.values()) == 1024


async def test_what_did_no_harm_is_forgotten() -> None:
    """A call that was run to its end clears those like it, and nothing is read any more."""
    ward = Ward()
    ward.sent(A)
    await ward.struck(ward.taken())
    again = ward.sent(A)
    assert again.digest
    ward.poison.clear(again)
    assert not ward.sent(A).digest


async def test_strike_is_forgotten_in_time() -> None:
    """A call that killed a worker long ago and kills again is not poison."""
    ward = Ward(poison_seconds=1e-9)
    for _ in range(3):
        ward.sent(A)
        assert await ward.struck(ward.taken()) is None


async def test_nothing_is_remembered_where_nothing_is_to_be() -> None:
    """With `poison_seconds=0` a call that is run again by us is still run twice at most, and one like it is let in."""
    ward = Ward(poison_seconds=0.0)
    ward.sent(A)
    call = ward.taken()
    heard: list[UnlatchError | None] = []
    for _ in range(2):
        ward.poison.strike(call, str(SIGKILL), heard.append)
    first, second = heard
    assert first is None
    assert second is not None
    assert not ward.sent(A).ended


async def test_queue_that_is_shut_keeps_nothing() -> None:
    """Where there will be no worker all that waits, comes or comes back is refused, until there is one again."""
    ward = Ward()
    calls = [ward.sent(A) for _ in range(100)]
    ward.dispatcher.shut(Unavailable("the kernels do not load"))
    await until(lambda: all(call.ended for call in calls), "what waited is refused")
    assert ward.sent(A).ended
    ward.dispatcher.shut(None)
    ward.sent(A)
    call = ward.taken()
    ward.dispatcher.shut(Unavailable("the kernels do not load"))
    ward.dispatcher.settle(call, REQUEUE, refund=True)
    assert call.ended
    assert not ward.arena.used_bytes
    assert not len(ward.backlog)
