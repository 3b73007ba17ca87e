"""The blocking client: an async client on a thread of its own, for scripts, notebooks and threads."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from unlatch.client import Client
from unlatch.common.kernel.spec import KernelSpec
from unlatch.link import Token
from unlatch.results import Result
from unlatch.security import TLS

T = TypeVar("T")

# A blocking map passes results between threads in bunches, since crossing threads costs more than a call does.
_BUNCH = 64
_END_SECONDS = 1.0


class BlockingClient:
    """A Client without `await`, for use from any thread. If `token` is a function, the client's own thread calls it."""

    def __init__(
        self,
        target: str = "127.0.0.1:8001",
        *,
        tls: TLS | bool = False,
        timeout: float | None = None,
        token: Token | None = None,
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="unlatch-client", daemon=True)
        self._thread.start()
        self._client = Client(target, tls=tls, timeout=timeout, token=token)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getattr__(self, name: str) -> Callable[..., Result]:
        if name.startswith("_"):
            raise AttributeError(name)
        return partial(self.call, name)

    def close(self) -> None:
        """Close the lane and end the thread. Calls in flight fail."""
        if not self._loop.is_closed():
            self._wait(self._client.close())
            self._wait(_ended())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def kernels(self) -> list[KernelSpec]:
        """List the kernels that the gateway serves."""
        return self._wait(self._client.kernels())

    def call(self, name: str, *arrays: Any, timeout: float | None = None, **named: Any) -> Result:
        """Call a kernel by name. See Client.call."""
        return self._wait(self._client.call(name, *arrays, timeout=timeout, **named))

    def map(
        self,
        name: str,
        items: Iterable[Any],
        *,
        in_flight: int = 64,
        ordered: bool = True,
        timeout: float | None = None,
        **named: Any,
    ) -> Iterator[Result]:
        """Call a kernel for each item. See Client.map; `items` is consumed on the client's thread."""
        results = self._client.map(name, items, in_flight=in_flight, ordered=ordered, timeout=timeout, **named)
        try:
            while True:
                bunch, error = self._wait(_bunch(results))
                yield from bunch
                if error is not None:
                    raise error
                if not bunch:
                    return
        finally:
            self._wait(_close(results))

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            # Most likely Ctrl-C: cancel the work, since its result is no longer wanted.
            future.cancel()
            raise


async def _ended() -> None:
    """Wait for tasks that are ending: gRPC reports a call's end on a task of its own."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=_END_SECONDS)


async def _bunch(results: AsyncIterator[Result]) -> tuple[list[Result], Exception | None]:
    """Collect some of the next results, and the error that ended the map after them. An empty list is the end."""
    bunch: list[Result] = []
    try:
        async for given in results:
            bunch.append(given)
            if len(bunch) == _BUNCH:
                break
    except Exception as error:  # noqa: BLE001 (raised in the caller's thread, after the results before it)
        return bunch, error
    return bunch, None


async def _close(results: AsyncIterator[Result]) -> None:
    await results.aclose()  # type: ignore[attr-defined]  # a map is an async generator
