"""Calls that run as one: each caller gets its own rows, and an error in one of the calls affects no other."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.mesh.faults.conftest import FAULT_KERNELS, gone, restarts
from tests.support.doors import Oip
from tests.support.mesh import Mesh, running_mesh
from tests.support.watching import Gate, Scrape, memory_files, resident_bytes, until
from unlatch import Client
from unlatch.common.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
)
from unlatch.protos.inference_pb2 import ModelStatisticsRequest, ModelStatisticsResponse

pytestmark = pytest.mark.asyncio(loop_scope="session")

Array = np.ndarray[Any, Any]
GateMaker = Callable[[str], Gate]
Begin = Callable[..., Awaitable[list[Any]]]

X = np.arange(3.0)
ROW = np.ones((1, 2))
BAD = -ROW
MEBIBYTE = 1 << 20


# These tests' calls are often the same.
ALL_RUN = ["--no-coalescing"]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, at_start: Path) -> Iterator[Mesh]:
    """A mesh of one worker: calls that wait while it is busy wait together.

    Replies of more than 64 MiB are too large.
    """
    flags = ["--kernels", str(FAULT_KERNELS), "--workers", "1", "--long-call-seconds", "3600"]
    # Calls must wait at the replica, however long one call alone has taken.
    flags += ["--ahead-seconds", "3600"]
    limit = ["--max-reply-bytes", str(64 * MEBIBYTE)]
    with running_mesh(tmp_path_factory.mktemp("narrow"), dispatcher=[*flags, *limit], gateway=ALL_RUN) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def client(narrow: Mesh) -> AsyncIterator[Client]:
    """A client of this mesh. Hundreds of its calls wait for a run, and none may be refused for its deadline."""
    async with Client(narrow.gateway, timeout=3600.0) as opened:
        yield opened


def waiting(mesh: Mesh) -> float:
    return Scrape(mesh.dispatcher_metrics).sum("unlatch_queue_depth")


_gates = itertools.count()


@pytest.fixture
def begin(narrow: Mesh, client: Client, gate: GateMaker) -> Begin:
    """Begin calls together: they arrive while the worker is busy, and the worker goes on when all have arrived."""

    async def begun(calls: Sequence[Awaitable[object]]) -> list[asyncio.Future[Any]]:
        here = gate(f"busy{next(_gates)}")
        running = asyncio.ensure_future(client.waits(X, gate=str(here)))
        await until(lambda: here.reached, "the worker is busy")
        staged = asyncio.ensure_future(client.echo(X))
        tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(call) for call in calls]

        def all_wait() -> bool:
            for refused in (task for task in tasks if task.done()):
                refused.result()
            return waiting(narrow) == len(tasks)

        # 60 MiB may have to come.
        await until(all_wait, f"{len(tasks)} calls wait", 40.0)
        here.open()
        await asyncio.gather(running, staged)
        return tasks

    return begun


@pytest.fixture
def together(begin: Begin) -> Begin:
    """Return the results of calls that were begun together, errors among them."""

    async def ended(calls: Sequence[Awaitable[object]]) -> list[Any]:
        return await asyncio.gather(*(await begin(calls)), return_exceptions=True)

    return ended


async def test_calls_that_wait_run_as_one(narrow: Mesh, client: Client, together: Begin) -> None:
    """Calls of any number of rows, also none, are one run, and each caller gets its own rows."""
    before = Scrape(narrow.dispatcher_metrics)
    arrays = [np.full((rows, 3), float(number)) for number, rows in enumerate([1, 0, 5, 1, 17, 0, 2])]
    for x, (y, seen) in zip(arrays, await together([client.scaled(x, factor=2.0) for x in arrays]), strict=True):
        np.testing.assert_array_equal(y, x * 2)
        assert y.shape == x.shape
        assert seen.tolist() == [26] * len(x)
    after = Scrape(narrow.dispatcher_metrics)

    def risen(name: str, **labels: str) -> float:
        return after.sum(name, kernel="scaled", **labels) - before.sum(name, kernel="scaled", **labels)

    assert risen("unlatch_batch_calls_count") == 1
    assert risen("unlatch_batch_calls_sum") == 7
    assert (risen("unlatch_batch_calls_bucket", le="4.0"), risen("unlatch_batch_calls_bucket", le="8.0")) == (0, 1)
    assert risen("unlatch_worker_calls_total", outcome="ok") == 7


async def test_call_alone_waits_for_nobody(client: Client) -> None:
    """A call that finds the worker free runs by itself."""
    y, seen = await client.scaled(ROW, factor=3.0)
    assert (y.tolist(), seen.tolist()) == ([[3.0, 3.0]], [1])


MIXED: dict[str, Callable[[int], tuple[Array, Array]]] = {
    "bytes": lambda n: (np.array([b"", b"a" * n, b"\0"], object), np.arange(3)),
    "strings": lambda n: (np.array([["\u00fc" * n, ""]], object), np.ones((1, 2, 0))),
    "bool": lambda n: (np.arange(n) % 2 == 0, np.zeros((n, 2), bool)),
    "complex": lambda n: (np.arange(n) * (1 + 2j), np.full((n, 1, 2), 3 - 4j, "c8")),
    "half": lambda n: (np.arange(n, dtype="f2"), np.full((n, 3), np.nan, "f2")),
    "one byte": lambda n: (np.full((n, 3), n, "u1"), np.full((n, 5), -n, "i1")),
    "times": lambda n: (np.arange(n).astype("M8[ns]"), np.arange(n).astype("m8[s]")),
    "no bytes": lambda n: (np.zeros((n, 0)), np.zeros((n, 2, 0), "i4")),
    "large": lambda n: (np.full((n, MEBIBYTE // 8), float(n)), np.full((n, 9), n)),
}


@pytest.mark.parametrize("kind", MIXED)
async def test_every_dtype_runs_as_one(client: Client, together: Begin, kind: str) -> None:
    """Several arrays in and out, of any dtype and in any segments, come back unchanged."""
    given = [MIXED[kind](number) for number in (1, 0, 4, 2)]
    expected = [(await client.mixed(a, b))[:2] for a, b in given]
    results = await together([client.mixed(a, b) for a, b in given])
    for result, pair in zip(results, expected, strict=True):
        assert not isinstance(result, Exception), result
        *came, seen = result
        for array, wanted in zip(came, pair, strict=True):
            assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
            np.testing.assert_array_equal(array, wanted)
        assert set(seen.tolist()) <= {sum(len(a) for a, _ in given)}


async def test_what_differs_never_mixes(client: Client, together: Begin) -> None:
    """Other dtypes, trailing shapes, parameters (-0.0 differs from 0.0) and kernels run by themselves."""
    kinds: list[Callable[[], Awaitable[Any]]] = [
        lambda: client.scaled(np.ones((1, 2))),
        lambda: client.scaled(np.ones((1, 3))),
        lambda: client.scaled(np.ones((1, 2)), factor=2.0),
        lambda: client.scaled(np.ones((1, 2)), factor=0.0),
        lambda: client.scaled(np.ones((1, 2)), factor=-0.0),
        lambda: client.scaled(np.ones((1, 2)), factor=float("nan")),
        lambda: client.scaled(np.ones((1, 2)), label="factor"),
        lambda: client.rescaled(np.ones((1, 2))),
        lambda: client.mixed(np.ones((1, 2)), np.ones(1)),
        lambda: client.mixed(np.ones((1, 2), "f4"), np.ones(1)),
        lambda: client.mixed(np.ones((1, 2)), np.ones(1, "i8")),
        lambda: client.mixed(np.ones((1, 2)), np.ones((1, 1))),
    ]
    for result in await together([kind() for kind in kinds for _ in range(2)]):
        assert result.seen.tolist() == [2]
    positive, negative = await together([client.scaled(ROW, factor=factor) for factor in (0.0, -0.0)])
    assert (np.signbit(positive.y).any(), np.signbit(negative.y).all()) == (False, True)


async def test_rows_of_a_run_are_bounded(client: Client, together: Begin) -> None:
    """A call of more rows than `max_batch_size` runs alone, and the others in as few runs as they fit."""
    rows = [3, 9, 3, 3, 2, 8, 0]
    results = await together([client.scaled_by_eight(np.ones((count, 2))) for count in rows])
    seen = [result.seen.tolist() for result in results]
    assert [len(each) for each in seen] == rows
    assert (seen[0], seen[1], seen[2], seen[4]) == ([8] * 3, [9] * 9, [8] * 3, [8] * 2)
    assert (seen[3], seen[5]) == ([3] * 3, [8] * 8)


async def test_urgent_calls_run_first(client: Client, together: Begin) -> None:
    """Where a run has no room for all, calls of a lower priority wait, though they came first."""
    ranks = ["background"] * 10 + ["interactive"] * 4
    results = await together([client.scaled_by_eight(ROW, priority=priority) for priority in ranks])
    assert [int(seen[0]) for _, seen in results] == [8] * 4 + [6] * 6 + [8] * 4


async def test_run_is_within_the_kernels_timeout(narrow: Mesh, client: Client, together: Begin) -> None:
    """Once it is known how long a call takes, only as many run as one as fit the timeout."""
    before = restarts(narrow)
    await client.slow(ROW)
    results = await together([client.slow(ROW) for _ in range(8)])
    assert all(not isinstance(result, Exception) for result in results), results
    assert 2 <= max(int(seen[0]) for _, seen in results) <= 4
    assert restarts(narrow) == before


async def test_statistics_are_of_runs(narrow: Mesh, together: Begin, client: Client) -> None:
    """ModelStatistics counts successful calls as inferences and their runs as executions, and lists runs by size."""

    def told(kernel: str) -> tuple[int, int, dict[int, int]]:
        with grpc.insecure_channel(narrow.gateway) as channel:
            request = ModelStatisticsRequest(name=kernel).SerializeToString()
            (model,) = ModelStatisticsResponse.FromString(Oip(channel).send(request, "ModelStatistics")).model_stats
        sizes = {batch.batch_size: batch.compute_infer.count for batch in model.batch_stats}
        return model.inference_count, model.execution_count, sizes

    for kernel, calls, expected in (
        ("rescaled", [client.rescaled(ROW) for _ in range(6)], (6, 1, {6: 1})),
        ("picky", [client.picky(x) for x in (ROW, BAD, ROW)], (2, 2, {1: 2})),
    ):
        inferences, executions, sizes = told(kernel)
        await together(calls)
        after = told(kernel)
        risen = {size: count - sizes.get(size, 0) for size, count in after[2].items() if count > sizes.get(size, 0)}
        assert (after[0] - inferences, after[1] - executions, risen) == expected


async def test_kernel_that_takes_no_batches_runs_alone(client: Client, together: Begin) -> None:
    """Each call of a kernel without `batch=True` is a run."""
    for _, seen in await together([client.scaled_alone(ROW) for _ in range(4)]):
        assert seen.tolist() == [1]


async def test_large_calls_run_alone(client: Client, together: Begin) -> None:
    """Calls with more bytes than a batch is worth are not put side by side."""
    arrays = [np.full((1, MEBIBYTE * 20 // 8), float(number)) for number in range(3)]
    for x, (y, seen) in zip(arrays, await together([client.scaled(x) for x in arrays]), strict=True):
        np.testing.assert_array_equal(x, y)
        assert seen.tolist() == [1]


async def test_many_small_calls_fit_the_frames(client: Client, together: Begin) -> None:
    """More calls than a Run frame can name are several runs, and each is answered."""
    calls = 700
    results = await together([client.scaled(np.full((1, 1), float(number))) for number in range(calls)])
    assert [float(y[0, 0]) for y, _ in results] == [float(number) for number in range(calls)]
    assert sum(1 / float(seen[0]) for _, seen in results) <= 8


async def test_inputs_of_a_run_are_as_of_one_alone(client: Client, together: Begin) -> None:
    """Inputs begin on a 64-byte boundary, and are read-only."""
    assert (await client.addresses(ROW)).tolist() == [[0, 0, 1]]
    for row in await together([client.addresses(ROW) for _ in range(3)]):
        assert row.tolist() == [[0, 0, 3]]


# Failures.

REFUSED = {
    -1: (InvalidArgument, "no -1 please"),
    -2: (Internal, "kernel picky failed; the server's log"),
    -3: (ResourceExhausted, "more memory"),
    -4: (Internal, "shape"),
    -5: (Internal, "float32"),
    -6: (Internal, "kernel picky failed"),
    -7: (Internal, "read-only"),
}


@pytest.mark.parametrize("worst", REFUSED)
async def test_one_that_is_refused_fails_alone(client: Client, narrow: Mesh, together: Begin, worst: int) -> None:
    """A refused call fails with its own message, in any position. The others are answered, and the worker goes on."""
    pids = set(narrow.workers)
    kind, message = REFUSED[worst]
    values = [1.0, float(worst), 2.0, 3.0]
    results = await together([client.picky(np.full((1, 2), value)) for value in values])
    for value, result in zip(values, results, strict=True):
        if value < 0:
            assert isinstance(result, kind), result
            assert message in str(result)
        else:
            assert not isinstance(result, Exception), result
            assert (result.y.tolist(), result.seen.tolist()) == ([[value] * 2], [1])
    assert set(narrow.workers) == pids


async def test_all_that_are_refused_fail_each_for_itself(client: Client, together: Begin) -> None:
    """Every kind of refusal at once: each caller gets its own."""
    results = await together([client.picky(np.full((1, 2), float(worst))) for worst in REFUSED])
    for result, (kind, message) in zip(results, REFUSED.values(), strict=True):
        assert isinstance(result, kind), result
        assert message in str(result)


async def test_bytes_that_are_none_fail_alone(client: Client, together: Begin) -> None:
    """Invalid BYTES, which only the worker can see, fail their own call alone."""
    good = np.array([b"a"], object)
    results = await together([client.mixed(good, good), client.mixed(good, np.ones(1)), client.mixed(good, good)])
    assert [result.seen.tolist() for result in results] == [[2], [1], [2]]


async def test_results_too_large_together_are_given_apart(client: Client, together: Begin) -> None:
    """Calls are answered if each result is within the limit and all together are not. One beyond it fails alone."""
    fits = 20 * MEBIBYTE // 8
    results = await together([client.stretched(np.full(1, float(number)), length=fits) for number in range(5)])
    for number, y in enumerate(results):
        assert not isinstance(y, Exception), y
        assert (y.shape, y.min(), y.max()) == ((1, fits), number, number)
    few, many, last = await together([client.stretched(np.ones(rows), length=fits) for rows in (1, 4, 1)])
    assert (few.shape, last.shape) == ((1, fits), (1, fits))
    assert isinstance(many, ResourceExhausted)


# Callers that leave.


async def left(task: "asyncio.Future[Any]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_one_who_leaves_the_queue_is_not_run(
    narrow: Mesh, client: Client, gate: GateMaker, tmp_path: Path
) -> None:
    """A call that is abandoned while queued, or staged with others behind a run, is not among a run's rows."""
    first, second = gate("first"), gate("second")
    running = asyncio.ensure_future(client.waits(X, gate=str(first)))
    await until(lambda: first.reached, "the worker is busy")
    staged = asyncio.ensure_future(client.waits(X, gate=str(second)))
    calls = [asyncio.ensure_future(client.scaled(ROW * number)) for number in range(6)]
    await until(lambda: waiting(narrow) == 6, "six wait")
    await left(calls[0])
    await until(lambda: waiting(narrow) == 5, "five wait")
    first.open()
    await running
    await until(lambda: second.reached, "the next runs")
    await until(lambda: waiting(narrow) == 0, "the five are staged")
    before = gone(narrow)
    await left(calls[1])
    await left(calls[5])
    await until(lambda: gone(narrow) == before + 2, "the dispatcher knows")
    second.open()
    await staged
    for number in (2, 3, 4):
        y, seen = await calls[number]
        assert (y.tolist(), seen.tolist()) == ([[number, number]], [3])


