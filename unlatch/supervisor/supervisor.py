"""`unlatch serve` put together: ports, units, reload and restart, in the order of their lives."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from unlatch.common.machine.directories import private_directory
from unlatch.common.net.ports import BindError, hold
from unlatch.common.net.settings import refused
from unlatch.common.service.begin import begin
from unlatch.common.service.life import Life
from unlatch.supervisor.child import Child
from unlatch.unit.place import Place
from unlatch.unit.settings import PROGRAM, ServeSettings, services

if TYPE_CHECKING:
    from unlatch.reload import Reload

log = structlog.get_logger()

# Exit code of a service that has refused to start.
_CANNOT_START = 2
# Exit code of a service that could not start, and might another time.
_MAY_START_LATER = 1
# Exit code of `unlatch serve` if another process ended a unit before that had drained.
_NOT_DRAINED = 1

# A unit bounds the loading of its kernels and the start of its workers by itself, each by `worker_start_seconds`. It
# gets this much more, to load its modules on a busy machine. Then it is killed: it stands still.
_START_MARGIN_SECONDS = 60.0


async def supervise(
    settings: ServeSettings, arguments: Sequence[str], worker_start_seconds: float, notify_socket: str
) -> int:
    """Run units until a signal. Returns 0, or the code of a start or drain that failed.

    Raises DirectoryError, BindError, and OSError where the system refuses what units need.
    """
    with private_directory() as directory, ExitStack() as held:
        child = partial(
            Child,
            command=("-m", "unlatch.unit", *arguments),
            directory=directory,
            start_seconds=2 * worker_start_seconds + _START_MARGIN_SECONDS,
            drain_seconds=settings.drain_seconds,
        )
        units = _units(settings, child, directory, held)
        life = Life(notify_socket, lambda: _kill(units))
        stopped = asyncio.ensure_future(life.until_stop())
        serving = asyncio.ensure_future(_serve(settings, units, life))
        await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        # First, so that no unit is started while the others drain.
        serving.cancel()
        await asyncio.wait((serving,))
        drained = await asyncio.gather(*(unit.stop() for unit in units))
        stopped.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            return await serving
        return 0 if all(drained) else _NOT_DRAINED


def _kill(units: Sequence[Child]) -> None:
    for unit in units:
        unit.kill()


def _units(settings: ServeSettings, child: Callable[..., Child], directory: Path, held: ExitStack) -> list[Child]:
    """Make the units' processes. What several share stays open until `held` is closed. Raises BindError, OSError."""
    if settings.unit_count == 1:
        return [child("unit")]
    # Imported here, since only several units need one port for their metrics and one table for quotas.
    from unlatch.gateway.tenants.shared_usage import UsageTable
    from unlatch.supervisor.metrics import serve_units_metrics

    listen = held.enter_context(hold("--listen", settings.listen))
    health_listen = held.enter_context(hold("--health-listen", settings.health_listen))
    count = settings.unit_count
    quotas = held.enter_context(contextlib.closing(UsageTable(count)))
    places = [Place(number, count, str(directory), listen, health_listen, quotas.fd) for number in range(count)]
    metrics = {str(place.number): place.metrics(place.number) for place in places}
    try:
        bound = held.enter_context(serve_units_metrics(settings.metrics_listen, metrics))
    except OSError as error:
        raise BindError(f"--metrics-listen {settings.metrics_listen}: {error.strerror}") from None
    log.info("units share addresses", units=len(places), listen=listen, metrics_listen=bound)
    return [
        child(
            f"unit-{place.number}",
            variables=place.variable(),
            inherited=(quotas.fd,),
            ended=partial(quotas.leave, place.number),
        )
        for place in places
    ]


async def _serve(settings: ServeSettings, units: Sequence[Child], life: Life) -> int:
    restart = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, restart.set)
    reload = _reload(settings, units)
    codes = [code for code in await asyncio.gather(*(unit.start() for unit in units)) if code is not None]
    if codes:
        # It has said on stderr why it cannot start, unless it was ended by another process.
        return _CANNOT_START if _CANNOT_START in codes else _MAY_START_LATER
    life.ready()
    async with asyncio.TaskGroup() as keeping:
        for unit in units:
            keeping.create_task(unit.keep())
        keeping.create_task(_restart(units, restart))
        if reload is not None:
            keeping.create_task(reload.run())
    return 0


def _reload(settings: ServeSettings, units: Sequence[Child]) -> "Reload | None":
    """Make the part that reloads the units' kernels, in one unit after another; None without --reload."""
    if not settings.reload or not settings.kernels:
        return None
    # Imported here, since only --reload needs what tries modules.
    from unlatch.reload import Reload

    async def all_units() -> None:
        for unit in units:
            await unit.reload()

    reload = Reload(settings.kernels, all_units, python=settings.worker_python)
    reload.look()
    return reload


async def _restart(units: Sequence[Child], asked: asyncio.Event) -> None:
    """Start the units again, one after another, whenever it is asked for: an upgrade has replaced what they run."""
    while True:
        await asked.wait()
        asked.clear()
        log.info("restarting units", units=len(units))
        for number, unit in enumerate(units):
            if not await unit.restart():
                log.error("unit does not serve, the others go on as they are", unit=number)
                break
        else:
            log.info("units restarted", units=len(units))


def main(arguments: Sequence[str]) -> int:
    """Run `unlatch serve` with settings from flags and the environment; returns its exit code."""
    settings = begin(ServeSettings, PROGRAM, "supervisor", arguments, os.environ)
    # What variables set for the services is checked before a unit is started.
    _, compute = services(settings, os.environ)
    notify_socket = os.environ.pop("NOTIFY_SOCKET", "")
    try:
        return asyncio.run(supervise(settings, arguments, compute.worker_start_seconds, notify_socket))
    except BindError as error:
        raise refused(PROGRAM, [str(error)]) from None
    except OSError as error:
        # Too many descriptors or processes, or no memory: the next start may succeed.
        place = f": {error.filename}" if error.filename else ""
        why = f"units cannot be started: {error.strerror or error}{place}"
        raise refused(PROGRAM, [why], _MAY_START_LATER) from None
