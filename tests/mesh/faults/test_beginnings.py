"""The beginning of a call that may have effects: once its caller knows, with a bound on waiting for that."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from tests.mesh.faults.conftest import dispatcher_at
from tests.support.doors import LaneEnd, vector
from unlatch.protos.unlatch_pb2 import Frames


@pytest.fixture
def lane(tmp_path: Path) -> Iterator[LaneEnd]:
    """A lane to a replica of one worker, where calls are staged behind runs however long they are expected to take."""
    flags = ("--workers", "1", "--long-call-seconds", "3600", "--ahead-seconds", "3600")
    with (
        dispatcher_at(tmp_path / "dispatcher.sock", *flags) as dispatcher,
        grpc.insecure_channel(dispatcher.wait_for("serving")["listen"]) as channel,
        LaneEnd(channel, within=30.0) as opened,
    ):
        yield opened


def hear(lane: LaneEnd, number: int) -> None:
    """Say that it is known that a call begins."""
    lane.send(Frames(started=[number]))


def doubled(lane: LaneEnd, number: int) -> list[float]:
    """Return a call's result."""
    reply, body = lane.reply(number)
    assert reply.HasField("response"), reply.failure
    return [float(value) for value in np.frombuffer(body)]


def make_it_slow(lane: LaneEnd) -> None:
    """Make runs of the kernel count as so long that a call staged behind one is not about to begin."""
    for number in (101, 102, 103):
        lane.call(number, vector("doubles_once", 1.0, seconds=0.1))
        assert doubled(lane, number) == [2.0]


def test_beginning_waits_until_its_caller_knows(lane: LaneEnd, tmp_path: Path) -> None:
    """A call that may have effects has none before its caller knows."""
    record = tmp_path / "record"
    lane.call(1, vector("doubles_once", 1.0, record=str(record)), attempt=1)
    lane.until_started(1)
    assert not record.exists()
    hear(lane, 1)
    assert doubled(lane, 1) == [2.0]
    assert record.read_text() == "1.0\n"


def test_staged_call_begins_though_the_one_before_it_has_left(lane: LaneEnd) -> None:
    """A staged call's caller hears of its beginning when it is next, also if the caller before it has left."""
    make_it_slow(lane)
    lane.call(1, vector("doubles_once", 1.0), attempt=1)
    lane.until_started(1)
    lane.call(2, vector("doubles_once", 2.0), attempt=1)
    lane.send(Frames(cancels=[1]))
    lane.until_started(2)
    hear(lane, 2)
    assert doubled(lane, 2) == [4.0]


def test_caller_who_never_says_that_it_knows_is_not_waited_for(lane: LaneEnd, tmp_path: Path) -> None:
    """If its caller does not say that it knows, a call ends UNAVAILABLE without having begun.

    The staged one is next.
    """
    make_it_slow(lane)
    record = tmp_path / "record"
    lane.call(1, vector("doubles_once", 1.0, record=str(record)), attempt=1)
    lane.until_started(1)
    lane.call(2, vector("doubles_once", 2.0, record=str(record)), attempt=1)
    refusal = lane.refusal(1)
    assert (refusal.code, "did not confirm in time" in refusal.message) == ("UNAVAILABLE", True), refusal
    lane.until_started(2)
    hear(lane, 2)
    assert doubled(lane, 2) == [4.0]
    assert record.read_text() == "2.0\n"