async def test_run_goes_on_for_those_who_wait(
    narrow: Mesh, client: Client, gate: GateMaker, begin: Begin, tmp_path: Path
) -> None:
    """`cancelled()` is false while one caller waits. The others are answered."""
    here, record = gate("together"), tmp_path / "cancelled"
    calls = await begin([client.waits_together(ROW, gate=str(here), record=str(record)) for _ in range(3)])
    await until(lambda: here.reached, "they run")
    before = gone(narrow)
    await left(calls[0])
    await until(lambda: gone(narrow) == before + 1, "the dispatcher knows")
    here.open()
    for call in calls[1:]:
        y, seen = await call
        assert (y.tolist(), seen.tolist()) == (ROW.tolist(), [3])
    assert record.read_text() == "False"


async def test_run_knows_that_nobody_waits_when_all_have_left(
    narrow: Mesh, client: Client, begin: Begin, tmp_path: Path
) -> None:
    """`cancelled()` is true once the last caller has left, not before. A worker that looks at it is not replaced."""
    record, pids = tmp_path / "state", set(narrow.workers)
    calls = await begin([client.stays_until_left(ROW, record=str(record)) for _ in range(3)])
    await until(lambda: record.exists() and record.read_text() == "runs", "they run")
    before = gone(narrow)
    for call in calls[:2]:
        await left(call)
    await until(lambda: gone(narrow) == before + 2, "the dispatcher knows")
    assert record.read_text() == "runs"
    await left(calls[2])
    await until(lambda: record.read_text() == "left", "the run has ended")
    np.testing.assert_array_equal(await client.echo(X), X)
    assert set(narrow.workers) == pids


