"""Real services for tests: a gateway and a compute service, in one process or in two, on free ports.

Nothing here sleeps: a service's log lines say how far it has got. The message of every failure contains the log.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.support.watching import children
from unlatch.unit.settings import ServeSettings

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "tests" / "support" / "kernels.py"
_WITHIN_SECONDS = 20.0
_MOST_LINES_SHOWN = 40

Entry = dict[str, Any]


class Service:
    """A process of ours, and its log. The process ends with this test run at the latest."""

    def __init__(
        self,
        module: str,
        *flags: str,
        environment: Mapping[str, str] | None = None,
        runner: Sequence[str] = (),
        directory: Path = ROOT,
    ) -> None:
        self.name = module
        self.lines: list[str] = []
        self._logged = threading.Condition()
        self._ended = False
        self._reads = threading.Event()
        self._reads.set()
        # UNLATCH_WORKER_PYTHON is a choice of the person who runs the tests: workers of another interpreter.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("UNLATCH_") or name == "UNLATCH_WORKER_PYTHON"
        }
        # A service ends itself when its supervisor is gone.
        supervised = {**inherited, "UNLATCH_SUPERVISOR": str(os.getpid()), **(environment or {})}
        self._child = subprocess.Popen(
            [
                *(runner or (sys.executable, "-m")),
                module if runner or module == "unlatch" else f"unlatch.{module}",
                *flags,
            ],
            cwd=directory,
            env=supervised,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"log of {module}", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def entries(self) -> list[Entry]:
        """The log's entries. Lines that are not JSON (a kernel's prints) are left out."""
        return [json.loads(line) for line in list(self.lines) if line.startswith("{")]

    def __str__(self) -> str:
        state = self._child.poll()
        head = f"{self.name} (pid {self.pid}, {'running' if state is None else f'exit code {state}'}) logged:"
        return "\n".join([head, *(line[:1000] for line in self.lines[-_MOST_LINES_SHOWN:])])

    def wait_for(self, event: str, *, after: int = 0, within: float = _WITHIN_SECONDS, **fields: object) -> Entry:
        """Return the first entry of that event with those fields from line `after` on. Fails if none comes in time."""
        found: Entry | None = None

        def there() -> bool:
            nonlocal found, after
            while found is None and after < len(self.lines):
                line = self.lines[after]
                after += 1
                entry = json.loads(line) if line.startswith("{") else {}
                if entry.get("event") == event and fields.items() <= entry.items():
                    found = entry
            return found is not None or self._ended

        with self._logged:
            self._logged.wait_for(there, within)
        assert found is not None, f"no {event!r} with {fields} came within {within} s; {self}"
        return found

    @contextmanager
    def unread(self) -> Iterator[None]:
        """Read none of the log inside the `with` block."""
        self._reads.clear()
        try:
            yield
        finally:
            self._reads.set()

    def signal(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def wait(self, within: float = _WITHIN_SECONDS) -> int:
        """Return the exit code, once the process has ended and its whole log has been read."""
        try:
            code = self._child.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end within {within} s; {self}") from None
        self._reader.join(within)
        return code

    def stop(self) -> None:
        """Send SIGTERM and wait for the drain. Fails when the exit code is not 0."""
        self._child.terminate()
        code = self.wait()
        assert code == 0, f"it ended with {code}; {self}"

    def kill(self) -> None:
        """Kill the process if it has not ended."""
        if self._child.poll() is None:
            self._child.kill()
        self.wait()

    def _read(self) -> None:
        assert self._child.stderr is not None
        with self._child.stderr as stderr:
            for line in stderr:
                self._reads.wait()
                with self._logged:
                    self.lines.append(line.rstrip("\n"))
                    self._logged.notify_all()
        with self._logged:
            self._ended = True
            self._logged.notify_all()


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """A gateway and one replica behind it. `gateway` and `dispatcher` are their addresses for gRPC.

    In a unit both are one service, whose replica has no address.
    """

    gateway: str
    gateway_metrics: str
    gateway_health: str
    gateway_service: Service
    dispatcher: str
    dispatcher_metrics: str
    dispatcher_health: str
    dispatcher_service: Service

    def __str__(self) -> str:
        return "\n".join(map(str, dict.fromkeys((self.gateway_service, self.dispatcher_service))))

    @property
    def pids(self) -> dict[str, int]:
        """The pid of each process by name: gateway, dispatcher, forkserver, and worker-<pid> in the order of start."""
        found = {"gateway": self.gateway_service.pid, "dispatcher": self.dispatcher_service.pid}
        for child in children(self.dispatcher_service.pid):
            # It may have ended meanwhile.
            with suppress(OSError):
                if b"worker.forkserver" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found["forkserver"] = child
                    found |= {f"worker-{worker}": worker for worker in children(child)}
        return found

    @property
    def workers(self) -> list[int]:
        """The workers' pids."""
        return [pid for name, pid in self.pids.items() if name.startswith("worker-")]


