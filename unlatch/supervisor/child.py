"""A service's process as its supervisor has it: started, told to reload, started again, stopped."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import structlog

from unlatch.common.backoff import Backoff

log = structlog.get_logger()

# A child that has served this long counts as healthy: the backoff between its restarts begins again.
_WELL_SECONDS = 10.0
# Time that a child gets beyond its drain before it is killed.
_STOP_MARGIN_SECONDS = 2.0
_NO_VARIABLES: Mapping[str, str] = MappingProxyType({})


class Child:
    """A service's process, which is started again whenever it ends, until the supervisor stops.

    `command` are the arguments of Python. `variables` are added to the process's environment, and it inherits the
    descriptors `inherited`. A process that does not serve within `start_seconds` is killed. `ended` is called when the
    process has ended, before it is started again.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        directory: Path,
        *,
        start_seconds: float,
        drain_seconds: float,
        variables: Mapping[str, str] = _NO_VARIABLES,
        inherited: Sequence[int] = (),
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = name
        self._command = command
        self._directory = directory
        self._start_seconds = start_seconds
        self._drain_seconds = drain_seconds
        self._variables = variables
        self._inherited = inherited
        self._ended = ended
        self._process: asyncio.subprocess.Process | None = None
        # The process that was sent SIGTERM last. A second one would end its drain.
        self._draining: asyncio.subprocess.Process | None = None
        # Held from the end of one process to the start of the next, and during a reload: none is told to reload before
        # it can, or restarted twice.
        self._changing = asyncio.Lock()

    async def start(self) -> int | None:
        """Start the process and wait until it serves. Returns None, or its exit code if it ended. Raises OSError."""
        address = self._directory / f"{self._name}.notify"
        with self._notices(address) as notices:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, *self._command),
                env={
                    **os.environ,
                    **self._variables,
                    "NOTIFY_SOCKET": str(address),
                    "UNLATCH_SUPERVISOR": str(os.getpid()),
                },
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=self._inherited,
                # A terminal's Ctrl-C must reach the supervisor alone, which stops its children in order. No new
                # session, since the system divides cores between sessions first (docs/decisions/0007).
                process_group=0,
            )
            if not await self._ready(self._process, notices, self._start_seconds):
                await self._kill_late("service killed: it did not start in time", self._start_seconds)
        code = self._process.returncode
        if code is not None:
            log.error("service ended while it started", service=self._name, ended_with=code)
        return code

    async def reload(self) -> None:
        """Have the process reload its kernels, and wait until it serves them. If it has ended, the next one does."""
        async with self._changing:
            if self._process is not None and self._process.returncode is None:
                with self._notices(self._directory / f"{self._name}.notify") as notices:
                    self._process.send_signal(signal.SIGUSR1)
                    await self._ready(self._process, notices)

    @contextlib.contextmanager
    def _notices(self, address: Path) -> Iterator[socket.socket]:
        """Listen for the notice that the process is ready, as systemd does (sd_notify(3))."""
        self._make_directory()
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notices:
            notices.bind(str(address))
            yield notices

    def _make_directory(self) -> None:
        """Make the directory of sockets again if a cleaner of temporary files has removed it. Raises OSError."""
        self._directory.mkdir(mode=0o700, exist_ok=True)

    async def _ready(
        self, process: asyncio.subprocess.Process, notices: socket.socket, within: float | None = None
    ) -> bool:
        """Wait for the notice, or for the end of the process. Returns False if neither came within so many seconds."""
        ready = asyncio.ensure_future(asyncio.get_running_loop().sock_recv(notices, 64))
        ended = asyncio.ensure_future(process.wait())
        try:
            done, _ = await asyncio.wait((ready, ended), timeout=within, return_when=asyncio.FIRST_COMPLETED)
            return bool(done)
        finally:
            for waiting in (ready, ended):
                waiting.cancel()
            await asyncio.wait((ready, ended))

    async def keep(self) -> None:
        """Start the process again whenever it ends, with backoff if it ends soon after its start."""
        loop = asyncio.get_running_loop()
        ends = Backoff(first_seconds=0.1, longest_seconds=5.0)
        while (process := self._process) is not None:
            since = loop.time()
            code = await process.wait()
            async with self._changing:
                if self._process is not process:
                    # It was ended by `restart`.
                    continue
                self._ended()
                if loop.time() - since > _WELL_SECONDS:
                    ends.succeeded()
                delay = ends.failed()
                log.warning("restarting service", service=self._name, ended_with=code, after_seconds=delay)
                await asyncio.sleep(delay)
                await self._start_anew()

    async def restart(self) -> bool:
        """Let the process drain and end, and start another one. Returns whether that serves.

        The process goes on if no other one could be started, because its sockets would have no directory.
        """
        async with self._changing:
            try:
                self._make_directory()
            except OSError as error:
                log.error("service is not restarted", service=self._name, message=str(error))
                return False
            await self.stop()
            self._ended()
            return await self._start_anew()

    async def _start_anew(self) -> bool:
        try:
            return await self.start() is None
        except OSError as error:
            log.error("service did not start", service=self._name, message=str(error))
            return False

    async def stop(self) -> bool:
        """Let the process drain its calls and end; kill it if it takes too long. Returns whether it had its time.

        To be called when `keep`, `reload` and `restart` have ended or are cancelled.
        """
        if self._process is None or self._process.returncode is not None:
            return True
        if self._draining is not self._process:
            self._draining = self._process
            self._process.send_signal(signal.SIGTERM)
        within = self._drain_seconds + _STOP_MARGIN_SECONDS
        try:
            async with asyncio.timeout(within):
                code = await self._process.wait()
        except TimeoutError:
            await self._kill_late("service killed: it did not end in time", within)
            return True
        # A process that SIGTERM ends by itself has not begun to start.
        if code not in (0, -signal.SIGTERM):
            log.error("service ended while it drained", service=self._name, ended_with=code)
            return False
        return True

    async def _kill_late(self, event: str, within: float) -> None:
        log.warning(event, service=self._name, after_seconds=within)
        self.kill()
        if self._process is not None:
            await self._process.wait()

    def kill(self) -> None:
        """Kill the process at once."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