async def test_core_is_freed_when_all_have_left(narrow: Mesh, client: Client, begin: Begin, tmp_path: Path) -> None:
    """A run that goes on without callers loses its worker, and not before."""
    record, before = tmp_path / "rows", restarts(narrow)
    calls = await begin([client.spins_together(ROW, record=str(record)) for _ in range(3)])
    await until(lambda: record.exists() and record.read_text(), "they run")
    assert record.read_text() == "3"
    for call in calls:
        assert restarts(narrow) == before
        await left(call)
    np.testing.assert_array_equal(await client.echo(X), X)
    assert restarts(narrow) == before + 1


async def test_many_who_leave_harm_nobody(narrow: Mesh, client: Client, gate: GateMaker, begin: Begin) -> None:
    """Hundreds of callers leave a run and the next one, and the worker takes no notice. The others are answered."""
    here, ends, before = gate("here"), restarts(narrow), gone(narrow)
    # The earlier deadlines run first. Deadlines that are equal for the client may not be so for the replica.
    first = [client.waits_together(ROW, gate=str(here), timeout=600.0) for _ in range(220)]
    calls = await begin(first + [client.scaled(ROW, timeout=1200.0) for _ in range(220)])
    await until(lambda: here.reached and waiting(narrow) == 0, "a run of many has another staged behind it")
    for call in (*calls[1:220], *calls[221:]):
        await left(call)
    await until(lambda: gone(narrow) == before + 438, "the dispatcher knows")
    here.open()
    assert (await calls[0]).seen.tolist() == [220]
    assert (await calls[220]).seen.tolist() == [1]
    assert restarts(narrow) == ends


