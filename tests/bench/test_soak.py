"""The soak's judgement of what is wrong: a soak that could find nothing would show nothing."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from bench.load.counted import Answers
from bench.scrape import Scrape
from bench.soak.__main__ import Watched, grown, more, still_used, uncounted, unended
from bench.soak.calls import KINDS, Kind
from bench.soak.mesh import INSIDE, by_unit, entries, everywhere
from tests.support.mesh import ROOT
from tests.support.watching import wait_until
from unlatch.common.errors import POSSIBLE_EFFECT
from unlatch.protos.unlatch_pb2 import Descriptor, Frames, Kernel, LaneMessage, Request, Welcome

X = np.arange(1.0, 17.0)
BY_NAME = {kind.name: kind for kind in KINDS}
DIED = "worker 1 ended while it ran the call: the worker was killed by SIGKILL"
POISON = "2 workers ended while they ran this call, the last time because the worker was killed by SIGKILL"

BROKE = "recvmsg:Connection reset by peer"
REFUSED = "failed to connect to all addresses; last error: UNKNOWN: Failed to connect: Connection refused (111)"

SMALL, PURE, HURRIED = BY_NAME["small"], BY_NAME["small, pure"], BY_NAME["short deadline"]
LEAVER, OBJECTED = BY_NAME["caller leaves"], BY_NAME["refused by its kernel"]


@pytest.mark.parametrize(
    ("kind", "code", "said", "right"),
    [
        (SMALL, "OK", -X, True),
        (SMALL, "OK", X, False),
        (SMALL, "OK", (-X).astype("f4"), False),
        (SMALL, "ABORTED", DIED, True),
        (PURE, "ABORTED", DIED, False),
        (SMALL, "UNAVAILABLE", DIED, False),
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


@pytest.mark.parametrize(
    ("kind", "code", "said", "right"),
    [
        (SMALL, "UNAVAILABLE", BROKE, True),
        (PURE, "UNAVAILABLE", BROKE, True),
        (OBJECTED, "UNAVAILABLE", BROKE, True),
        (PURE, "UNAVAILABLE", REFUSED, False),
        (SMALL, "ABORTED", POSSIBLE_EFFECT, True),
        (PURE, "ABORTED", POSSIBLE_EFFECT, False),
        (SMALL, "ABORTED", "another reason", False),
        (SMALL, "DEADLINE_EXCEEDED", "", False),
        (SMALL, "LOST", "", False),
        (SMALL, "CANCELLED", "", False),
        (SMALL, "OK", X, False),
    ],
)
def test_a_units_death_costs_what_the_table_of_failures_has(
    kind: Kind, code: str, said: object, *, right: bool
) -> None:
    """While units are killed, calls may lose their connection. No connection is refused, since another unit serves."""
    assert (kind.wrong(X, code, said, units_die=True) is None) is right  # type: ignore[arg-type]
    if code != "OK":
        assert kind.wrong(X, code, said) is not None  # type: ignore[arg-type]


def part_of_answer(what: str) -> bytes:
    """A message of a lane with a part of the answer to call 7: its usual size is 8 bytes, and a piece's 4."""
    frames, payload = Frames(), []
    if what == "piece":
        frames.pieces.add(call=7)
        payload = [bytes(4)]
    elif what == "failure":
        frames.replies.add(call=7).failure.code = 14
    else:
        frame = frames.replies.add(call=7, whole=what == "whole", lengths=[12 if what == "longer" else 8])
        frame.response.kernel = "doubled"
        payload = [bytes(8)] if frame.whole else []
    return LaneMessage(frames=frames, payload=payload).SerializeToString()


def judged(parts: Iterable[str], kernel: str = "doubled", *, replicas_die: bool) -> Answers:
    """Count the answers to a call that is answered by these parts. The kernel "doubled" is pure."""
    answers = Answers(replicas_die=replicas_die)
    welcome = Welcome(kernels=[Kernel(name="doubled", pure=True), Kernel(name="negated")])
    answers.note(LaneMessage(frames=Frames(welcome=welcome)).SerializeToString())
    call = Descriptor(call=7, request=Request(kernel=kernel))
    answers.asked(LaneMessage(frames=Frames(calls=[call])).SerializeToString())
    for part in parts:
        answers.note(part_of_answer(part))
    return answers


