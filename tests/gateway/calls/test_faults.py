"""Exceptions that no code expected, at every entry point of the gateway's calls: none is lost, each ends once."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.gateway.calls.test_execution import LARGE, learn
from tests.support.replicas import HandGateway, hand_gateway
from unlatch.common.errors import Internal, InvalidArgument, Unauthenticated, Unavailable, UnlatchError
from unlatch.common.lane.body import Cursor
from unlatch.common.lane.held_bytes import HeldBytes
from unlatch.common.net.unread import unread_answers
from unlatch.gateway.calls.coalescing import Coalescing, _Digest
from unlatch.gateway.calls.execution import Execution
from unlatch.gateway.calls.record import Record
from unlatch.gateway.doors import client_lanes, oip
from unlatch.gateway.doors.client_lanes import ClientLanes
from unlatch.gateway.doors.oip import OipCalls
from unlatch.gateway.doors.rpc_guard import RpcGuard
from unlatch.gateway.fleet.fleet import Fleet
from unlatch.gateway.metrics import GatewayMetrics
from unlatch.gateway.tenants.identity import Identity
from unlatch.gateway.tenants.quotas import Tenant
from unlatch.gateway.tenants.tenants import Tenants
from unlatch.protos.inference_pb2 import ModelInferRequest, ModelStreamInferResponse
from unlatch.protos.unlatch_pb2 import Descriptor


class Fault(Exception):
    """An exception that no code expects."""


def once(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, at: int = 1) -> None:
    """Have a method raise at its next call, or the one of that number, and do its work at all others."""
    inner = getattr(owner, name)
    calls = 0

    def raising(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Fault
        return inner(*arguments, **named)

    monkeypatch.setattr(owner, name, raising)


def serves(gateway: HandGateway) -> None:
    """The gateway's next call is answered, and then it holds nothing."""
    before = len(gateway.metrics.codes)
    call, answer = gateway.begin(body=b"next")
    unanswered = next(sent for sent in reversed(gateway.sent) if sent.body.buffers == [b"next"])
    unanswered.answer(b"result")
    call.leave()
    assert (len(answer.replies), answer.errors) == (1, [])
    assert gateway.metrics.codes[before:] == ["OK"]
    assert gateway.at_rest()


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Coalescing, "route"), (Execution, "join"), (Execution, "route"), (Fleet, "kernel"), (Tenant, "admit")],
)
async def test_fault_as_a_call_begins(owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`begin` raises nothing: the caller hears INTERNAL with an id, and nothing is held."""
    async with hand_gateway() as gateway:
        once(monkeypatch, owner, name)
        call, answer = gateway.begin()
        call.leave()
        assert [type(error) for error in answer.errors] == [Internal]
        assert gateway.errors.places == ["call_begin"]
        assert gateway.metrics.codes == ["INTERNAL"]
        serves(gateway)


async def test_fault_as_a_reply_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller who cannot take the reply hears INTERNAL; one that shares the execution has its reply."""
    async with hand_gateway(1) as gateway:
        learn(gateway, 0.2)
        first, broken = gateway.begin(name="broken")
        second, well = gateway.begin(name="well")
        once(monkeypatch, broken, "replied")
        gateway.sent[0].answer(b"result")
        for call in (first, second):
            call.leave()
        assert ([type(error) for error in broken.errors], broken.replies) == ([Internal], [])
        assert (well.errors, len(well.replies)) == ([], 1)
        assert gateway.errors.places == ["call_reply"]
        assert sorted(gateway.metrics.codes) == ["INTERNAL", "OK"]
        serves(gateway)


async def test_fault_as_a_failure_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A faulty call's memory is freed, its record is told once, and calls that share its execution fail too."""
    async with hand_gateway(1) as gateway:
        learn(gateway, 0.2)
        _, broken = gateway.begin(name="broken")
        _, well = gateway.begin(name="well")
        once(monkeypatch, broken, "failed")
        gateway.sent[0].fail(InvalidArgument("wrong"))
        assert [type(error) for error in well.errors] == [InvalidArgument]
        assert gateway.errors.places == ["call_failure"]
        assert gateway.metrics.codes == ["INVALID_ARGUMENT"] * 2
        serves(gateway)


@pytest.mark.parametrize("ends_by", ["answer", "failure", "deadline", "leaving"])
async def test_fault_as_an_end_is_recorded(ends_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the call ends, its caller hears of it all the same."""
    async with hand_gateway() as gateway:
        once(monkeypatch, Record, "ended")
        call, answer = gateway.begin(seconds=0.03 if ends_by == "deadline" else 5.0)
        if ends_by == "answer":
            gateway.sent[0].answer(b"result")
        elif ends_by == "failure":
            gateway.sent[0].fail(InvalidArgument("wrong"))
        elif ends_by == "deadline":
            await asyncio.sleep(0.06)
        call.leave()
        assert len(answer.replies) + len(answer.errors) == (0 if ends_by == "leaving" else 1)
        assert gateway.errors.places == ["call_record"]
        serves(gateway)


async def test_fault_as_a_call_leaves_its_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's deadline is told all the same. The execution ends by its replica's answer."""
    async with hand_gateway() as gateway:
        once(monkeypatch, Execution, "leave")
        _, answer = gateway.begin(seconds=0.03)
        await asyncio.sleep(0.06)
        assert [error.status for error in answer.errors] == ["DEADLINE_EXCEEDED"]
        assert gateway.errors.places == ["call_leave"]
        gateway.sent[0].answer(b"late")
        serves(gateway)


@pytest.mark.parametrize(
    ("owner", "name"), [(GatewayMetrics, "ran"), (Fleet, "ended"), (Tenant, "charge"), (Coalescing, "_over")]
)
@pytest.mark.parametrize("size", [6, LARGE])
async def test_fault_as_an_execution_ends(owner: type, name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its calls have the reply, once; of the bookkeeping that follows only what raised is missing."""
    async with hand_gateway(1) as gateway:
        learn(gateway, 0.2)
        once(monkeypatch, owner, name)
        call, answer = gateway.begin()
        body = gateway.sent[0].begin_answer(size)
        body.feed(memoryview(bytes(size)))
        call.leave()
        assert (len(answer.replies), answer.errors, gateway.metrics.codes) == (1, [], ["OK"])
        assert gateway.errors.places == ["execution_end"]
        serves(gateway)


@pytest.mark.parametrize("name", ["ended", "route"])
async def test_fault_as_an_execution_is_sent_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane's guard fails the calls of the execution, which would be nowhere."""
    async with hand_gateway() as gateway:
        call, answer = gateway.begin()
        (first,) = gateway.sent
        first.lane.ended = True
        once(monkeypatch, Fleet, name)
        with pytest.raises(Fault):
            first.lose()
        first.listener.failed(gateway.errors.caught("lane_failure", Fault()))
        call.leave()
        assert [type(error) for error in answer.errors] == [Internal]
        assert gateway.metrics.codes == ["INTERNAL"]
        first.lane.ended = False
        serves(gateway)


@pytest.mark.parametrize(("owner", "name"), [(Fleet, "withdraw"), (Execution, "route")])
async def test_fault_as_a_replica_is_forgiven(owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer's guard fails the calls of an execution that waits for the replica that it avoids."""
    async with hand_gateway() as gateway:
        other = gateway.replicas[1]
        call, answer = gateway.begin()
        (first,) = gateway.sent
        for replica in gateway.replicas:
            if replica.lane is not first.lane:
                other = replica
        other.takes_calls = False
        gateway.fleet.members.changed()
        first.fail(Unavailable("no worker"))
        assert (gateway.fleet.held, answer.errors) == (1, [])
        once(monkeypatch, owner, name)
        await asyncio.sleep(0.1)
        call.leave()
        assert [type(error) for error in answer.errors] == [Internal]
        assert gateway.errors.places == ["execution_backoff"]
        assert gateway.metrics.codes == ["INTERNAL"]
        other.takes_calls = True
        gateway.fleet.members.changed()
        if name != "withdraw":
            serves(gateway)


@pytest.mark.parametrize(("owner", "name"), [(Cursor, "next"), (_Digest, "_done")])
async def test_fault_as_a_call_is_digested(owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call fails that is read in turns of the loop, and is shared with none."""
    async with hand_gateway(1) as gateway:
        learn(gateway, 0.2)
        once(monkeypatch, owner, name)
        call, answer = gateway.begin(body=bytes(LARGE))
        await asyncio.sleep(0.02)
        call.leave()
        assert [type(error) for error in answer.errors] == [Internal]
        assert gateway.errors.places == ["coalescing"]
        assert gateway.metrics.codes == ["INTERNAL"]
        assert gateway.sent == []
        serves(gateway)


class Context:
    """A stream's RPC: messages to read, and what is written."""

    def __init__(self, *messages: bytes) -> None:
        self._messages = list(messages)
        self.written: list[ModelStreamInferResponse] = []

    async def read(self) -> object:
        return self._messages.pop(0) if self._messages else None

    async def write(self, message: bytes) -> None:
        self.written.append(ModelStreamInferResponse.FromString(message))

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def time_remaining(self) -> float | None:
        return 5.0


class OpenGuard:
    """Lets every caller in."""

    def __init__(self, gateway: HandGateway) -> None:
        self._gateway = gateway

    def tenant(self, _: object) -> Tenant:
        return self._gateway.tenant


@pytest.mark.parametrize(("owner", "name"), [(oip, "read_request"), (oip, "write_response"), (OpenGuard, "tenant")])
async def test_fault_in_a_stream(owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one call is answered with the id of the log entry, in its place; the stream's other calls are served."""
    async with hand_gateway(1) as gateway:
        guard = OpenGuard(gateway)
        unread = unread_answers(60.0)
        calls = OipCalls(gateway.calls, guard, unread, 1 << 20, gateway.errors.caught)  # type: ignore[arg-type]
        messages = [ModelInferRequest(model_name="pure", id=name).SerializeToString() for name in ("a", "b")]
        context = Context(*messages)
        # The stream's own caller is looked at first.
        once(monkeypatch, owner, name, at=2 if owner is OpenGuard else 1)
        streaming = asyncio.ensure_future(calls.stream(None, context))
        await asyncio.sleep(0.01)
        for sent in gateway.sent:
            sent.answer(b"result")
        await asyncio.wait_for(streaming, 2.0)
        failures = [message.error_message for message in context.written]
        assert failures[0].startswith("INTERNAL: an internal error in oip_stream")
        assert failures[1] == ""
        assert gateway.errors.places == ["oip_stream"]
        assert context.written[1].infer_response.id == "b"
        serves(gateway)


async def test_fault_in_an_rpc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller hears INTERNAL with an id, and it is counted."""

    class Aborted(Exception):
        pass

    class Rpc:
        def trailing_metadata(self) -> None:
            return None

        async def abort(self, code: object, message: str, _: object) -> None:
            raise Aborted(f"{code}: {message}")

    async def method(*_: object) -> None:
        raise Fault

    async with hand_gateway() as gateway:
        guard = RpcGuard(None, None, None, gateway.metrics, 1.0)  # type: ignore[arg-type]
        guarded = guard.stream("Method", method)
        with pytest.raises(Aborted, match=r"INTERNAL: an internal error in rpc; the server's log has it under"):
            await guarded(b"", Rpc())
        assert gateway.errors.places == ["rpc"]


class Door:
    """A door as a client's lane knows it."""

    def __init__(self, gateway: HandGateway, renewed: Callable[[str, str], Identity]) -> None:
        self.caught = gateway.errors.caught
        self.renewed = renewed
        self.closed: list[str] = []

    def close(self, _: object, why: str) -> None:
        self.closed.append(why)


def client_door(gateway: HandGateway, authentication: Any) -> ClientLanes:
    return ClientLanes(
        gateway.calls,
        None,  # type: ignore[arg-type]
        authentication,
        None,  # type: ignore[arg-type]
        max_lanes=1,
        stalled_call_seconds=1.0,
        grace_seconds=1.0,
        caught=gateway.errors.caught,
        metrics=gateway.metrics,
    )


def lane_at(door: Door | ClientLanes, until: float) -> Any:
    tenant = Tenants("", HeldBytes()).of("one")
    return client_lanes._ClientLane(door, Identity(name="one", until=until), "token", tenant)  # type: ignore[arg-type]


async def test_token_that_cannot_be_checked_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault as keys change: the lane asks for another token, and closes soon if none comes."""

    def renewed(*_: str) -> Identity:
        raise Fault

    async with hand_gateway() as gateway:
        door = Door(gateway, renewed)
        lane = lane_at(door, float("inf"))
        monkeypatch.setattr(client_lanes, "_GRACE_SECONDS", 0.02)
        lane.check()
        await asyncio.wait_for(lane._keep("peer"), 2.0)
        assert gateway.errors.places == ["client_token"]
        assert door.closed[0].startswith("an internal error in client_token")


async def test_lane_is_closed_when_the_clock_passes_the_end_of_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the clock is set forward, the next call finds the token ended, and the client can open another lane."""
    async with hand_gateway() as gateway:
        door = client_door(gateway, None)
        closed: list[str] = []
        monkeypatch.setattr(door, "close", lambda _, why: closed.append(why))
        lane = lane_at(door, time.time() + 3000)
        keeping = asyncio.create_task(lane._keep("peer"))
        # The task waits for the token's end by a timer of a minute.
        await asyncio.sleep(0)
        monkeypatch.setattr(client_lanes, "time", lambda: time.time() + 3600)
        refused: list[UnlatchError] = []
        monkeypatch.setattr(gateway.calls, "refuse", lambda _, error, __: refused.append(error))
        assert lane._accept(None, Descriptor(call=1), []) is None
        await asyncio.wait_for(keeping, 30.0)
        assert [error.message for error in refused] == closed == [client_lanes._ENDED]


async def test_lane_whose_end_is_not_watched_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the task that watches a token's end must not leave the lane open for ever."""

    def renewed(*_: str) -> Identity:
        raise Unauthenticated("no")

    async with hand_gateway() as gateway:
        door = Door(gateway, renewed)
        once(monkeypatch, client_lanes._ClientLane, "_until_its_end")
        await asyncio.wait_for(lane_at(door, float("inf"))._keep("peer"), 2.0)
        assert gateway.errors.places == ["client_token"]
        assert len(door.closed) == 1


async def test_fault_as_a_lane_opens() -> None:
    """The caller hears INTERNAL before anything of it is read."""

    class Authentication:
        def identify(self, _: object) -> None:
            raise Fault

    class Aborted(Exception):
        pass

    class Rpc:
        def trailing_metadata(self) -> None:
            return None

        async def abort(self, code: object, message: str, _: object) -> None:
            raise Aborted(f"{code}: {message}")

    async with hand_gateway() as gateway:
        lanes = client_door(gateway, Authentication())
        with pytest.raises(Aborted, match="INTERNAL: an internal error in client_lane"):
            await lanes.open(None, Rpc())
        assert gateway.errors.places == ["client_lane"]
