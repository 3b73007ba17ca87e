"""The async client: kernels as methods, over one lane to a gateway.

async with Client("127.0.0.1:8001") as mesh:
    y = await mesh.normalise(points, eps=1e-6)
"""

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Any, Self

from unlatch.common.errors import DeadlineExceeded, PermissionDenied, Unauthenticated, Unavailable
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.lane.frames import MAX_MESSAGE_BYTES
from unlatch.common.net.rpc import options
from unlatch.common.security.tls import ChannelSecurity
from unlatch.link import Link, PendingCall, Token
from unlatch.results import Result
from unlatch.security import TLS

_CONNECT_SECONDS = 10.0
# Seconds for which a lane goes on while no new one opens with the current certificates, and the pause between tries.
_RENEW_SECONDS, _RENEW_PAUSE_SECONDS = 10.0, 0.25
_RENEW_SPREAD_SECONDS = 0.25


class Client:
    """An async caller of one gateway. Kernels are its methods: arrays by position or name, scalars by name.

    A call returns one array, or a named tuple of arrays if the kernel has several outputs, or raises an UnlatchError:
    InvalidArgument, NotFound, DeadlineExceeded, ResourceExhausted, Unavailable or Internal; also Unauthenticated and
    PermissionDenied, if the gateway authenticates callers. Cancelling a call frees what it holds in the mesh.

    - `timeout`: seconds for each call that sets none itself.
    - `priority` (of a call): "interactive", "normal" (the default) or "background"; the order in which calls wait.
    - `token`: the caller's token, or a function (sync or async) that returns one and is called again before it expires.
    - `tls`: the TLS files; True is TLS with the public authorities. With an invalid file the first call raises
      CertificateError.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:8001",
        *,
        tls: TLS | bool = False,
        timeout: float | None = None,
        token: Token | None = None,
    ) -> None:
        self._target = target
        self._timeout = timeout
        self._token = token
        self._tls = TLS() if tls is True else tls or None
        self._security: ChannelSecurity | None = None
        self._link: Link | None = None
        # All open lanes, including replaced ones whose last calls are not answered yet.
        self._links: set[Link] = set()
        self._tending: set[asyncio.Task[None]] = set()

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
        """Close all lanes. Calls in flight fail."""
        for task in self._tending:
            task.cancel()
        await asyncio.gather(*self._tending, *(link.close() for link in self._links), return_exceptions=True)
        self._link = self._security = None
        self._links.clear()

    async def kernels(self) -> list[KernelSpec]:
        """List the kernels that the gateway serves."""
        link = await self._linked(self._timeout)
        return list(link.kernels.values())

    async def call(self, name: str, *arrays: Any, timeout: float | None = None, **named: Any) -> Result:
        """Call a kernel by name, and return its result."""
        seconds = self._timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(seconds):
                link = await self._linked(seconds)
                request = link.request(name, named)
                link = await self._roomy(link, seconds)
                call = link.begin(request, arrays, seconds)
                try:
                    return await call.result
                finally:
                    call.abandon()
        except Unavailable:
            # A caller that retries at once, in a loop, must let the lane's reader run to learn of new replicas.
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

        Results come in the order of the items, or in the order of completion if `ordered` is false. `timeout` is each
        call's. The first failed call ends the map and cancels the calls in flight; so does leaving the loop over it.
        """
        if in_flight < 1:
            raise ValueError(f"in_flight must be at least 1, not {in_flight}")
        seconds = self._timeout if timeout is None else timeout
        link = await self._linked(seconds)
        request = link.request(name, named)
        calls = _InOrder() if ordered else _AsReady()
        try:
            async for item in _each(items):
                while len(calls) >= in_flight or (calls and not link.has_room):
                    yield await calls.next()
                link = await self._roomy(link, seconds)
                calls.add(link.begin(request, item if isinstance(item, tuple) else (item,), seconds))
            while calls:
                yield await calls.next()
        finally:
            calls.abandon()

    async def _roomy(self, link: Link, timeout: float | None) -> Link:
        """Wait until the window lets one more call out, to be sent at once. Returns this lane, or its replacement."""
        await link.room()
        while link.finishing:
            link = await self._linked(timeout)
            await link.room()
        return link

    async def _linked(self, timeout: float | None) -> Link:
        """The current lane; a new one if the last one broke."""
        security = self._security or await self._secured()
        if self._link is None or self._link.broken:
            self._link = self._opened(security)
        link = self._link
        await link.ready(_CONNECT_SECONDS if timeout is None else min(timeout, _CONNECT_SECONDS))
        return link

    def _opened(self, security: ChannelSecurity) -> Link:
        self._links = {link for link in self._links if not link.broken}
        link = Link(security.open_channel(self._target, options(MAX_MESSAGE_BYTES)), self._target, self._token)
        self._links.add(link)
        if self._tls is not None:
            self._tend(self._renew(link, security))
        return link

    async def _secured(self) -> ChannelSecurity:
        """Read the certificates, watch them for changes, and return how channels are opened."""
        certificates = None if self._tls is None else await asyncio.to_thread(self._tls.certificates)
        if self._security is None:
            self._security = ChannelSecurity(certificates, "" if self._tls is None else self._tls.name)
            if certificates is not None:
                self._tend(certificates.watch())
        return self._security

    async def _renew(self, link: Link, security: ChannelSecurity) -> None:
        """Replace a lane when either end's certificates have changed; close it if no other can be opened."""
        await link.until_another_is_wanted(security)
        # The gateway asks all its clients at the same time, and each handshake costs it a millisecond.
        await asyncio.sleep(random.uniform(0.0, _RENEW_SPREAD_SECONDS))  # noqa: S311 (jitter)
        last = monotonic() + _RENEW_SECONDS
        while not link.broken:
            other = self._opened(security)
            try:
                await other.ready(_CONNECT_SECONDS)
            except (Unavailable, Unauthenticated, PermissionDenied):
                await other.close()
                if monotonic() > last:
                    await link.close()
                await asyncio.sleep(_RENEW_PAUSE_SECONDS)
                continue
            if self._link is link:
                self._link = other
            else:
                await other.close()
            link.finish()
            return

    def _tend(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tending.add(task)
        task.add_done_callback(self._tending.discard)


class _InOrder:
    """Calls of a map whose results are returned in the order of the items."""

    def __init__(self) -> None:
        self._calls: deque[PendingCall] = deque()

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: PendingCall) -> None:
        self._calls.append(call)

    async def next(self) -> Result:
        # Removed only when it is done, so that a map cancelled during this wait abandons this call too.
        given = await self._calls[0].result
        self._calls.popleft()
        return given

    def abandon(self) -> None:
        for call in self._calls:
            call.abandon()


class _AsReady:
    """Calls of a map whose results are returned in the order of completion."""

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
