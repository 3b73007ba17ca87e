"""The main function that both services share: settings, logs, the event loop, and an exit code."""

import asyncio
import contextlib
import sys
from collections.abc import Callable, Coroutine, MutableMapping, Sequence
from typing import TypeVar

import uvloop

from unlatch.common.errors import CertificateError
from unlatch.common.machine.descriptors import raise_limit
from unlatch.common.machine.memory import keep_freed, share_heaps
from unlatch.common.net.ports import BindError
from unlatch.common.net.settings import MiB, Settings
from unlatch.common.security.watched import FileError
from unlatch.common.service.begin import begin
from unlatch.common.service.grpc_log import log_grpc
from unlatch.common.service.life import Life, let_threads_give_way
from unlatch.common.telemetry.spans import exported

S = TypeVar("S", bound=Settings)


def run(
    program: str,
    process: str,
    settings_kind: type[S],
    serve: Callable[[S, Life], Coroutine[None, None, None]],
    arguments: Sequence[str],
    environment: MutableMapping[str, str],
    refusals: tuple[type[Exception], ...] = (),
    passing: tuple[type[Exception], ...] = (),
    *,
    ports_held: bool = False,
) -> int:
    """Serve until a signal. Returns 0; or 2, after a line on stderr, for an address or refusal that prevents it.

    Returns 1 after a line on stderr for an error in `passing`: the next start may succeed. `ports_held` says that the
    supervisor holds the addresses, so that they are in use.
    """
    settings = begin(settings_kind, program, process, arguments, environment, ports_held=ports_held)
    raise_limit()
    let_threads_give_way()
    # An operator who asks gRPC for more gets its lines as they are.
    if environment.get("GRPC_VERBOSITY") == "ERROR":
        log_grpc()
    # A lane's messages, of a mebibyte or more, reuse each other's memory; larger blocks are returned at once.
    keep_freed(largest_bytes=8 * MiB, most_bytes=64 * MiB, step_bytes=4 * MiB)
    # One heap for the loop, one for all of gRPC's threads. With a heap each, every thread would keep its own peak.
    share_heaps(2)
    refusals = (BindError, CertificateError, FileError, *refusals)
    try:
        with exported(process, environment):
            uvloop.run(_live(serve, settings, environment.pop("NOTIFY_SOCKET", "")))
    except (*refusals, *passing) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1 if isinstance(error, passing) else 2
    return 0


async def _live(serve: Callable[[S, Life], Coroutine[None, None, None]], settings: S, notify_socket: str) -> None:
    life = Life(notify_socket)
    # A signal during the start cancels it.
    with contextlib.suppress(asyncio.CancelledError):
        await serve(settings, life)
