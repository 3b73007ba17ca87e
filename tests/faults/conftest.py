"""Meshes for faults: their workers serve kernels that misbehave, and their services may end other than asked to."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from common.errors import Unavailable
from tests.faults.watching import Gate
from tests.mesh import Mesh, Service, running_mesh
from unlatch import Client

FAULT_KERNELS = Path(__file__).with_name("fault_kernels.py")
ANY_PORTS = ("--metrics-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0")


@contextmanager
def gateway_to(socket: Path, *flags: str) -> Iterator[Service]:
    """A gateway that may end any way; killed afterwards if it has not."""
    arguments = ("--listen", "127.0.0.1:0", "--replicas", f"unix:{socket}", *ANY_PORTS, "--drain-seconds", "5")
    with Service("gateway", *arguments, *flags) as gateway:
        gateway.wait_for("serving")
        yield gateway


@contextmanager
def front_at(socket: Path, *flags: str) -> Iterator[Service]:
    """The same of a replica."""
    arguments = ("--listen", f"unix:{socket}", *ANY_PORTS, "--workers", "2", "--kernels", str(FAULT_KERNELS))
    with Service("compute", *arguments, *flags) as front:
        front.wait_for("serving")
        yield front


async def answered(client: Client, within: float = 10.0) -> None:
    """Wait until a call is answered: what was killed is up again, and this client knows it."""
    x = np.arange(3.0)
    end = time.monotonic() + within
    while True:
        try:
            np.testing.assert_array_equal(await client.echo(x, timeout=5.0), x)
        except Unavailable:
            assert time.monotonic() < end, f"no call is answered within {within} s"
            await asyncio.sleep(0.02)
        else:
            return


@pytest.fixture(scope="session")
def at_start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a file `way.start` makes the next worker of a mesh of faults die while it starts."""
    directory = tmp_path_factory.mktemp("start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAULTS_DIRECTORY", str(directory))
        yield directory


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, at_start: Path) -> Iterator[Mesh]:
    """A mesh of two workers that serve the kernels of faults; it must outlive every fault, and end cleanly.

    However long they run, they do not count as long: calls are staged behind them.
    """
    flags = ["--kernels", str(FAULT_KERNELS), "--long-call-seconds", "3600", "--stopped-worker-seconds", "0.5"]
    # What waits is to wait at the replica, which is what is hurt.
    flags += ["--ahead-seconds", "3600"]
    with running_mesh(tmp_path_factory.mktemp("faulty"), front=flags) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def client(faulty: Mesh) -> AsyncIterator[Client]:
    """A client of the mesh of faults."""
    async with Client(faulty.gateway, timeout=30.0) as opened:
        yield opened


@pytest.fixture
def gate(tmp_path: Path) -> Callable[[str], Gate]:
    """Makes gates."""
    return lambda name: Gate(tmp_path / name)