# Workers that end.


async def test_run_that_dies_is_run_again_one_by_one(narrow: Mesh, client: Client, together: Begin) -> None:
    """A pure kernel's calls run again. The one that kills is refused after its second worker."""
    before = restarts(narrow)
    one, killer, other = await together([client.deadly_pure(x) for x in (ROW, BAD, ROW)])
    assert isinstance(killer, FailedPrecondition), killer
    for y, seen in (one, other):
        assert (y.tolist(), seen.tolist()) == (ROW.tolist(), [1])
    assert restarts(narrow) == before + 2


async def test_run_that_dies_of_an_impure_kernel_is_lost(narrow: Mesh, client: Client, together: Begin) -> None:
    """All calls of the run end ABORTED, since each may have had an effect, and no others."""
    before = restarts(narrow)
    *lost, right = await together([*(client.deadly(x) for x in (ROW, BAD, ROW)), client.scaled(ROW)])
    for result in lost:
        assert isinstance(result, Aborted), result
        assert "SIGKILL" in str(result)
    assert right.y.tolist() == ROW.tolist()
    assert restarts(narrow) == before + 1


async def test_timeout_of_a_run_ends_all_of_it(client: Client, together: Begin) -> None:
    """All calls of a kernel that is not pure fail: nothing tells which of them took too long."""
    for result in await together([client.timed_together(x) for x in (ROW, BAD, ROW)]):
        assert isinstance(result, DeadlineExceeded), result
        assert "timeout of 0.5 s" in str(result)
    np.testing.assert_array_equal(await client.echo(X), X)


