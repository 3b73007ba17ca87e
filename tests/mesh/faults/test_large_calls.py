"""Memory of large calls, which pass through piece by piece."""

import grpc
import numpy as np

from tests.conftest import StartMesh
from tests.support.doors import LaneEnd, request
from tests.support.mesh import Mesh
from tests.support.watching import Scrape, status_bytes, wait_until
from unlatch import Client

MEBIBYTE = 1024 * 1024
SIZE = 256 * MEBIBYTE
# Multiples of the call's size. The gateway keeps a call's bytes to send them again; the dispatcher has them in its
# arena.
GATEWAY, DISPATCHER = 1.5, 1.2


class Taken:
    """The memory that a process takes at its peak beyond what it has now, without shared arenas."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before = status_bytes(pid, "VmRSS") - self._shared()

    @property
    def most(self) -> int:
        # The arenas stay for a while after their last call: at the peak they were no larger than now.
        return status_bytes(self._pid, "VmHWM") - self._shared() - self._before

    def _shared(self) -> int:
        return status_bytes(self._pid, "RssShmem")


async def test_large_call_is_in_memory_little_more_than_once(start_mesh: StartMesh) -> None:
    """256 MiB there and back take at most 1.5 of that in the gateway, and 1.2 in the dispatcher beside its arena."""
    mesh, x = start_mesh(), np.random.default_rng(1).random(SIZE // 8)
    async with Client(mesh.gateway, timeout=60.0) as client:
        await client.identity(x[:1024])
        gateway, dispatcher = Taken(mesh.gateway_service.pid), Taken(mesh.dispatcher_service.pid)
        assert np.array_equal(await client.identity(x), x)
    assert 0 < gateway.most <= GATEWAY * SIZE
    assert dispatcher.most <= DISPATCHER * SIZE


def test_slow_reader_costs_the_gateway_no_more(start_mesh: StartMesh) -> None:
    """A caller that reads nothing of a large answer makes the gateway hold the answer, and no longer the call."""
    size = SIZE // 4
    mesh, x = start_mesh(), np.random.default_rng(1).random(size // 8)
    with grpc.insecure_channel(mesh.gateway) as channel, LaneEnd(channel, within=60.0) as lane:
        assert lane.serves(1)
        gateway = Taken(mesh.gateway_service.pid)
        lane.call(2, request("identity", {"x": x}))
        wait_until(lambda: _is_all_there(mesh), "the whole answer in the gateway", within=30.0)
        assert gateway.most <= GATEWAY * size
        assert lane.reply(2)[1] == x.tobytes()
        assert gateway.most <= GATEWAY * size


def _is_all_there(mesh: Mesh) -> bool:
    """Whether the dispatcher has sent the large answer's frame, and the gateway has taken all of its bytes."""
    return Scrape(mesh.gateway_metrics).sum("unlatch_calls_total", kernel="identity", code="OK") >= 2