@pytest.mark.parametrize("replicas_die", [True, False])
@pytest.mark.parametrize(
    ("parts", "right"),
    [
        (("whole",), True),
        (("whole", "whole"), False),
        (("whole", "in pieces"), False),
        (("whole", "failure"), False),
        (("failure", "whole"), False),
        (("failure", "failure"), False),
        (("in pieces", "piece", "piece"), True),
        (("in pieces", "piece", "failure"), True),
        (("in pieces", "piece", "failure", "failure"), False),
        (("in pieces", "piece", "failure", "piece"), False),
        (("in pieces", "piece", "failure", "in pieces"), False),
        (("in pieces", "piece", "piece", "failure"), False),
        (("in pieces", "piece", "piece", "piece"), False),
        (("in pieces", "piece", "piece", "in pieces"), False),
        (("piece",), False),
    ],
)
def test_a_second_answer_is_seen(parts: tuple[str, ...], *, replicas_die: bool, right: bool) -> None:
    """A caller takes the first answer to its call; the lane's count sees a second one, whatever dies."""
    answers = judged(parts, replicas_die=replicas_die)
    assert (not answers.wrong) is right
    assert len(answers) == (0 if parts == ("piece",) else 1)
    assert answers.replaced == 0


@pytest.mark.parametrize(
    ("parts", "right"),
    [
        (("in pieces", "in pieces", "piece", "piece"), True),
        (("in pieces", "piece", "in pieces", "piece", "piece"), True),
        (("in pieces", "piece", "in pieces", "piece", "failure"), True),
        (("in pieces", "piece", "whole"), True),
        (("in pieces", "piece", "longer"), False),
        (("in pieces", "piece", "in pieces", "piece", "piece", "piece"), False),
        (("in pieces", "piece", "in pieces", "piece", "piece", "in pieces"), False),
    ],
)
def test_a_response_that_broke_off_may_be_replaced(parts: tuple[str, ...], *, right: bool) -> None:
    """By one of the same size, before its last byte, if replicas die and the kernel is pure. Both are one answer."""
    answers = judged(parts, replicas_die=True)
    assert (not answers.wrong) is right
    assert answers.replaced > 0
    assert len(answers) == 1
    assert judged(parts, replicas_die=False).wrong
    assert judged(parts, "negated", replicas_die=True).wrong


def test_a_call_that_never_ends_is_missed() -> None:
    """A missing end is found by the caller's count and by the gateway's."""
    door = {"begun": {"small": 3}, "ended": [["small", "OK", 1], ["small", "left", 1]], "wrong": []}
    gateway = frozenset({("component", "gateway")})
    before: dict[str, Scrape] = {"gateway": {("unlatch_calls_total", gateway): 5.0}, "dispatcher": {}}
    after: dict[str, Scrape] = {"gateway": {("unlatch_calls_total", gateway): 6.0}, "dispatcher": {}}
    found = uncounted([("client", door)], before, after, kills=1)
    assert [what.partition(":")[0] for what in found] == ["client", "gateway", "dispatcher"]


def test_a_missing_end_is_found_while_units_are_killed() -> None:
    """The counts of a unit end with it. The callers' counts show a call that never ended."""
    door = {"begun": {"small": 3}, "ended": [["small", "OK", 1], ["small", "UNAVAILABLE", 1]], "wrong": []}
    assert unended([("lane", door)]) == ["lane: 3 calls began, and 2 ended"]


