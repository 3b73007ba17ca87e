"""A short soak: `make soak` for a few seconds."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import grpc.aio
import numpy as np
import pytest

from bench.load.counted import Answers, CountedChannel
from bench.soak.callers import UNLIMITED
from tests.mesh.faults.conftest import Fleet
from tests.support.mesh import ROOT
from tests.support.watching import until
from unlatch.link import Link

# Replies of 128 MiB take long enough that a replica can be killed in the middle of one.
X, TIMES = np.arange(2.0**17), 128


@pytest.mark.alone
@pytest.mark.timeout(150)
def test_every_call_ends_once_and_rightly_while_workers_are_killed() -> None:
    """Every reply is right by its content, every failure is one that the table predicts.

    None is lost or answered twice.
    """
    ended = subprocess.run(
        [sys.executable, "-m", "bench.soak", "--seconds", "12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    assert "every call ended once" in ended.stdout


@pytest.mark.asyncio(loop_scope="session")
async def test_reply_that_breaks_off_and_begins_again_is_one_answer(
    start_fleet: Callable[..., Fleet], tmp_path: Path
) -> None:
    """A replica is killed in the middle of a reply. The caller gets the whole of another one, in one answer."""
    fleet = start_fleet(2)
    await asyncio.gather(*(asyncio.to_thread(fleet.start, number) for number in range(2)))
    all_answers: list[Answers] = []
    channel = CountedChannel(
        grpc.aio.insecure_channel(fleet.address, options=UNLIMITED), all_answers, replicas_die=True
    )
    link = Link(cast("grpc.aio.Channel", channel), fleet.address)
    try:
        await link.ready(10.0)
        (answers,) = all_answers
        for attempt in range(5):
            record, there = tmp_path / f"record {attempt}", tmp_path / f"there {attempt}"
            named = {"times": TIMES, "there": str(there), "record": str(record)}
            call = link.begin(link.request("repeats_when", named, np.copy), (X,), 60.0)
            await until(record.exists, "it has begun")
            number = fleet.running(record)
            there.touch()
            await until(lambda: len(answers) > attempt, "the reply has begun")  # noqa: B023 (awaited here)
            fleet.kill(number)
            assert np.array_equal(await call.result, np.tile(X, TIMES))
            if answers.replaced:
                break
            # This test was not in time: the gateway had the whole of the reply before the kill.
            await asyncio.to_thread(fleet.start, number)
    finally:
        await link.close()
    assert (answers.wrong, answers.replaced) == ([], 1)
