"""`unlatch serve` as a process for tests, with a directory of temporary files of its own."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.mesh import Service
from tests.support.watching import Process, children, command_of, wait_until

# Four processes load their modules one after the other, on a machine with other work.
START_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Serve:
    """An `unlatch serve` of this test alone, which may leave files in `directory`."""

    service: Service
    address: str
    directory: Path

    @property
    def unit(self) -> int:
        """The pid of its unit."""
        (pid,) = units(self.service)
        return pid


def units(serve: Service) -> list[int]:
    """Return the pids of the units. A child has the command line of the supervisor until it runs its own program."""
    return [pid for pid in children(serve.pid) if "-m unlatch.unit " in command_of(pid)]


@contextmanager
def starting(scratch: Path | None = None, **listen: str) -> Iterator[Serve]:
    """Start `unlatch serve`, on free ports unless told otherwise, with this directory of temporary files or another."""
    names = ("listen", "metrics_listen", "health_listen")
    with ExitStack() as reserved:
        # A directory apart from the test's: a socket's path has 107 characters at most, and the test's may take 80.
        directory = scratch or Path(reserved.enter_context(tempfile.TemporaryDirectory(prefix="serve-")))
        addresses = {name: listen.pop(name, "") or reserved.enter_context(free_address()) for name in names}
        flags = {"workers": "2", **listen, **addresses}
        arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
        with Service("unlatch", "serve", *arguments, environment={"TMPDIR": str(directory)}) as service:
            yield Serve(service=service, address=addresses["listen"], directory=directory)
    if scratch is None:
        wait_until(lambda: not who_mentions(directory), "nothing mentions its directory")


@contextmanager
def serving(scratch: Path | None = None, **flags: str) -> Iterator[Serve]:
    """Start it and wait until it serves."""
    with starting(scratch, **flags) as serve:
        serve.service.wait_for("serving", process="unit", within=START_SECONDS)
        serve.service.wait_for("replica is ready", process="unit")
        yield serve


@contextmanager
def free_address() -> Iterator[str]:
    """Reserve an address, which the system gives to no process that asks for a free one, but lets be named.

    This holds as long as both ends allow the address's reuse and only one of them listens (socket(7), SO_REUSEADDR).
    """
    with socket.socket() as reserving:
        reserving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserving.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserving.getsockname()[1]}"


def who_mentions(directory: Path) -> list[Process]:
    """Return the processes that have a directory in their command line."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            with suppress(OSError):
                process = Process.of(int(name))
                if str(directory).encode() in Path(f"/proc/{name}/cmdline").read_bytes() and process.alive:
                    found.append(process)
    return found
