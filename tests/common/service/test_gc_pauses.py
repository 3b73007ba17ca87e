"""Collection of cycles: none while many calls are live, and soon once few are."""

import gc
import weakref

from tests.support.watching import until
from unlatch.common.service.gc_pauses import GcPauses


class Node:
    """An object that can refer to itself."""

    def __init__(self) -> None:
        self.me = self


async def test_old_cycles_are_collected_when_few_calls_are_live() -> None:
    """A cycle that has outlived the young collections is collected at the first check that finds the process quiet."""
    before, live = gc.get_threshold(), 1_000
    with GcPauses(lambda: live):
        assert gc.get_freeze_count() > 0
        assert gc.get_threshold()[2] > before[2]
        node = weakref.ref(_outlived())
        assert node() is not None
        live = 0
        await until(lambda: node() is None, "the cycle is gone")
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def _outlived() -> Node:
    node = Node()
    gc.collect(1)
    return node
