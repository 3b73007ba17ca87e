"""Fixtures that all tests share: a mesh of real processes, and its doors."""

import gc
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import hypothesis
import pytest
from xdist.remote import Producer

from tests.support.doors import KEEPS, LaneEnd, Oip
from tests.support.mesh import Mesh, running_mesh
from tests.support.sharing import LoadPackageScheduling
from tests.support.turns import a_turn

# Benchmarks measure speed. A test that is slow on a busy machine has found nothing.
hypothesis.settings.register_profile("unlatch", deadline=None)
hypothesis.settings.load_profile("unlatch")

StartMesh = Callable[..., Mesh]


def pytest_configure() -> None:
    """Make SIGINT and SIGHUP work in processes that tests start.

    A shell makes what it starts in the background ignore SIGINT, and nohup makes what it starts ignore SIGHUP.
    """
    for ignored, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(ignored) is signal.SIG_IGN:
            signal.signal(ignored, handler)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadPackageScheduling | None:
    """Keep the files of a package together, where files are kept whole."""
    return LoadPackageScheduling(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test wait for its turn before its timeout begins to count."""
    with a_turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.fixture
def own_garbage() -> Iterator[None]:
    """Leave the objects of earlier tests out of collections: these take seconds, and garbage may be logged."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh shared by all tests that leave it unchanged."""
    with running_mesh(tmp_path_factory.mktemp("mesh")) as running:
        yield running


@pytest.fixture
def start_mesh(tmp_path: Path) -> Iterator[StartMesh]:
    """Start a mesh for this test alone: `start_mesh(dispatcher=[flags], gateway=[flags])`."""
    with ExitStack() as stack:
        yield lambda **flags: stack.enter_context(running_mesh(tmp_path, **flags))


@pytest.fixture(scope="session")
def channel(mesh: Mesh) -> Iterator[grpc.Channel]:
    """A blocking channel to the shared mesh's gateway."""
    with grpc.insecure_channel(mesh.gateway, options=[KEEPS]) as opened:
        yield opened


@pytest.fixture
def oip(channel: grpc.Channel) -> Oip:
    """The Open Inference Protocol's door of the shared mesh."""
    return Oip(channel)


@pytest.fixture
def lane(channel: grpc.Channel) -> Iterator[LaneEnd]:
    """A lane to the shared mesh's gateway, for this test alone."""
    with LaneEnd(channel) as opened:
        yield opened
