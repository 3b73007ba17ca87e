"""What tests share: a mesh of real processes, and its doors."""

import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import hypothesis
import pytest

from tests.support.doors import LaneEnd, Oip
from tests.support.mesh import Mesh, running_mesh
from tests.support.turns import a_turn

# How fast something is says the benchmark; a test that is slow on a busy machine has found nothing.
hypothesis.settings.register_profile("unlatch", deadline=None)
hypothesis.settings.load_profile("unlatch")

StartMesh = Callable[..., Mesh]


def pytest_configure() -> None:
    """What tests start can be interrupted, though they were started in the background: there a shell ignores SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test waits for its turn before its time begins to count."""
    with a_turn(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.fixture(scope="session")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh for every test that leaves it as it was."""
    with running_mesh(tmp_path_factory.mktemp("mesh")) as running:
        yield running


@pytest.fixture
def start_mesh(tmp_path: Path) -> Iterator[StartMesh]:
    """Starts one mesh for this test alone: `start_mesh(front=[flags], gateway=[flags])`."""
    with ExitStack() as stack:
        yield lambda **flags: stack.enter_context(running_mesh(tmp_path, **flags))


@pytest.fixture(scope="session")
def channel(mesh: Mesh) -> Iterator[grpc.Channel]:
    """A blocking channel to the shared mesh's gateway."""
    with grpc.insecure_channel(mesh.gateway) as opened:
        yield opened


@pytest.fixture
def oip(channel: grpc.Channel) -> Oip:
    """The Open Inference Protocol's door of the shared mesh."""
    return Oip(channel)


@pytest.fixture
def lane(channel: grpc.Channel) -> Iterator[LaneEnd]:
    """A lane to the shared mesh's gateway, of this test alone."""
    with LaneEnd(channel) as opened:
        yield opened
