"""`unlatch serve`: start a gateway and a compute replica on this machine, restart them if they end, and stop them.

    supervisor ──> compute   on a Unix socket that only this user can reach
               ──> gateway   on the address that callers use

The system kills each child when the supervisor ends (PDEATHSIG), and the dispatcher's workers when the dispatcher ends.
So no process is left behind, whichever of them is killed.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import structlog
from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from unlatch.common.backoff import Backoff
from unlatch.common.net.settings import Settings, parse, separated
from unlatch.common.service.life import notify_ready
from unlatch.common.telemetry.log import configure

log = structlog.get_logger()

# A child that has served this long counts as healthy: the backoff between its restarts begins again.
_WELL_SECONDS = 10.0
# Time that a child gets beyond its drain before it is killed.
_STOP_MARGIN_SECONDS = 2.0


class ServeSettings(Settings):
    """`unlatch serve`: gateway and compute on this machine. Other settings are read from environment variables."""

    listen: str = Field("127.0.0.1:8001", description="Address for callers: host:port or unix:/path")
    metrics_listen: str = Field("127.0.0.1:8002", description="Address of the gateway's /metrics")
    health_listen: str = Field("127.0.0.1:8003", description="Address of the gateway's grpc.health.v1")
    compute_metrics_listen: str = Field("127.0.0.1:8012", description="Address of the replica's /metrics")
    compute_health_listen: str = Field("127.0.0.1:8013", description="Address of the replica's grpc.health.v1")
    kernels: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Kernel modules besides the built-in ones: pkg.module,path/to/file.py"
    )
    workers: int = Field(0, ge=0, le=1024, description="Worker processes; 0 is one for each granted core")
    reload: bool = Field(default=False, description="Reload kernels when their files change; for development")
    # A user waits for the prompt to return, two seconds at most, of which closing both services takes 0.7. A replica in
    # a cluster has twenty.
    drain_seconds: float = Field(0.5, ge=0, description="Maximum seconds for calls in flight to end after SIGTERM")

    @field_validator("kernels", mode="before")
    @classmethod
    def _separated(cls, value: object) -> object:
        return separated(value)


class Child:
    """A service's process, which is started again whenever it ends, until the supervisor stops."""

    def __init__(self, name: str, arguments: Sequence[str], directory: Path, drain_seconds: float) -> None:
        self._name = name
        self._arguments = arguments
        self._directory = directory
        self._drain_seconds = drain_seconds
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        # Held from the end of one process to the start of the next, so that only one task replaces it.
        self._replacing = asyncio.Lock()

    async def start(self) -> int | None:
        """Start the process and wait until it serves. Returns None, or its exit code if it ended instead."""
        loop = asyncio.get_running_loop()
        # A cleaner of temporary files may have removed the directory.
        self._directory.mkdir(mode=0o700, exist_ok=True)
        address = self._directory / f"{self._name}.notify"
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notices:
            notices.bind(str(address))
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", f"unlatch.{self._name}", *self._arguments),
                env={**os.environ, "NOTIFY_SOCKET": str(address), "UNLATCH_SUPERVISOR": str(os.getpid())},
                stdin=asyncio.subprocess.DEVNULL,
                # A terminal's Ctrl-C must reach the supervisor alone, which stops its children in order. No new
                # session, since the system divides cores between sessions first: workers would yield to their
                # dispatcher, but not to the gateway (docs/decisions/0007).
                process_group=0,
            )
            ready = asyncio.ensure_future(loop.sock_recv(notices, 64))
            ended = asyncio.ensure_future(self._process.wait())
            await asyncio.wait((ready, ended), return_when=asyncio.FIRST_COMPLETED)
            for waiting in (ready, ended):
                waiting.cancel()
            await asyncio.wait((ready, ended))
        return self._process.returncode

    async def keep(self) -> None:
        """Start the process again whenever it ends, with backoff if it ends soon after its start."""
        loop = asyncio.get_running_loop()
        ends = Backoff(first_seconds=0.1, longest_seconds=5.0)
        while self._process is not None:
            since = loop.time()
            process = self._process
            code = await process.wait()
            async with self._replacing:
                if self._stopping:
                    return
                if self._process is not process:
                    continue
                if loop.time() - since > _WELL_SECONDS:
                    ends.succeeded()
                delay = ends.failed()
                log.warning("restarting service", service=self._name, ended_with=code, after_seconds=delay)
                await asyncio.sleep(delay)
                try:
                    await self.start()
                except OSError as error:
                    log.error("service did not start", service=self._name, message=str(error))

    async def replace(self) -> None:
        """Stop the process, as `stop` would, and start another."""
        async with self._replacing:
            await self._end()
            if not self._stopping:
                await self.start()

    async def stop(self) -> None:
        """Let the process drain its calls and end; kill it if it takes too long."""
        self._stopping = True
        await self._end()

    async def _end(self) -> None:
        if self._process is None or self._process.returncode is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(self._drain_seconds + _STOP_MARGIN_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        """Kill the process at once."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()


class Stop:
    """Signal handling: the first SIGTERM or SIGINT asks for an orderly stop, the second ends all processes at once."""

    def __init__(self, children: Sequence[Child]) -> None:
        self._children = children
        self.asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)

    def _signalled(self, number: int) -> None:
        if self.asked.is_set():
            for child in self._children:
                child.kill()
            os._exit(128 + number)
        self.asked.set()


async def supervise(settings: ServeSettings, notify_socket: str) -> int:
    """Run both services until a signal. Returns 0, or the exit code of a service that could not start."""
    with tempfile.TemporaryDirectory(prefix="unlatch-") as name:
        directory = Path(name)
        lane = f"unix:{directory}/dispatcher.sock"
        common = ("--drain-seconds", str(settings.drain_seconds), "--log-level", settings.log_level)
        compute = Child("compute", (*_compute_flags(settings, lane), *common), directory, settings.drain_seconds)
        gateway = Child("gateway", (*_gateway_flags(settings, lane), *common), directory, settings.drain_seconds)
        stop = Stop((compute, gateway))
        serving = asyncio.ensure_future(_serve(settings, compute, gateway, notify_socket))
        asked = asyncio.ensure_future(stop.asked.wait())
        await asyncio.wait((serving, asked), return_when=asyncio.FIRST_COMPLETED)
        # The gateway first: to answer the calls in flight it needs the replica.
        await gateway.stop()
        await compute.stop()
        asked.cancel()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            return await serving
        return 0


async def _serve(settings: ServeSettings, compute: Child, gateway: Child, notify_socket: str) -> int:
    for child in (compute, gateway):
        code = await child.start()
        if code is not None:
            return code or 1
    notify_ready(notify_socket)
    keeping = [compute.keep(), gateway.keep()]
    if settings.reload and settings.kernels:
        # Imported here, since only --reload needs a watcher of files.
        from unlatch.reload import Reload

        keeping.append(Reload(settings.kernels, compute.replace).run())
    await asyncio.gather(*keeping)
    return 0


def _compute_flags(settings: ServeSettings, lane: str) -> Sequence[str]:
    return (
        *("--listen", lane, "--workers", str(settings.workers), "--kernels", ",".join(settings.kernels)),
        *("--metrics-listen", settings.compute_metrics_listen, "--health-listen", settings.compute_health_listen),
    )


def _gateway_flags(settings: ServeSettings, lane: str) -> Sequence[str]:
    return (
        *("--listen", settings.listen, "--replicas", lane),
        *("--metrics-listen", settings.metrics_listen, "--health-listen", settings.health_listen),
        *("--tls-cert", settings.tls_cert, "--tls-key", settings.tls_key, "--tls-client-ca", settings.tls_client_ca),
        *("--tls-grace-seconds", str(settings.tls_grace_seconds)),
        *("--tls-connection-seconds", str(settings.tls_connection_seconds)),
        "--insecure" if settings.insecure else "--no-insecure",
    )


def main(arguments: Sequence[str]) -> int:
    """Run `unlatch serve` with settings from flags and the environment; returns its exit code."""
    settings = parse(ServeSettings, "unlatch serve", arguments)
    configure("supervisor", settings.log_level)
    return asyncio.run(supervise(settings, os.environ.pop("NOTIFY_SOCKET", "")))
