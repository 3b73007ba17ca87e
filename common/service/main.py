"""The main function that both services share: settings, logs, the event loop, and an exit code."""

import sys
from collections.abc import Callable, Coroutine, MutableMapping, Sequence
from typing import TypeVar

import uvloop

from unlatch.common.errors import CertificateError
from unlatch.common.machine.memory import keep_freed, share_heaps
from unlatch.common.net.rpc import BindError
from unlatch.common.net.settings import MiB, Settings, parse
from unlatch.common.security.watched import FileError
from unlatch.common.service.life import die_with_parent, let_threads_give_way
from unlatch.common.telemetry.log import configure
from unlatch.common.telemetry.spans import exported

S = TypeVar("S", bound=Settings)


def run(
    program: str,
    process: str,
    settings_kind: type[S],
    serve: Callable[[S, str], Coroutine[None, None, None]],
    arguments: Sequence[str],
    environment: MutableMapping[str, str],
    refusals: tuple[type[Exception], ...] = (),
) -> int:
    """Serve until a signal. Returns 0; or 2, after a line on stderr, for an address or refusal that prevents it."""
    if supervisor := environment.pop("UNLATCH_SUPERVISOR", ""):
        die_with_parent(int(supervisor))
    settings = parse(settings_kind, program, arguments)
    configure(process, settings.log_level)
    let_threads_give_way()
    # A lane's messages, of a mebibyte or more, reuse each other's memory; larger blocks are returned at once.
    keep_freed(largest_bytes=8 * MiB, most_bytes=64 * MiB, step_bytes=4 * MiB)
    # One heap for the loop, one for all of gRPC's threads. With a heap each, every thread would keep its own peak.
    share_heaps(2)
    refusals = (BindError, CertificateError, FileError, *refusals)
    try:
        with exported(process, environment):
            uvloop.run(serve(settings, environment.pop("NOTIFY_SOCKET", "")))
    except refusals as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0
