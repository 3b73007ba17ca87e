"""A server's RPCs are served in the same way, whether acceptors take them or grpc.aio alone does."""

import asyncio
import gc
import os
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from structlog.testing import capture_logs

from tests.support.http2 import Http2
from tests.support.watching import until
from unlatch.common.errors import ResourceExhausted
from unlatch.common.net.rpc import Unary, abort, handlers, options
from unlatch.common.service import acceptors
from unlatch.common.service.acceptors import Acceptors, UnaryMethod, are_usable

SERVICE = "unlatch.Trial"
PATH = f"/{SERVICE}/Try"
MOST_BYTES = 1 << 20
WAYS = ["acceptors", "grpc.aio"]
CODE = grpc.StatusCode


class Running:
    """A server with the method, and a channel to it."""

    def __init__(self, way: str, answer: Unary, *settings: tuple[str, int]) -> None:
        self.server = grpc.aio.server(options=[*options(MOST_BYTES), *settings])
        self.server.add_generic_rpc_handlers((handlers(SERVICE, unary={"Try": answer, "Other": answer}),))
        method = UnaryMethod(SERVICE, "Try", answer)
        self.acceptors = Acceptors(self.server, method) if way == "acceptors" else None
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.channel = grpc.aio.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.call: Any = self.channel.unary_unary(PATH)

    async def start(self) -> None:
        await self.server.start()
        if self.acceptors is not None:
            self.acceptors.start()


Serve = Callable[..., Awaitable[Running]]


@pytest.fixture(params=WAYS)
async def serve(request: pytest.FixtureRequest) -> AsyncIterator[Serve]:
    """Start a server of a method, in one way or the other. Every server stops at the end."""
    running: list[Running] = []

    async def start(answer: Unary, *settings: tuple[str, int]) -> Running:
        running.append(Running(request.param, answer, *settings))
        await running[-1].start()
        return running[-1]

    yield start
    for each in running:
        await each.channel.close()
        await each.server.stop(None)
        # Nothing is left of the acceptors, nor of their RPCs.
        if (own := each.acceptors) is not None:
            await until(lambda: not (own.live or own._acceptors), "all is over")


async def echo(_: Any, context: Any) -> bytes:
    message: bytes = await context.read()
    return message


class Held:
    """A method whose calls wait until they are let go."""

    def __init__(self) -> None:
        self.waiting = self.cancelled = 0
        self.left: list[float | None] = []
        self.let_go = asyncio.Event()

    async def __call__(self, _: Any, context: Any) -> bytes:
        message: bytes = await context.read()
        self.left.append(context.time_remaining())
        self.waiting += 1
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        return message

    async def answer(self, request: Any, context: Any) -> bytes:
        """The method, as gRPC asks for it: a coroutine function."""
        return await self(request, context)


