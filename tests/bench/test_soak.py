"""The soak's judgement of what is wrong: a soak that could find nothing would show nothing."""

import numpy as np
import pytest

from bench.load.counted import Answers
from bench.soak.__main__ import Watched, uncounted
from bench.soak.calls import KINDS, Kind
from unlatch.protos.unlatch_pb2 import Frames, LaneMessage

X = np.arange(1.0, 17.0)
BY_NAME = {kind.name: kind for kind in KINDS}
DIED = "worker 1 ended while it ran the call: the worker was killed by SIGKILL"
POISON = "2 workers ended while they ran this call, the last time because the worker was killed by SIGKILL"

SMALL, PURE, HURRIED = BY_NAME["small"], BY_NAME["small, pure"], BY_NAME["short deadline"]
LEAVER, OBJECTED = BY_NAME["caller leaves"], BY_NAME["refused by its kernel"]


@pytest.mark.parametrize(
    ("kind", "code", "said", "right"),
    [
        (SMALL, "OK", -X, True),
        (SMALL, "OK", X, False),
        (SMALL, "OK", (-X).astype("f4"), False),
        (SMALL, "UNAVAILABLE", DIED, True),
        (PURE, "UNAVAILABLE", DIED, False),
        (SMALL, "UNAVAILABLE", "the lane to the server broke before the reply was here", False),
        (PURE, "FAILED_PRECONDITION", POISON, True),
        (SMALL, "FAILED_PRECONDITION", POISON, False),
        (HURRIED, "DEADLINE_EXCEEDED", "", True),
        (SMALL, "DEADLINE_EXCEEDED", "", False),
        (SMALL, "RESOURCE_EXHAUSTED", "the queue is full", False),
        (LEAVER, "left", "", True),
        (SMALL, "left", "", False),
        (SMALL, "LOST", "", False),
        (OBJECTED, "INVALID_ARGUMENT", f"the first value is {X[0]!r}", True),
        (OBJECTED, "INVALID_ARGUMENT", "another vector's", False),
        (OBJECTED, "OK", X, False),
    ],
)
def test_an_end_is_right_only_as_the_table_of_failures_has_it(
    kind: Kind, code: str, said: object, *, right: bool
) -> None:
    """A success is judged by its content, and a failure by its status and message, as in the table of failures."""
    assert (kind.wrong(X, code, said) is None) is right  # type: ignore[arg-type]


def reply(frames: Frames, length: int, *, whole: bool = True, failed: bool = False) -> None:
    frame = frames.replies.add(call=7, whole=whole)
    if failed:
        frame.failure.code = 14
    else:
        frame.response.kernel = "doubled"
        frame.lengths.append(length)


@pytest.mark.parametrize(
    ("what", "right"),
    [
        (("whole",), True),
        (("whole", "whole"), False),
        (("whole", "failure"), False),
        (("failure", "whole"), False),
        (("in pieces", "piece", "piece"), True),
        (("in pieces", "piece", "failure"), True),
        (("in pieces", "piece", "piece", "failure"), False),
        (("in pieces", "piece", "piece", "piece"), False),
        (("in pieces", "in pieces"), False),
        (("piece",), False),
    ],
)
def test_a_second_answer_is_seen(what: tuple[str, ...], *, right: bool) -> None:
    """A caller takes the first answer to its call; the lane's count sees a second one."""
    answers = Answers()
    for part in what:
        frames = Frames()
        if part == "piece":
            frames.pieces.add(call=7)
        else:
            reply(frames, 8, whole=part == "whole", failed=part == "failure")
        payload = {"whole": [bytes(8)], "piece": [bytes(4)]}.get(part, [])
        answers.note(LaneMessage(frames=frames, payload=payload).SerializeToString())
    assert (not answers.wrong) is right


def test_a_call_that_never_ends_is_missed() -> None:
    """A missing end is found by the caller's count and by the gateway's."""
    door = {"begun": {"small": 3}, "ended": [["small", "OK", 1], ["small", "left", 1]], "wrong": []}
    none = frozenset[tuple[str, str]]()
    before = {"gateway": {("unlatch_calls_total", none): 5.0}, "dispatcher": {}}
    after = {"gateway": {("unlatch_calls_total", none): 6.0}, "dispatcher": {}}
    found = uncounted([("client", door)], before, after, kills=1)
    assert [what.partition(":")[0] for what in found] == ["client", "gateway", "dispatcher"]


def test_growth_is_told_from_what_comes_and_goes() -> None:
    """Growth of two MiB a minute is found, with and without tens of MiB that come and go."""
    steady, noisy = Watched(), Watched()
    for at in range(0, 600, 5):
        steady.memory["dispatcher"].append((at, 50e6 + at * 2 * 2**20 / 60))
        noisy.memory["dispatcher"].append((at, 50e6 + at * 2 * 2**20 / 60 + 100e6 * (at * 7919 % 11 / 11)))
    slope, unsure = steady.growth("dispatcher")
    assert slope == pytest.approx(2.0)
    assert unsure == pytest.approx(0.0, abs=1e-6)
    slope, unsure = noisy.growth("dispatcher")
    assert abs(slope - 2.0) < unsure > 1.0
