"""The async client: kernels as methods, over one lane to a gateway.

async with Client("127.0.0.1:8001") as mesh:
    y = await mesh.normalise(points, eps=1e-6)
"""

import asyncio
import os
import random
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from numbers import Real
from time import monotonic
from types import TracebackType
from typing import Any, Self

from unlatch.arrays import Copies, RequestBuilder
from unlatch.common.errors import (
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    shown,
)
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.kernel.tensors import Array
from unlatch.common.lane.frames import MAX_MESSAGE_BYTES
from unlatch.common.net.addresses import has_no_such_port, is_url
from unlatch.common.net.rpc import options
from unlatch.common.security.tls import ChannelSecurity
from unlatch.link import Link, PendingCall, Token
from unlatch.methods import KernelMethods
from unlatch.results import Result
from unlatch.security import TLS

_CONNECT_SECONDS = 10.0
# Seconds for which a lane goes on while no new one opens with the current certificates, and the pause between tries.
_RENEW_SECONDS, _RENEW_PAUSE_SECONDS = 10.0, 0.25
_RENEW_SPREAD_SECONDS = 0.25
_MAX_TIMEOUT_SECONDS = 1e9
# The process in which clients use gRPC. It does not work in processes that are forked from that one.
_grpc_used_in: set[int] = set()


