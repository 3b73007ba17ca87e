"""What tests share: a mesh of real processes, and its doors."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import hypothesis
import pytest

from tests.doors import LaneEnd, Oip
from tests.mesh import Mesh, running_mesh

# How fast something is says the benchmark; a test that is slow on a busy machine has found nothing.
hypothesis.settings.register_profile("unlatch", deadline=None)
hypothesis.settings.load_profile("unlatch")

StartMesh = Callable[..., Mesh]


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