async def test_timeout_of_a_pure_run_ends_whoever_it_was(client: Client, together: Begin) -> None:
    """The others are answered when each has had the time for itself."""
    one, endless, other = await together([client.timed_pure(x) for x in (ROW, BAD, ROW)])
    assert isinstance(endless, DeadlineExceeded), endless
    assert (one.y.tolist(), other.y.tolist()) == (ROW.tolist(), ROW.tolist())


LIES = {
    "twice": "unexpected_reply",
    "one in another's place": "unexpected_reply",
    "of the next run": "unexpected_reply",
    "some": "invalid_reply",
    "one by one": "invalid_reply",
    "more": "unexpected_reply",
    "none": "unexpected_reply",
    "one is no array": "invalid_reply",
    "done after failed": "unexpected_reply",
    "failed twice": "unexpected_reply",
    "failed after done": "unexpected_reply",
    "another call failed": "unexpected_reply",
}


@pytest.mark.parametrize("how", LIES)
async def test_lie_about_a_run_ends_the_worker(narrow: Mesh, client: Client, together: Begin, how: str) -> None:
    """A worker that answers for its calls with a false frame is killed.

    No caller waits for ever, or is answered twice.
    """
    before = Scrape(narrow.dispatcher_metrics)
    calls = [client.lies_together(np.full(1, float(number)), how=how) for number in range(3)]
    *results, other = await together([*calls, client.scaled(ROW)])
    if how == "failed after done":
        assert all(not isinstance(result, Exception) for result in results), results
    elif how in ("done after failed", "failed twice"):
        # One of them was given to the worker again before the false frame was found.
        assert sum(isinstance(result, Aborted) for result in results) <= 1, results
    else:
        assert all(isinstance(result, Aborted) for result in results), results
    assert other.y.tolist() == ROW.tolist()
    await until(lambda: restarts(narrow) == before.sum("unlatch_worker_restarts_total") + 1, "the worker is replaced")
    after = Scrape(narrow.dispatcher_metrics)
    reasons = {labels["reason"] for labels in after.labels("unlatch_worker_restarts_total")}
    name = "unlatch_worker_restarts_total"
    (reason,) = [one for one in reasons if after.sum(name, reason=one) > before.sum(name, reason=one)]
    assert reason == LIES[how]
    assert not after.fell_since(before)


