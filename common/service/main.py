"""What both services' mains do: settings, logs, the loop, and an exit code."""

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
    """Serve until told to stop: 0, or 2 with a line on stderr for an address or a refusal that prevents it."""
    if supervisor := environment.pop("UNLATCH_SUPERVISOR", ""):
        die_with_parent(int(supervisor))
    settings = parse(settings_kind, program, arguments)
    configure(process, settings.log_level)
    let_threads_give_way()
    # Messages of a lane, a mebibyte and more each, come and go in what others left; larger ones are given back at once.
    keep_freed(largest_bytes=8 * MiB, most_bytes=64 * MiB, step_bytes=4 * MiB)
    # The loop's, and one for all of gRPC's threads: of one each, every one keeps as much as its largest moment took.
    share_heaps(2)
    refusals = (BindError, CertificateError, FileError, *refusals)
    try:
        with exported(process, environment):
            uvloop.run(serve(settings, environment.pop("NOTIFY_SOCKET", "")))
    except refusals as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0