async def status(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def test_many_calls_at_once_get_their_own_answers(serve: Serve) -> None:
    """Far more of them than accepts are outstanding, on one connection."""
    running = await serve(echo)
    sent = [b"%d" % number * (number % 50) for number in range(1500)]
    assert await asyncio.gather(*map(running.call, sent)) == sent


async def test_largest_and_empty_messages_are_answered(serve: Serve) -> None:
    """Both are messages; one more byte is refused by gRPC, and the next call is served."""
    running = await serve(echo)
    for message in (b"", b"x" * MOST_BYTES):
        assert await running.call(message) == message
    code, details = await status(running.call(b"x" * (MOST_BYTES + 1)))
    assert (code, "larger than max" in details) == (CODE.RESOURCE_EXHAUSTED, True)
    assert await running.call(b"next") == b"next"


async def test_metadata_goes_both_ways(serve: Serve) -> None:
    """The caller's, the initial metadata, trailers, the peer, and a code that the handler sets."""

    async def answer(_: Any, context: Any) -> bytes:
        message: bytes = await context.read()
        await context.send_initial_metadata((("first", "1"),))
        came = dict(context.invocation_metadata())
        context.set_trailing_metadata((("last", came["mine"]), ("peer", context.peer())))
        if message:
            context.set_code(CODE.DATA_LOSS)
            context.set_details("lost")
        return b"answer"

    running = await serve(answer)
    call = running.call(b"", metadata=(("mine", "2"),))
    assert await call == b"answer"
    assert dict(await call.initial_metadata())["first"] == "1"
    trailers = dict(await call.trailing_metadata())
    assert trailers["last"] == "2"
    assert trailers["peer"].startswith("ipv4:127.0.0.1:")
    assert await status(running.call(b"x", metadata=(("mine", "2"),))) == (CODE.DATA_LOSS, "lost")


async def test_errors_become_statuses(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """An abort with its trailers before a message is read, an unexpected exception, and a method that is not there."""

    async def answer(_: Any, context: Any) -> bytes:
        if "abort" in dict(context.invocation_metadata()):
            await abort(context, ResourceExhausted("full", retry_after_milliseconds=7))
        raise ValueError("unexpected")

    running = await serve(answer)
    call = running.call(b"", metadata=(("abort", "1"),))
    assert await status(call) == (CODE.RESOURCE_EXHAUSTED, "full")
    assert dict(await call.trailing_metadata())["grpc-retry-pushback-ms"] == "7"
    assert not caplog.records
    code, details = await status(running.call(b""))
    assert (code, "unexpected" in details) == (CODE.UNKNOWN, True)
    assert PATH in caplog.text
    missing: Any = running.channel.unary_unary(f"/{SERVICE}/Missing")
    assert (await status(missing(b"")))[0] == CODE.UNIMPLEMENTED


async def test_calls_that_end_early_cancel_their_handlers(serve: Serve) -> None:
    """By their caller, by their deadline, and with their connection; handlers see the deadline."""
    held = Held()
    running = await serve(held.answer)
    calls = [running.call(b"") for _ in range(40)]
    await until(lambda: held.waiting == 40, "all calls are here")
    assert set(held.left) == {None}
    for call in calls:
        call.cancel()
    await until(lambda: held.cancelled == 40, "all handlers are cancelled")
    late = [running.call(b"", timeout=0.5) for _ in range(40)]
    assert {(await status(call))[0] for call in late} == {CODE.DEADLINE_EXCEEDED}
    await until(lambda: not held.waiting, "no handler runs")
    assert all(left is not None and 0 <= left <= 0.5 for left in held.left[40:])
    cut = [asyncio.ensure_future(status(running.call(b""))) for _ in range(40)]
    await until(lambda: held.waiting == 40, "all calls are here again")
    await running.channel.close()
    await asyncio.gather(*cut, return_exceptions=True)
    await until(lambda: not held.waiting, "no handler runs")


async def test_task_of_a_call_is_done_when_its_answer_is_sent(serve: Serve) -> None:
    """An answer that its caller does not read is not sent: the handler has returned, and its task goes on."""
    tasks: list[asyncio.Task[Any]] = []

    async def answer(_: Any, context: Any) -> bytes:
        await context.read()
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        return b"x" * 1000

    running = await serve(answer)
    assert await running.call(b"") == b"x" * 1000
    await until(tasks[0].done, "the first is sent")

    def unread() -> Http2:
        connection = Http2(running.address, window=0)
        connection.send(connection.begin(PATH), b"")
        return connection

    connection = await asyncio.to_thread(unread)
    await until(lambda: len(tasks) == 2, "the second is answered")
    # A call that comes later is over earlier.
    assert await running.call(b"") == b"x" * 1000
    await until(tasks[2].done, "the third is sent")
    assert not tasks[1].done()
    connection.__exit__(None, None, None)
    await until(tasks[1].done, "the second's connection is gone")


async def test_requests_are_not_read_before_the_handler_asks(serve: Serve) -> None:
    """A handler that refuses a call has read nothing of it, and one that waits for a message can be cancelled."""
    waiting = asyncio.Event()

    async def answer(_: Any, context: Any) -> bytes:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_later(0.01, waiting.set)
        asyncio.get_running_loop().call_later(0.02, task.cancel)
        try:
            await context.read()
        except asyncio.CancelledError:
            task.uncancel()
            await abort(context, ResourceExhausted("too late"))
        return b""

    running = await serve(answer)
    open_call: Any = running.channel.stream_unary(PATH)
    never = open_call()
    await waiting.wait()
    assert await status(never) == (CODE.RESOURCE_EXHAUSTED, "too late")


@pytest.mark.parametrize("grace", [None, 0.05, 30.0])
async def test_stopping_ends_or_answers_calls(serve: Serve, grace: float | None) -> None:
    """Calls in flight are cancelled without a grace and after it, and answered within it; no new call comes in."""
    held = Held()
    running = await serve(held.answer)
    calls = [asyncio.ensure_future(running.call(b"x").code()) for _ in range(40)]
    await until(lambda: held.waiting == 40, "all calls are here")
    stopping = asyncio.ensure_future(running.server.stop(grace))
    if grace == 30.0:
        await asyncio.sleep(0)
        held.let_go.set()
    await stopping
    codes = set(await asyncio.gather(*calls))
    if grace == 30.0:
        # gRPC's server may close a connection before the last answers are written to it.
        assert CODE.OK in codes
        assert codes <= {CODE.OK, CODE.UNAVAILABLE}
    else:
        assert CODE.OK not in codes
    await until(lambda: not held.waiting, "no handler runs")
    assert (await status(running.call(b"", timeout=5)))[0] in {CODE.UNAVAILABLE, CODE.CANCELLED}


async def test_streams_over_the_limit_wait_with_their_caller(serve: Serve) -> None:
    """As gRPC's clients do with MAX_CONCURRENT_STREAMS: no more handlers run than that, and every call is answered."""
    held = Held()
    running = await serve(held.answer, ("grpc.max_concurrent_streams", 5), ("grpc.http.overload_protection", 0))
    calls = [asyncio.ensure_future(running.call(b"x")) for _ in range(50)]
    await until(lambda: held.waiting == 5, "as many calls as may be are here")
    held.let_go.set()
    assert await asyncio.gather(*calls) == [b"x"] * 50


async def test_other_methods_of_the_service_are_served(serve: Serve) -> None:
    """By grpc.aio, beside the method that is accepted ahead."""
    running = await serve(echo)
    other: Any = running.channel.unary_unary(f"/{SERVICE}/Other")
    calls = [call(b"%d" % number) for number in range(100) for call in (running.call, other)]
    assert await asyncio.gather(*calls) == [b"%d" % number for number in range(100) for _ in range(2)]


async def test_ended_calls_need_no_garbage_collection(serve: Serve) -> None:
    """A call frees all that it holds as soon as it is answered."""
    contexts: list[weakref.ref[Any]] = []

    class Marker:
        pass

    async def answer(_: Any, context: Any) -> bytes:
        marker = Marker()
        contexts.append(weakref.ref(marker))
        message: bytes = await context.read()
        return message

    running = await serve(answer)
    gc.disable()
    try:
        await asyncio.gather(*(running.call(b"x") for _ in range(100)))
        await until(lambda: not any(context() for context in contexts), "all is free")
        assert len(contexts) == 100
        if (own := running.acceptors) is not None:
            await until(lambda: not own.live, "no call is live")
    finally:
        gc.enable()


async def test_most_calls_come_by_acceptors() -> None:
    """Acceptors take their part: else nothing would show that they stand still."""
    held = Held()
    running = Running("acceptors", held.answer)
    await running.start()
    calls = [asyncio.ensure_future(running.call(b"x")) for _ in range(200)]
    await until(lambda: held.waiting == 200, "all calls are here")
    assert running.acceptors is not None
    assert len(running.acceptors.live) > 150
    held.let_go.set()
    assert await asyncio.gather(*calls) == [b"x"] * 200
    await running.channel.close()
    await running.server.stop(None)


async def test_installed_grpcio_is_one_that_acceptors_were_tested_with() -> None:
    """A new version of grpcio fails here: compare its aio/server.pyx.pxi with the version before, and measure."""
    assert acceptors._unfit() == ""
    assert await are_usable()


UNFIT: dict[str, tuple[str, object, str]] = {
    "another version": ("_TESTED", ("1.2",), "is not one of the tested versions (1.2)"),
    "a part that is gone": ("_PARAMETERS", {"AioServer.accept": ("self",)}, "has no AioServer.accept"),
    "other parameters": ("_PARAMETERS", {"_handle_rpc": ("rpc",)}, "grpcio's _handle_rpc takes method_name, "),
    "a trial that takes too long": ("_TRIAL_SECONDS", 0.0, "their trial failed: TimeoutError"),
}


@pytest.mark.parametrize("case", UNFIT)
async def test_unfit_grpcio_is_told_in_one_line(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service goes on by grpc.aio alone, and the log says why."""
    name, value, reason = UNFIT[case]
    monkeypatch.setattr(acceptors, name, value)
    with capture_logs() as lines:
        assert not await are_usable()
    (line,) = lines
    assert line["event"] == "RPCs are accepted one at a time"
    assert reason in line["reason"]


async def test_trial_leaves_nothing_behind() -> None:
    """No descriptor and no task is left of it, however often it runs."""
    await are_usable()
    tasks = len(asyncio.all_tasks())

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for _ in range(3):
        assert await are_usable()
    await until(lambda: descriptors() <= before, "its sockets are closed")
    await until(lambda: len(asyncio.all_tasks()) <= tasks, "its tasks are done")
