"""Meshes for faults: their workers serve kernels that misbehave, and their services may end in any way."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from tests.support.mesh import MESHES, Mesh, Service, unit_service
from tests.support.watching import Gate, Scrape, tree
from unlatch import Client
from unlatch.common.errors import Aborted, Unavailable

FAULT_KERNELS = Path(__file__).with_name("fault_kernels.py")
ANY_PORTS = ("--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0")


@contextmanager
def gateway_to(socket: Path, *flags: str) -> Iterator[Service]:
    """Run a gateway that may end in any way. It is killed afterwards if it has not ended."""
    arguments = ("--listen", "127.0.0.1:0", "--replicas", f"unix:{socket}", *ANY_PORTS, "--drain-seconds", "5")
    with Service("gateway", *arguments, *flags) as gateway:
        gateway.wait_for("serving")
        yield gateway


@contextmanager
def dispatcher_at(socket: Path, *flags: str) -> Iterator[Service]:
    """Run a replica in the same way."""
    arguments = ("--listen", f"unix:{socket}", *ANY_PORTS, "--workers", "2", "--kernels", str(FAULT_KERNELS))
    with Service("compute", *arguments, *flags) as dispatcher:
        dispatcher.wait_for("serving")
        yield dispatcher


@contextmanager
def unit_at(address: str, *flags: str) -> Iterator[Service]:
    """Run both as a unit, in the same way."""
    arguments = ("--listen", address, *ANY_PORTS, "--workers", "2", "--kernels", str(FAULT_KERNELS))
    with unit_service(*arguments, *flags) as unit:
        unit.wait_for("serving")
        unit.wait_for("replica is ready")
        yield unit


async def answered(client: Client, within: float = 10.0) -> None:
    """Wait until a call is answered: the killed process is replaced, and this client has noticed."""
    x = np.arange(3.0)
    end = time.monotonic() + within
    while True:
        try:
            np.testing.assert_array_equal(await client.echo(x, timeout=5.0), x)
        except (Aborted, Unavailable):
            assert time.monotonic() < end, f"no call is answered within {within} s"
            await asyncio.sleep(0.02)
        else:
            return


def restarts(mesh: Mesh, reason: str = "") -> float:
    """Return how many workers have been replaced, for one reason if that is given."""
    labels = {"reason": reason} if reason else {}
    return Scrape(mesh.dispatcher_metrics).sum("unlatch_worker_restarts_total", **labels)


def is_full(mesh: Mesh) -> bool:
    """Whether both of the mesh's workers are up."""
    return Scrape(mesh.dispatcher_metrics).sum("unlatch_worker_up") == 2


def gone(mesh: Mesh) -> float:
    """Return how many cancelled calls the dispatcher has counted."""
    return Scrape(mesh.dispatcher_metrics).sum("unlatch_calls_total", code="CANCELLED")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of a module that names MESHES on a mesh of each kind."""
    if "faulty" in metafunc.fixturenames and (meshes := getattr(metafunc.module, "MESHES", None)):
        metafunc.parametrize("faulty", meshes, indirect=True, scope="module")


@pytest.fixture(scope="session")
def at_start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file `way.start` in this directory makes the next worker of a mesh of faults die while it starts."""
    directory = tmp_path_factory.mktemp("start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULTS_DIRECTORY", str(directory))
        yield directory


@pytest.fixture(scope="module")
def faulty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, at_start: Path) -> Iterator[Mesh]:
    """A mesh of two workers that serve the kernels of faults. It must survive every fault, and end cleanly.

    Modules with MESHES run their tests on each of these. Its runs never count as long, so that calls can be staged
    behind them.
    """
    flags = ["--kernels", str(FAULT_KERNELS), "--long-call-seconds", "3600", "--stopped-worker-seconds", "0.5"]
    # Calls must wait at the replica, which is what the tests hurt.
    flags += ["--ahead-seconds", "3600"]
    # A dispatcher that a test stops for a second must not count as frozen.
    flags += ["--report-seconds", "1"]
    run = MESHES[getattr(request, "param", "apart")]
    with run(tmp_path_factory.mktemp("faulty"), dispatcher=flags) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def client(faulty: Mesh) -> AsyncIterator[Client]:
    """A client of the mesh of faults."""
    async with Client(faulty.gateway, timeout=30.0) as opened:
        yield opened


@pytest.fixture
def gate(tmp_path: Path) -> Callable[[str], Gate]:
    """Make gates."""
    return lambda name: Gate(tmp_path / name)


class Fleet:
    """Replicas of one worker each, and one gateway to them. Each replica may end in any way, and be started again."""

    def __init__(self, stack: ExitStack, directory: Path, count: int, flags: Sequence[str]) -> None:
        self._stack = stack
        self._flags = flags
        self.sockets = [directory / f"{number}.sock" for number in range(count)]
        self.dispatchers: list[Service | None] = [None] * count
        targets = ",".join(f"unix:{socket}" for socket in self.sockets)
        arguments = ("--listen", "127.0.0.1:0", "--replicas", targets, *ANY_PORTS, "--drain-seconds", "5")
        self.gateway = stack.enter_context(Service("gateway", *arguments))
        serving = self.gateway.wait_for("serving")
        self.address, self.metrics = serving["listen"], serving["metrics_listen"]

    def start(self, number: int) -> None:
        """Start a replica in the place of one that has ended, and wait until the gateway has a lane to it."""
        line = len(self.gateway.lines)
        self.dispatchers[number] = self._stack.enter_context(
            dispatcher_at(self.sockets[number], "--workers", "1", *self._flags)
        )
        self.gateway.wait_for("replica is ready", after=line, replica=f"unix:{self.sockets[number]}")

    def running(self, record: Path) -> int:
        """Return the replica whose worker has written its pid beside this record."""
        worker = int(Path(f"{record}.pid").read_text())
        dispatchers = enumerate(self.dispatchers)
        return next(
            number
            for number, dispatcher in dispatchers
            if dispatcher and worker in {one.pid for one in tree(dispatcher.pid)}
        )

    def kill(self, number: int) -> None:
        """Kill a replica."""
        dispatcher = self.dispatchers[number]
        assert dispatcher is not None
        dispatcher.kill()

    def stop(self, number: int) -> None:
        """Stop a replica by SIGTERM, and wait for its drain."""
        dispatcher = self.dispatchers[number]
        assert dispatcher is not None
        dispatcher.stop()


@pytest.fixture
def start_fleet(tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    """Start a gateway that knows of this many replicas, none of them running: `start_fleet(3, *flags of replicas)`."""
    with ExitStack() as stack:
        yield lambda count, *flags: Fleet(stack, tmp_path, count, flags)