class Client(KernelMethods[Coroutine[Any, Any, Result]]):
    """An async caller of one gateway. Kernels are its methods: arrays by position or name, scalars by name.

    A call takes the bytes of its arrays when it is awaited, or begun as a task: they may be changed from then on.

    A call returns one array, or a named tuple of arrays if the kernel has several outputs, or raises an UnlatchError:
    InvalidArgument, NotFound, DeadlineExceeded, ResourceExhausted, Aborted, Unavailable or Internal; also
    Unauthenticated and PermissionDenied, if the gateway authenticates callers. Cancelling a call frees what it holds in
    the mesh.

    - `timeout`: seconds for each call that sets none itself.
    - `priority` (of a call): "interactive", "normal" (the default) or "background"; the order in which calls wait.
    - `token`: the caller's token, or a function (sync or async) that returns one and is called again before it expires.
    - `proxy`: use the proxy that `https_proxy` or `http_proxy` names; by default, for public addresses only.
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
        proxy: bool | None = None,
    ) -> None:
        if not _is_target(target):
            raise InvalidArgument(f"target: wanted an address such as HOST:PORT, got {target!a:.64}", field="target")
        _check("tls", tls, isinstance(tls, bool | TLS | None), "a TLS, True or False")
        _check("proxy", proxy, isinstance(proxy, int | None), "True, False or None")
        is_token = isinstance(token, str | None) or callable(token)
        # The value may be a secret.
        _check("token", type(token), is_token, "a text, or a function that returns one")
        self._target = target
        self._options = options(MAX_MESSAGE_BYTES)
        if proxy is not None:
            self._options.append(("grpc.enable_http_proxy", int(proxy)))
        self._timeout = timeout
        self._token = token
        self._tls = TLS() if tls is True else tls or None
        self._security: ChannelSecurity | None = None
        self._link: Link | None = None
        self._copies = Copies()
        self._closed = False
        # All open lanes, including replaced ones whose last calls are not answered yet.
        self._links: set[Link] = set()
        self._tending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all lanes. Calls in flight fail, and so do further calls."""
        self._closed = True
        for task in self._tending:
            task.cancel()
        await asyncio.gather(*self._tending, *(link.close() for link in self._links), return_exceptions=True)
        self._link = self._security = None
        self._links.clear()

    async def kernels(self) -> list[KernelSpec]:
        """List the kernels that the gateway serves."""
        link = await self._linked(self._seconds(None))
        return list(link.kernels.values())

    async def call(self, name: str, /, *arrays: Any, timeout: float | None = None, **named: Any) -> Result:
        """Call a kernel by name, and return its result."""
        seconds = self._seconds(timeout)
        copy, began = self._copies.of_array, asyncio.get_running_loop().time()
        try:
            if (link := self._link_if_open()) is None:
                arrays, named = self._copies.of(arrays), {key: self._copies.of(value) for key, value in named.items()}
                link, copy = await self._linked(seconds), as_it_is
            call = link.begin(link.request(name, named, copy), arrays, seconds, began=began)
            try:
                return await call.result
            finally:
                call.abandon()
        except Unavailable:
            # A caller that retries at once, in a loop, must let the lane's reader run to learn of new replicas.
            await asyncio.sleep(0)
            raise

    async def map(
        self,
        name: str,
        items: Iterable[Any] | AsyncIterable[Any],
        /,
        *,
        in_flight: int = 64,
        ordered: bool = True,
        timeout: float | None = None,
        **named: Any,
    ) -> AsyncIterator[Result]:
        """Call a kernel for each item, an array or a tuple of arrays, with at most `in_flight` calls at a time.

        Results come in the order of the items, or in the order of completion if `ordered` is false. `timeout` is each
        call's. The bytes of an item are taken before the next item is. The first failed call ends the map and cancels
        the calls in flight; so does leaving the loop over it. Its error has the number of its item, `error.item`.
        """
        calls = await self._begin_map(name, named, in_flight, timeout, self._copies.of_array, ordered=ordered)
        try:
            async for item in _each(items):
                while calls.is_full:
                    yield await calls.next()
                await calls.begin(item)
            while calls:
                yield await calls.next()
        finally:
            calls.abandon()

    async def _begin_map(
        self,
        name: str,
        named: Mapping[str, Any],
        in_flight: int,
        timeout: float | None,
        copy: Callable[[Array], Array],
        *,
        ordered: bool,
    ) -> "MapCalls":
        """Make what holds the calls of a map. Raises UnlatchError."""
        if not isinstance(in_flight, int) or in_flight < 1:
            wanted = "wanted a whole number of at least 1"
            raise InvalidArgument(f"in_flight: {wanted}, got {shown(in_flight)}", field="in_flight")
        seconds = self._seconds(timeout)
        if self._link_if_open() is None:
            named = {key: self._copies.of(value) for key, value in named.items()}
        link = await self._linked(seconds)
        return MapCalls(self._linked, link, link.request(name, named, copy), in_flight, seconds, ordered=ordered)

    def _seconds(self, timeout: float | None) -> float | None:
        """A call's time: its own, or the client's. Raises InvalidArgument."""
        seconds = self._timeout if timeout is None else timeout
        if seconds is None:
            return None
        if not isinstance(seconds, Real) or not abs(seconds) <= _MAX_TIMEOUT_SECONDS:
            wanted = f"wanted a number of seconds, at most {_MAX_TIMEOUT_SECONDS:g}, or None for no limit"
            raise InvalidArgument(f"timeout: {wanted}; got {shown(seconds)}", field="timeout")
        return float(seconds)

    async def _linked(self, timeout: float | None) -> Link:
        """The current lane; a new one if the last one broke. Raises UnlatchError."""
        if (link := self._link_if_open()) is not None:
            return link
        if self._closed:
            raise FailedPrecondition("this client is closed; make another one")
        security = self._security or await self._secured()
        if self._link is None or self._link.broken:
            self._link = self._new_link(security)
        link = self._link
        await link.ready(_CONNECT_SECONDS if timeout is None else min(timeout, _CONNECT_SECONDS))
        return link

    def _link_if_open(self) -> Link | None:
        """The current lane, if it is open."""
        link = self._link
        if link is None:
            return None
        if link.loop is not asyncio.get_running_loop() and not link.broken:
            raise FailedPrecondition("this client is used on another event loop; make a client on each loop")
        return link if link.is_open else None

    def _known_kernels(self) -> Mapping[str, KernelSpec]:
        return {} if self._link is None else self._link.kernels

    def __repr__(self) -> str:
        kernels = len(self._known_kernels())
        state = "closed" if self._closed else f"connected, {kernels} kernels" if kernels else "not connected"
        return f"<{type(self).__name__} of {self._target}: {state}>"

    def _new_link(self, security: ChannelSecurity) -> Link:
        claim_process()
        self._links = {link for link in self._links if not link.broken}
        link = Link(security.open_channel(self._target, self._options), self._target, self._token)
        self._links.add(link)
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
        """Replace a lane when its gateway drains, or either end's certificates have changed.

        If no other can be opened, the lane goes on until its gateway ends; with old certificates, it is closed.
        """
        try:
            await self._replace(link, security)
        finally:
            link.give_up()

    async def _replace(self, link: Link, security: ChannelSecurity) -> None:
        await link.until_another_is_wanted(security)
        # The gateway asks all its clients at the same time, and each handshake costs a millisecond.
        await asyncio.sleep(random.uniform(0.0, _RENEW_SPREAD_SECONDS))  # noqa: S311 (jitter)
        last = monotonic() + _RENEW_SECONDS
        while link.wants_successor:
            other = self._new_link(security)
            try:
                await other.ready(_CONNECT_SECONDS)
            except (Unavailable, Unauthenticated, PermissionDenied):
                await other.close()
                if link.broken or (monotonic() > last and not link.draining):
                    await link.close()
                    return
                await asyncio.sleep(_RENEW_PAUSE_SECONDS)
                continue
            if self._link is None or self._link is link or self._link.broken:
                self._link = other
            else:
                await other.close()
            link.finish(self._link)
            return

    def _tend(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tending.add(task)
        task.add_done_callback(self._tending.discard)


class MapCalls:
    """The calls of a map that are in flight. Their results come in the order of the items, or as they are ready."""

    def __init__(
        self,
        linked: Callable[[float | None], Awaitable[Link]],
        link: Link,
        request: RequestBuilder,
        in_flight: int,
        seconds: float | None,
        *,
        ordered: bool,
    ) -> None:
        self.loop = link.loop
        self._linked = linked
        self._link = link
        self._request = request
        self._in_flight = in_flight
        self._seconds = seconds
        self._begun = 0
        self._calls: dict[asyncio.Future[Result], PendingCall] = {}
        self._ended: asyncio.Queue[asyncio.Future[Result]] | None = None if ordered else asyncio.Queue()

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def is_full(self) -> bool:
        """Whether a result should be taken before the next call begins."""
        return len(self) >= self._in_flight or (len(self) > 0 and not self._link.has_room)

    @property
    def has_next(self) -> bool:
        """Whether the next result is here."""
        return next(iter(self._calls)).done() if self._ended is None else not self._ended.empty()

    async def begin(self, item: Any) -> None:
        """Begin the call of an item. Raises UnlatchError if there is no lane for it; what else fails is its result."""
        self._link = await self._linked(self._seconds)
        arguments = item if isinstance(item, tuple) else (item,)
        call = self._link.begin(self._request, arguments, self._seconds, item=self._begun)
        self._begun += 1
        self._calls[call.result] = call
        if self._ended is not None:
            call.result.add_done_callback(self._ended.put_nowait)

    async def next(self) -> Result:
        """Wait for the next result. Raises the error of its call."""
        future = next(iter(self._calls)) if self._ended is None else await self._ended.get()
        # Removed only when it is done, so that a map cancelled during this wait abandons this call too.
        result = await future
        del self._calls[future]
        return result

    def abandon(self) -> None:
        """Cancel the calls that are left."""
        for call in self._calls.values():
            call.abandon()


def claim_process() -> None:
    """Note that clients use gRPC in this process. Raises FailedPrecondition if it was forked from one that used it."""
    if _grpc_used_in - {os.getpid()}:
        raise FailedPrecondition(
            "gRPC was used before this process was forked, and does not work in it; make the first call after the "
            "fork, or start processes by 'spawn' or 'forkserver'"
        )
    _grpc_used_in.add(os.getpid())


def as_it_is(array: Array) -> Array:
    """Return an array that is not changed while it is sent."""
    return array


async def _each(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in iterated(items):
            yield item


def _is_target(target: object) -> bool:
    """Whether gRPC may be asked to connect to this."""
    if not isinstance(target, str) or not target or not target.isprintable():
        return False
    return not has_no_such_port(target) and not is_url(target)


def _check(name: str, value: object, is_right: bool, wanted: str) -> None:  # noqa: FBT001 (the test of the value)
    if not is_right:
        raise InvalidArgument(f"{name}: wanted {wanted}, got {shown(value)}", field=name)


def iterated(items: Iterable[Any]) -> Iterator[Any]:
    """Return an iterator over the items of a map. Raises InvalidArgument."""
    try:
        return iter(items)
    except TypeError:
        raise InvalidArgument(f"items: wanted several items, got {type(items).__name__}", field="items") from None