def test_metrics_of_several_units_are_told_apart() -> None:
    """Each unit's counters are compared with its own; a unit that does not answer has none; sums are the machine's."""

    def series(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
        return name, frozenset(labels.items())

    parts = by_unit(
        {
            series("unlatch_calls_total", component="gateway", unit="0"): 2.0,
            series("unlatch_calls_total", component="compute", unit="0"): 7.0,
            series("unlatch_calls_total", component="gateway", unit="2"): 3.0,
            series("unlatch_unit_up", unit="0"): 1.0,
            series("unlatch_unit_up", unit="1"): 0.0,
            series("unlatch_unit_up", unit="2"): 1.0,
        }
    )
    assert parts.keys() == {"supervisor", "unit 0", "unit 2"}
    assert parts["unit 2"] == {series("unlatch_calls_total", component="gateway"): 3.0}
    assert everywhere(parts, "unlatch_calls_total") == 12.0
    assert everywhere(parts, "unlatch_calls_total", "gateway") == 5.0


def test_what_stays_open_is_seen() -> None:
    """Descriptors and threads that stay open are wrong, except for the one thread that starts late."""
    start = {"gateway": {"descriptors": 20, "threads": 9}, "dispatcher": {"descriptors": 40, "threads": 7}}
    assert not more(
        start, {"gateway": {"descriptors": 19, "threads": 9}, "dispatcher": {"descriptors": 40, "threads": 6}}
    )
    now = {"gateway": {"descriptors": 20, "threads": 11}, "dispatcher": {"descriptors": 43, "threads": 7}}
    assert more(start, now) == [
        "gateway: 11 threads, 2 more than at the start",
        "dispatcher: 43 descriptors, 3 more than at the start",
    ]
    assert more({"mesh": {"processes": 7, "files": 9}}, {"mesh": {"processes": 8, "files": 9}}) == [
        "mesh: 8 processes, 1 more than at the start"
    ]


def test_files_that_are_removed_meanwhile_are_left_out(tmp_path: Path) -> None:
    """Units remove directories while the soak counts what is left of them."""
    kept = tmp_path / "kept" / "file"
    kept.parent.mkdir()
    kept.touch()
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            (tmp_path / "gone" / "below").mkdir(parents=True)
            (tmp_path / "gone" / "below").rmdir()
            (tmp_path / "gone").rmdir()

    changing = threading.Thread(target=come_and_go)
    changing.start()
    try:
        for _ in range(100):
            assert {kept, kept.parent} <= set(entries(tmp_path))
    finally:
        over.set()
        changing.join()
    assert sorted(entries(tmp_path)) == [kept.parent, kept]


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


def kept_by_malloc(seed: int, *, minutes: float, growth: float) -> Watched:
    """Readings of three services without growth but for the last: what malloc keeps rises and falls in slow steps."""
    watched, dice = Watched(), np.random.default_rng(seed)
    for name in ("supervisor", "unit 0", "unit 1"):
        kept, steps = 0.0, dice.normal(size=round(minutes * 12))
        for number, step in enumerate(steps):
            kept = 0.6 * kept + 0.8 * step
            grown = growth * number / 12 if name == "unit 1" else 0.0
            watched.memory[name].append((5.0 * number, (100 + 14 * kept + grown) * 2**20))
    return watched


def test_growth_is_rarely_found_where_none_is() -> None:
    """In 1 of 20 runs at most, though each reading resembles the one before; and growth is found in a long run."""
    found = [grown(kept_by_malloc(seed, minutes=5, growth=0.0)) for seed in range(200)]
    assert sum(map(bool, found)) <= 10
    for seed in range(20):
        (one,) = grown(kept_by_malloc(seed, minutes=60, growth=3.0))
        assert one.startswith("unit 1: its memory grows by ")
        assert not grown(kept_by_malloc(seed, minutes=60, growth=0.0))


def test_memory_that_stays_in_use_is_found() -> None:
    """Some may: tables and caches fill. A unit that was started again is another process, and is not compared."""
    before = {("unit 0", 10): 13 << 20, ("unit 1", 11): 13 << 20, ("unit 2", 12): 13 << 20}
    after = {("unit 0", 10): 21 << 20, ("unit 1", 11): 23 << 20, ("unit 2", 13): 90 << 20}
    assert still_used(before, after, 300.0) == ["unit 1: after the last call it uses 23.0 MiB, before the first 13.0"]


USES = """
import sys
from unlatch.common.machine.memory import keep_freed, put_back, take
keep_freed(largest_bytes=8 << 20, most_bytes=64 << 20, step_bytes=4 << 20)
sys.stdin.readline()
blocks = [take(size) for size in [4 << 20] * 8 + [32 << 20]]
sys.stdin.readline()
for block in blocks:
    put_back(block)
sys.stdin.readline()
"""


@pytest.mark.parametrize("service", [True, False])
def test_part_tells_the_memory_in_use(tmp_path: Path, *, service: bool) -> None:
    """Blocks of malloc count until they are freed, though malloc keeps some. No other process tells it."""
    variables = {"PYTHONPATH": f"{ROOT}:{INSIDE}", "SOAK_USED": str(tmp_path)}
    argv = [sys.executable, "-c", USES, *(["unlatch.unit"] if service else [])]
    with subprocess.Popen(argv, env={**os.environ, **variables}, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        told = tmp_path / str(process.pid)
        if service:
            wait_until(told.exists, "it tells")
            before = int(told.read_text())
            print(file=process.stdin, flush=True)
            wait_until(lambda: int(told.read_text()) - before > 63 << 20, "the blocks count")
            print(file=process.stdin, flush=True)
            wait_until(lambda: int(told.read_text()) - before < 4 << 20, "the blocks count no more")
        process.stdin.close()
        assert process.wait(30.0) == 0
    assert told.exists() is service
