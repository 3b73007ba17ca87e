"""Calls that kill workers: the third identical one is refused, from any caller, and harmless calls are let through."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.mesh.faults.conftest import FAULT_KERNELS, answered, restarts
from tests.support.mesh import Mesh, running_mesh
from unlatch import Client
from unlatch.common.errors import Aborted, DeadlineExceeded, FailedPrecondition
from unlatch.common.kernel.tensors import Array

pytestmark = pytest.mark.asyncio(loop_scope="session")

# Small arrays are read on the event loop, and large ones by a thread.
SIZES = {"small": 3, "large": 1 << 20}
REFUSED = "2 workers ended while they ran this call, the last time because the worker was killed by SIGKILL"
POISON_SECONDS = 2


@pytest.fixture
def forgetful(tmp_path: Path) -> Iterator[Mesh]:
    """A mesh that forgets such calls soon."""
    flags = ["--kernels", str(FAULT_KERNELS), "--poison-seconds", str(POISON_SECONDS)]
    with running_mesh(tmp_path, dispatcher=flags) as running:
        yield running


def dice(size: int) -> Array:
    """Make an array that no call has had before."""
    return np.frombuffer(os.urandom(8 * size), "u8").astype("f8")


async def kills(client: Client, x: Array, how: str = "sigkill") -> None:
    with pytest.raises(Aborted, match="ended while it ran the call"):
        await client.dies(x, how=how)


@pytest.mark.parametrize("size", SIZES)
async def test_call_that_killed_twice_is_refused(faulty: Mesh, client: Client, size: str) -> None:
    """A caller that repeats a call that killed twice is refused. From then on no worker dies of it."""
    x = dice(SIZES[size])
    await kills(client, x)
    with pytest.raises(FailedPrecondition, match=REFUSED):
        await client.dies(x, how="sigkill")
    before = restarts(faulty)
    async with Client(faulty.gateway) as other:
        for _ in range(5):
            with pytest.raises(FailedPrecondition, match=r"it is refused for another \d+ s"):
                await other.dies(x.copy(), how="sigkill")
    assert restarts(faulty) == before
    # A call of that kernel and size with other contents is another call.
    await kills(client, dice(SIZES[size]))


async def test_many_calls_alike_kill_few_workers(faulty: Mesh, client: Client) -> None:
    """When a call turns out to be poison, identical ones in the queue are refused as well."""
    x, before = dice(3), restarts(faulty)
    outcomes = await asyncio.gather(*(client.dies(x, how="sigkill") for _ in range(60)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, FailedPrecondition)]
    assert all(isinstance(outcome, FailedPrecondition | Aborted) for outcome in outcomes), outcomes
    # Two deaths are counted; each of the two workers may have had another one staged meanwhile.
    assert restarts(faulty) - before <= 6
    assert len(refused) >= 54


async def test_call_that_did_no_harm_is_cleared(client: Client, tmp_path: Path) -> None:
    """A worker that was lost for another reason is forgotten as soon as an identical call has run to its end."""
    record, x = tmp_path / "deadly", dice(3)
    for _ in range(3):
        record.touch()
        with pytest.raises(Aborted, match="the worker was killed by SIGKILL"):
            await client.dies_while(x, record=str(record))
        record.unlink()
        np.testing.assert_array_equal(await client.dies_while(x, record=str(record)), x)


async def test_worker_that_we_end_is_no_strike(client: Client) -> None:
    """Calls that take too long lose their workers again and again, and never count as poison."""
    for _ in range(3):
        with pytest.raises(DeadlineExceeded, match="kernel timed ran for longer"):
            await client.timed(seconds=60.0)


async def test_poison_is_forgotten_in_time(forgetful: Mesh) -> None:
    """When its time is over the call is tried again."""
    async with Client(forgetful.gateway) as client:
        await answered(client)
        x = dice(3)
        await kills(client, x)
        with pytest.raises(FailedPrecondition, match=rf"refused for another {POISON_SECONDS} s"):
            await client.dies(x, how="sigkill")
        outcome: BaseException = FailedPrecondition("")
        while isinstance(outcome, FailedPrecondition):
            with pytest.raises((FailedPrecondition, Aborted)) as found:
                await client.dies(x, how="sigkill")
            outcome = found.value
        assert "ended while it ran the call" in str(outcome)