# Memory.


async def test_large_replies_of_one_segment_stay_what_they_are(narrow: Mesh, client: Client, together: Begin) -> None:
    """Large replies, sent in pieces while the worker runs its next calls, stay unchanged to the end."""
    length = 2 * MEBIBYTE // 8
    for _ in range(3):
        results = await together([client.stretched(np.full(1, float(number)), length=length) for number in range(40)])
        for number, y in enumerate(results):
            assert (y.shape, y.min(), y.max()) == ((1, length), number, number)


@pytest.mark.timeout(150)
async def test_runs_leave_nothing_behind(narrow: Mesh, client: Client, together: Begin) -> None:
    """After many runs, also refused, abandoned and large ones, dispatcher and worker hold no more memory."""
    dispatcher = narrow.dispatcher_service.pid

    async def rounds(count: int) -> None:
        for _ in range(count):
            await together([client.stretched(np.ones(1), length=MEBIBYTE // 16) for _ in range(20)])
            await together([client.picky(x) for x in (ROW, BAD, ROW)])
            tasks = [asyncio.ensure_future(client.stretched(np.ones(1), length=MEBIBYTE // 4)) for _ in range(10)]
            await asyncio.gather(*tasks[:3])
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            np.testing.assert_array_equal(await client.echo(X), X)

    await rounds(4)
    segments, memory = len(memory_files([dispatcher])), resident_bytes(dispatcher)
    await rounds(12)
    assert len(memory_files([dispatcher])) <= segments + 2
    assert resident_bytes(dispatcher) - memory < 16 * MEBIBYTE


# Any calls at all.

_VALUES = st.integers(-7, 9).map(float)
_ARRAYS = st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 3]), _VALUES).map(lambda one: np.full(one[:2], one[2]))
_FACTORS = st.sampled_from([1.0, -0.0, 0.0, np.inf, 2.5])


@given(members=st.lists(st.tuples(_ARRAYS, _FACTORS, st.booleans()), min_size=1, max_size=24))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_together_is_as_alone(client: Client, together: Begin, members: list[tuple[Array, float, bool]]) -> None:
    """Calls that are made together have the results and errors, to the last bit, that each has alone."""

    def calls() -> Iterator[Awaitable[object]]:
        for x, factor, picky in members:
            yield client.picky(x) if picky else client.scaled(x, factor=factor)

    def plain(result: Any) -> tuple[object, ...]:
        if isinstance(result, Exception):
            return type(result), str(result).partition(" under ")[0]
        return result.y.dtype, result.y.shape, result.y.tobytes(), result.seen.shape

    alone = [plain((await asyncio.gather(call, return_exceptions=True))[0]) for call in calls()]
    assert [plain(result) for result in await together(list(calls()))] == alone
