"""Acceptors: accept the RPCs of one method several at a time, by parts of grpcio that are not its public API.

grpc.aio's server accepts one RPC, and some rounds of the loop later the next one. Each takes three tasks. Acceptors
keep several accepts outstanding, and one task is started for each RPC. What follows the accept is grpcio's own code:
reading, answers, aborts, exceptions, cancellation (docs/decisions/0027-acceptors.md).

Parts that are not public may change with any version. So acceptors are used only with a version of grpcio that they
were tested with, that has every part with the parameters known, and that passes a trial when the service starts.
Otherwise the service accepts RPCs by grpc.aio alone, and says why in its log.
"""

import asyncio
import inspect
from collections.abc import Coroutine
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import grpc.aio
import structlog
from grpc._cython import cygrpc  # type: ignore[attr-defined] # a compiled module, which the stubs leave out

from unlatch.common.net.rpc import Unary, options
from unlatch.common.security.tls import ChannelSecurity

log = structlog.get_logger()

# Minor versions of grpcio that acceptors were tested with.
_TESTED = ("1.85",)
_PARAMETERS = {
    "AioServer.is_running": ("self",),
    "AioServer._request_registered_call": ("self", "method"),
    "_handle_stream_unary_rpc": ("method_handler", "rpc_state", "loop"),
    "_schedule_rpc_coro": ("rpc_coro", "rpc_state", "loop", "method_name"),
}
# With 32 calls in flight, 32 accepts cost no less of the processor. A round of the loop may start as many calls.
_OUTSTANDING = 16
_TRIAL_SECONDS = 5.0
_TRIAL_BYTES = 1024


@dataclass(frozen=True)
class UnaryMethod:
    """A method of one request and one answer, as its handler reads it (common/net/rpc.py)."""

    service: str
    name: str
    answer: Unary


class Acceptors:
    """Accepts the RPCs of a method beside grpc.aio, which accepts one in seventeen of them in its own way.

    Made before its server starts, and started after it. Ends when the server stops.
    """

    def __init__(self, server: grpc.aio.Server, method: UnaryMethod) -> None:
        self._server: Any = server._server  # type: ignore[attr-defined] # noqa: SLF001 (grpcio's parts)
        self._path = f"/{method.service}/{method.name}"
        self._handler: Any = grpc.stream_unary_rpc_method_handler(method.answer)
        # Only registered methods can be accepted by name.
        server.add_registered_method_handlers(method.service, {method.name: self._handler})
        # RPCs that were accepted here and are not over, and the acceptors.
        self.live: set[_Stepped] = set()
        self._acceptors: set[_Stepped] = set()

    def start(self) -> None:
        """Begin to accept."""
        for _ in range(_OUTSTANDING):
            _Stepped(self._accept(), self._acceptors)()

    async def _accept(self) -> None:
        loop, path = asyncio.get_running_loop(), self._path
        method = path.encode()
        while self._server.is_running():
            try:
                state = await self._server._request_registered_call(method)  # noqa: SLF001 (grpcio's parts)
            except cygrpc._RequestCallError:  # noqa: SLF001 (likewise)
                # The RPC was over before it was accepted, or the server stops.
                continue
            rpc = cygrpc._handle_stream_unary_rpc(self._handler, state, loop)  # noqa: SLF001 (likewise)
            # Starts the RPC's task, and then waits until the RPC is over.
            _Stepped(cygrpc._schedule_rpc_coro(rpc, state, loop, path), self.live)()  # noqa: SLF001 (likewise)
            # The next accept may take long, and an RPC's memory is free when nothing refers to it.
            del state, rpc


class _Stepped:
    """Steps a coroutine whenever the future is done that it waits for.

    A task would do the same for 4 µs more, and the end of a loop would cancel it. The coroutine of an acceptor must not
    end before gRPC has let go of the memory that it accepts an RPC into.
    """

    def __init__(self, coroutine: Coroutine[Any, None, None], running: "set[_Stepped]") -> None:
        self._coroutine = coroutine
        self._running = running
        running.add(self)

    def __call__(self, _: object = None) -> None:
        try:
            waited = self._coroutine.send(None)
        except BaseException as error:
            self._running.discard(self)
            if isinstance(error, StopIteration):
                return
            if not isinstance(error, Exception):
                raise
            asyncio.get_running_loop().call_exception_handler({"message": "an accepted RPC failed", "exception": error})
        else:
            # A future says so to the task that it is about to suspend, and the task takes note.
            waited._asyncio_future_blocking = False  # noqa: SLF001 (the protocol of tasks and futures)
            waited.add_done_callback(self)


async def are_usable() -> bool:
    """Whether acceptors work with the grpcio that is installed. The log says why, where they do not."""
    reason = _unfit()
    if not reason:
        try:
            async with asyncio.timeout(_TRIAL_SECONDS):
                await _try()
        except Exception as error:  # noqa: BLE001 (whatever is wrong with them, the service can do without)
            reason = f"their trial failed: {error!r}"
    if reason:
        log.warning("RPCs are accepted one at a time", reason=reason)
    return not reason


def _unfit() -> str:
    """Return the reason against using grpcio's parts that shows before they are used, or nothing."""
    if grpc.__version__.rpartition(".")[0] not in _TESTED:
        return f"grpcio {grpc.__version__} is not one of the tested versions ({', '.join(_TESTED)})"
    if not hasattr(cygrpc, "_RequestCallError"):
        return f"grpcio {grpc.__version__} has no _RequestCallError"
    for name, wanted in _PARAMETERS.items():
        try:
            found = tuple(inspect.signature(attrgetter(name)(cygrpc)).parameters)
        except (AttributeError, TypeError, ValueError):
            return f"grpcio {grpc.__version__} has no {name}"
        if found != wanted:
            return f"grpcio's {name} takes {', '.join(found)}, not {', '.join(wanted)}"
    return ""


async def _try() -> None:
    """Answer calls, and cancel calls, by acceptors of a server on a free port of loopback."""
    arrived, left = asyncio.Semaphore(0), asyncio.Semaphore(0)

    async def answer(_: Any, context: Any) -> bytes:
        message: bytes = await context.read()
        if message:
            return message
        arrived.release()
        try:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]
        finally:
            left.release()

    method = UnaryMethod("unlatch.Trial", "Try", answer)
    server = grpc.aio.server(options=options(_TRIAL_BYTES))
    acceptors = Acceptors(server, method)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    acceptors.start()
    try:
        async with ChannelSecurity().open_channel(address, options(_TRIAL_BYTES)) as channel:
            call: Any = channel.unary_unary(f"/{method.service}/{method.name}")
            # More than grpc.aio's own accept can take.
            sent = [b"%d" % number for number in range(_OUTSTANDING)]
            if await asyncio.gather(*map(call, sent)) != sent:
                raise AssertionError("answers are not those of their calls")
            waiting = [call(b"") for _ in range(2)]
            for _ in waiting:
                await arrived.acquire()
            if not acceptors.live:
                raise AssertionError("no call came by an acceptor")
            for each in waiting:
                each.cancel()
                await left.acquire()
    finally:
        async with asyncio.timeout(_TRIAL_SECONDS):
            await server.stop(None)