@contextmanager
def running_dispatcher(socket: Path, *flags: str) -> Iterator[Service]:
    """Run a replica alone, with the tests' kernels and two workers unless flags say otherwise. Stop it at the end."""
    defaults = {"--workers": "2", "--kernels": str(KERNELS), "--drain-seconds": "5"}
    chosen = [part for flag, value in defaults.items() if flag not in flags for part in (flag, value)]
    with Service("compute", "--listen", f"unix:{socket}", *_ANY_PORTS, *chosen, *flags) as dispatcher:
        dispatcher.wait_for("serving")
        yield dispatcher
        dispatcher.stop()


@contextmanager
def running_mesh(directory: Path, *, dispatcher: Sequence[str] = (), gateway: Sequence[str] = ()) -> Iterator[Mesh]:
    """Run both services, with flags added to what they need to find each other. Stop them cleanly at the end."""
    socket = directory / "dispatcher.sock"
    drain = ("--drain-seconds", "5")
    with (
        running_dispatcher(socket, *dispatcher) as compute,
        Service(
            "gateway", "--listen", "127.0.0.1:0", "--replicas", f"unix:{socket}", *_ANY_PORTS, *drain, *gateway
        ) as door,
    ):
        serving, replica = door.wait_for("serving"), compute.wait_for("serving")
        door.wait_for("replica is ready")
        yield Mesh(
            gateway=serving["listen"],
            gateway_metrics=serving["metrics_listen"],
            gateway_health=serving["health_listen"],
            gateway_service=door,
            dispatcher=replica["listen"],
            dispatcher_metrics=replica["metrics_listen"],
            dispatcher_health=replica["health_listen"],
            dispatcher_service=compute,
        )
        door.stop()


@contextmanager
def running_unit(directory: Path, *, dispatcher: Sequence[str] = (), gateway: Sequence[str] = ()) -> Iterator[Mesh]:
    """Run both services as a unit, in the same way."""
    defaults = ("--workers", "2", "--kernels", str(KERNELS), "--drain-seconds", "5")
    with unit_service("--listen", "127.0.0.1:0", *_ANY_PORTS, *defaults, *dispatcher, *gateway) as unit:
        serving = unit.wait_for("serving")
        unit.wait_for("replica is ready")
        yield Mesh(
            gateway=serving["listen"],
            gateway_metrics=f"{serving['metrics_listen']}#gateway",
            gateway_health=serving["health_listen"],
            gateway_service=unit,
            dispatcher="",
            dispatcher_metrics=f"{serving['metrics_listen']}#compute",
            dispatcher_health=serving["health_listen"],
            dispatcher_service=unit,
        )
        unit.stop()


def unit_service(*flags: str) -> Service:
    """Start a unit with flags of both services. Those that `unlatch serve` does not have are variables there."""
    settings = _settings(flags)
    known = [name.replace("_", "-") for name in ServeSettings.model_fields]
    given = [f"--{name}={value}" for name, value in settings.items() if name in known]
    others = {f"UNLATCH_{name.replace('-', '_').upper()}": settings[name] for name in settings if name not in known}
    return Service("unit", *given, environment=others)


# Ways to run a mesh, by name.
MESHES = {"apart": running_mesh, "unit": running_unit}


def _settings(flags: Sequence[str]) -> dict[str, str]:
    """Return the settings that flags stand for: a flag without a value is a switch."""
    found: dict[str, str] = {}
    name = ""
    for part in flags:
        if part.startswith("--"):
            name = part.removeprefix("--").removeprefix("no-")
            found[name] = str(not part.startswith("--no-"))
        else:
            found[name] = part
    return found


_ANY_PORTS = ("--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0")
