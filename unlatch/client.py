"""The async client: kernels as methods, over one lane to a gateway.

async with Client("127.0.0.1:8001") as mesh:
    y = await mesh.normalise(points, eps=1e-6)
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self

import grpc.aio

from common.errors import DeadlineExceeded, Unavailable
from common.lane import MAX_MESSAGE_BYTES
from common.rpc import options
from common.spec import KernelSpec
from unlatch.link import Link, PendingCall, Token
from unlatch.results import Result

_CONNECT_SECONDS = 10.0


class Client:
    """A caller of one gateway. Its kernels are its methods: arrays by position or name, scalars by name.

    A call gives one array, or a named tuple of arrays where the kernel has several outputs, or raises an UnlatchError:
    InvalidArgument, NotFound, DeadlineExceeded, ResourceExhausted, Unavailable, Internal; from a gateway that asks who
    calls, Unauthenticated and PermissionDenied. `timeout` is in seconds and holds for each call that sets none itself.
    Cancelling a call frees what it holds at the other end. `priority` says who goes first where calls wait:
    "interactive", "normal" (unless given) or "background". `token` says who calls, to a gateway that asks: a token, or
    a function (it may be async) that gives one and is asked again before that ends.
    """

    def __init__(
        self, target: str = "127.0.0.1:8001", *, timeout: float | None = None, token: Token | None = None
    ) -> None:
        self._target = target
        self._timeout = timeout
        self._token = token
        self._channel: grpc.aio.Channel | None = None
        self._link: Link | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Result]]:
        if name.startswith("_"):
            raise AttributeError(name)
        return partial(self.call, name)

    async def close(self) -> None:
        """Close the lane; calls in flight fail."""
        if self._link is not None:
            await self._link.close()
        if self._channel is not None:
            await self._channel.close()
        self._link = self._channel = None

    async def kernels(self) -> list[KernelSpec]:
        """What the gateway serves."""
        link = await self._linked(self._timeout)
        return list(link.kernels.values())

    async def call(self, name: str, *arrays: Any, timeout: float | None = None, **named: Any) -> Result:
        """Call a kernel by name."""
        seconds = self._timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(seconds):
                link = await self._linked(seconds)
                caller = link.caller(name, named)
                await link.room()
                call = link.begin(caller, arrays, seconds)
                try:
                    return await call.result
                finally:
                    call.abandon()
        except Unavailable:
            # Who tries again at once, and for ever, must let the lane's reader say that there is a replica again.
            await asyncio.sleep(0)
            raise
        except TimeoutError:
            raise DeadlineExceeded(f"kernel {name} did not answer within {seconds:.3g} s") from None

    async def map(
        self,
        name: str,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        in_flight: int = 64,
        ordered: bool = True,
        timeout: float | None = None,
        **named: Any,
    ) -> AsyncIterator[Result]:
        """Call a kernel for each item, an array or a tuple of arrays, with at most `in_flight` calls at a time.

        Results come in the items' order, or as they are ready where `ordered` is false. `timeout` is each call's. The
        first call that fails ends the map, and with it what is in flight; so does leaving the loop over it.
        """
        if in_flight < 1:
            raise ValueError(f"in_flight must be at least 1, not {in_flight}")
        seconds = self._timeout if timeout is None else timeout
        link = await self._linked(seconds)
        caller = link.caller(name, named)
        calls = _InOrder() if ordered else _AsReady()
        try:
            async for item in _each(items):
                while len(calls) >= in_flight or (calls and not link.has_room):
                    yield await calls.next()
                await link.room()
                calls.add(link.begin(caller, item if isinstance(item, tuple) else (item,), seconds))
            while calls:
                yield await calls.next()
        finally:
            calls.abandon()

    async def _linked(self, timeout: float | None) -> Link:
        """The lane, opened anew if the last one broke."""
        if self._link is None or self._link.broken:
            if self._channel is None:
                self._channel = grpc.aio.insecure_channel(self._target, options=options(MAX_MESSAGE_BYTES))
            self._link = Link(self._channel, self._target, self._token)
        await self._link.ready(_CONNECT_SECONDS if timeout is None else min(timeout, _CONNECT_SECONDS))
        return self._link


class _InOrder:
    """Calls of a map whose results come in the order of the items."""

    def __init__(self) -> None:
        self._calls: deque[PendingCall] = deque()

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: PendingCall) -> None:
        self._calls.append(call)

    async def next(self) -> Result:
        # Left in place until it is done: a map that is cancelled while it waits here abandons this call too.
        given = await self._calls[0].result
        self._calls.popleft()
        return given

    def abandon(self) -> None:
        for call in self._calls:
            call.abandon()


class _AsReady:
    """Calls of a map whose results come as they are ready."""

    def __init__(self) -> None:
        self._calls: dict[asyncio.Future[Result], PendingCall] = {}
        self._ready: asyncio.Queue[asyncio.Future[Result]] = asyncio.Queue()

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: PendingCall) -> None:
        self._calls[call.result] = call
        call.result.add_done_callback(self._ready.put_nowait)

    async def next(self) -> Result:
        done = await self._ready.get()
        del self._calls[done]
        return done.result()

    def abandon(self) -> None:
        for call in self._calls.values():
            call.abandon()


async def _each(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
