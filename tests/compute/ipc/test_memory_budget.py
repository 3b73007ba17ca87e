"""A worker's memory limit, computed from the memory that the container has."""

import pytest

from unlatch.common.net.settings import MiB
from unlatch.compute.errors import StartError
from unlatch.compute.ipc.memory_budget import MemoryBudget, memory_budget
from unlatch.compute.settings import ComputeSettings

# The services themselves get 256 MiB.
ARENA, REPLIES = 512 * MiB, 256 * MiB


def settings(workers: int, worker_memory_bytes: int = 0) -> ComputeSettings:
    return ComputeSettings.model_validate(
        {
            "workers": workers,
            "input_arena_bytes": ARENA,
            "max_reply_bytes": REPLIES,
            "worker_memory_bytes": worker_memory_bytes,
        }
    )


@pytest.mark.parametrize(
    ("workers", "own", "granted", "limit"),
    [
        (2, 0, 0, 0),
        (2, 0, 2048 * MiB, 512 * MiB),
        (4, 0, 2048 * MiB, 256 * MiB),
        (1, 0, 1040 * MiB, 16 * MiB),
        (2, 100 * MiB, 0, 100 * MiB),
        (2, 100 * MiB, 2048 * MiB, 100 * MiB),
        (2, 4096 * MiB, 2048 * MiB, 4096 * MiB),
    ],
)
def test_share(workers: int, own: int, granted: int, limit: int) -> None:
    """The rest beside arena, replies and services is divided evenly. A limit that is set is taken as it is."""
    found = memory_budget(settings(workers, own), granted)
    assert found == MemoryBudget(ARENA, limit)
    if not own:
        assert limit * workers + ARENA + REPLIES <= granted or not granted


@pytest.mark.parametrize(
    ("workers", "own", "granted", "says"),
    [
        (2, 0, 1024 * MiB, "leave 0 for each of 2 workers"),
        (2, 0, 512 * MiB, f"the container grants {512 * MiB} bytes; input_arena_bytes={ARENA}"),
        (3, 0, 1060 * MiB, f"leave {12 * MiB} for each of 3 workers, which is too little"),
        (1, 1 * MiB, 0, f"{MiB} bytes are too little"),
    ],
)
def test_too_little_is_refused(workers: int, own: int, granted: int, says: str) -> None:
    """A worker that could compute nothing is not started. The message has every number of the calculation."""
    with pytest.raises(StartError, match=f"^worker_memory_bytes: .*{says}"):
        memory_budget(settings(workers, own), granted)


@pytest.mark.parametrize(
    ("granted", "arena", "worker"),
    [(0, 2048 * MiB, 0), (1024 * MiB, 256 * MiB, 128 * MiB), (16384 * MiB, 2048 * MiB, 6784 * MiB)],
)
def test_arena_follows_the_container(granted: int, arena: int, worker: int) -> None:
    """An arena whose size is not set is a part of the container's memory, so that small containers serve too."""
    assert memory_budget(ComputeSettings.model_validate({"workers": 2}), granted) == MemoryBudget(arena, worker)


def test_async_workers_have_their_share() -> None:
    """The memory is divided among all workers of the replica, async ones included."""
    granted = 2048 * MiB
    assert memory_budget(settings(2), granted, 2) == memory_budget(settings(4), granted)
