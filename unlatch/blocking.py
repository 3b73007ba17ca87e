"""The blocking client: an async client on a thread of its own, for scripts, notebooks and threads.

The thread starts with the first call, so a client may be made before a fork and used after it.
"""

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from time import monotonic
from types import TracebackType
from typing import Any, Self, TypeVar

from unlatch.arrays import Copies
from unlatch.client import Client, MapCalls, as_it_is, claim_process, iterated
from unlatch.common.errors import FailedPrecondition, UnlatchError
from unlatch.common.kernel.spec import KernelSpec
from unlatch.link import Token
from unlatch.methods import KernelMethods
from unlatch.results import Result
from unlatch.security import TLS

T = TypeVar("T")

# A blocking map passes items and results between threads in bunches, since crossing threads costs more than a call
# does. It passes what it has when taking a bunch of items has taken this long.
_BUNCH = 64
_BUNCH_SECONDS = 0.001
_END_SECONDS = 1.0
# For the list of kernels that `dir` and tab completion show.
_LIST_SECONDS = 1.0


class BlockingClient(KernelMethods[Result]):
    """A Client without `await`, for use from any thread. If `token` is a function, the client's own thread calls it."""

    def __init__(
        self,
        target: str = "127.0.0.1:8001",
        *,
        tls: TLS | bool = False,
        timeout: float | None = None,
        token: Token | None = None,
        proxy: bool | None = None,
    ) -> None:
        self._client = Client(target, tls=tls, timeout=timeout, token=token, proxy=proxy)
        self._lock = threading.RLock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the lane and end the thread. Calls in flight fail, and so do further calls."""
        closed, self._closed = self._closed, True
        if closed or self._loop is None or self._thread is None:
            return
        with suppress(FailedPrecondition):
            claim_process()
            # After what other threads have handed to the loop.
            with self._lock:
                asyncio.run_coroutine_threadsafe(_close(self._client, self._loop), self._loop)
            if threading.current_thread() is not self._thread:
                self._thread.join(2 * _END_SECONDS)

    def kernels(self) -> list[KernelSpec]:
        """List the kernels that the gateway serves."""
        return self._wait(self._client.kernels())

    def call(self, name: str, /, *arrays: Any, timeout: float | None = None, **named: Any) -> Result:
        """Call a kernel by name. See Client.call."""
        return self._wait(self._client.call(name, *arrays, timeout=timeout, **named))

    def map(
        self,
        name: str,
        items: Iterable[Any],
        /,
        *,
        in_flight: int = 64,
        ordered: bool = True,
        timeout: float | None = None,
        **named: Any,
    ) -> Iterator[Result]:
        """Call a kernel for each item. See Client.map. Items are taken in the caller's thread, and may call kernels."""
        copies = Copies()
        constants = {key: copies.of(value) for key, value in named.items()}
        begin = self._client._begin_map  # noqa: SLF001 (a kernel may have a public name)
        calls = self._wait(begin(name, constants, in_flight, timeout, as_it_is, ordered=ordered))
        try:
            remaining, taken = iterated(items), True
            while taken or calls:
                bunch, taken = _bunch(remaining, in_flight - len(calls), copies) if taken else ([], False)
                results, error = self._wait(_exchange(calls, bunch, wait=not taken))
                yield from results
                if error is not None:
                    raise error
        finally:
            # Without a wait: a generator that is left may be closed by any thread, the client's own included.
            with suppress(RuntimeError):
                calls.loop.call_soon_threadsafe(calls.abandon)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Do asynchronous work on the client's thread, and return its result. Raises FailedPrecondition at once."""
        try:
            claim_process()
            with self._lock:
                future = asyncio.run_coroutine_threadsafe(work, self._usable_loop())
        except FailedPrecondition:
            work.close()
            raise
        try:
            return future.result()
        except BaseException:
            # Most likely Ctrl-C: cancel the work, since its result is no longer wanted.
            future.cancel()
            raise

    def _usable_loop(self) -> asyncio.AbstractEventLoop:
        """The loop of the client's thread, which is started if need be. Raises FailedPrecondition."""
        if self._closed:
            raise FailedPrecondition("this client is closed; make another one")
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_run, args=(self._loop,), name="unlatch-client", daemon=True)
            self._thread.start()
        if threading.current_thread() is self._thread:
            raise FailedPrecondition("the client's own thread, which gets tokens, cannot wait for a call of the client")
        return self._loop

    def _known_kernels(self) -> Mapping[str, KernelSpec]:
        with suppress(UnlatchError):
            self._wait(self._client._linked(_LIST_SECONDS))  # noqa: SLF001 (a kernel may have a public name)
        return self._client._known_kernels()  # noqa: SLF001

    def __repr__(self) -> str:
        return repr(self._client).replace("Client", "BlockingClient", 1)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _close(client: Client, loop: asyncio.AbstractEventLoop) -> None:
    """Close a client and stop its loop, after tasks that are ending: gRPC reports a call's end on a task of its own."""
    await client.close()
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        _, late = await asyncio.wait(others, timeout=_END_SECONDS)
        for task in late:
            task.cancel()
    loop.stop()


def _bunch(items: Iterator[Any], room: int, copies: Copies) -> tuple[list[Any], bool]:
    """Take up to `room` items, and copy them. Returns them, and whether there may be more and room for them."""
    bunch = []
    until = monotonic() + _BUNCH_SECONDS
    for item in islice(items, min(room, _BUNCH)):
        bunch.append(copies.of(item))
        if monotonic() > until:
            break
    return bunch, bool(bunch)


async def _exchange(calls: MapCalls, bunch: list[Any], *, wait: bool) -> tuple[list[Result], UnlatchError | None]:
    """Begin the calls of a bunch, and collect results that are here; at least one, if `wait` or there is no room.

    An error ended the map after the results beside it.
    """
    results: list[Result] = []
    try:
        for item in bunch:
            await calls.begin(item)
        while calls and (calls.has_next or (not results and (wait or calls.is_full))):
            results.append(await calls.next())
    except UnlatchError as error:  # raised in the caller's thread, after the results before it
        return results, error
    return results, None
